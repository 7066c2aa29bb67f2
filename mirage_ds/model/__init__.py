"""The model: load, attention, vision, latents, loss, forward."""
