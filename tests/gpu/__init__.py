"""What only a GPU can show (docs/gpu.md). tests/unit/benchmarks/test_gpu_bodies.py runs the bodies on the CPU."""
