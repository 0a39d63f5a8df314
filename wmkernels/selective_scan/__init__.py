"""The selective scan: reference, kernels and public functions."""
