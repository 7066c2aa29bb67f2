"""Decoding a model, scoring its answers, writing the scores into its card."""
