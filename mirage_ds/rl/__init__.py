"""The reinforcement stage: answers are sampled, scored, and made likelier or less likely (GRPO and its kin)."""
