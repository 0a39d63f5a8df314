"""Runs CUDA C++ kernels on a CPU, for tests (README.md)."""
