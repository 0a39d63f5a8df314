"""Other libraries, run by these kernels."""
