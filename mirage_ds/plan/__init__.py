"""`mirage-ds plan`: whether a model fits, which DeepSpeed JSON to take and what bounds a step, by arithmetic alone."""
