"""Runs CUDA C++ kernels on a CPU, for tests: see README.md beside this file."""
