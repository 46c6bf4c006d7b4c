"""The parts of `tests/benchmarks/kernels.py` and `tune_kernels.py`: shapes, bounds, timing, checks, peers, search."""
