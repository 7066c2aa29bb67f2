"""DeepSpeed: its configuration, the engine, checkpoints and the saved model."""
