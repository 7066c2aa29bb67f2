"""The reinforcement stage: rollouts, rewards, the objective, and the optimizer steps made of them."""
