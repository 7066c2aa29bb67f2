"""Records before training: made, imported, varied, mixed, checked, shown."""
