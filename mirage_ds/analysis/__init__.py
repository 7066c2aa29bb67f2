"""What a trained model does with its latents: controls and a look inside; bench.py is the model that both run."""
