"""What one GPU is asked in fifteen minutes: `python -m benchmarks.gpu first`, then `… second`."""
