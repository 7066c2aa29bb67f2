"""`--stage rl`: reinforcement with latents."""
