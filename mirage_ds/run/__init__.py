"""A training run: set-up, steps, validation, journal, folder, the way to stop."""
