"""Tolerances of the tests."""

import torch

# A kernel's error over that of the same-dtype reference. A polynomial exp (one ulp) and another summation order change
# errors by a small factor; maxima vary by about two.
ERROR_MULTIPLE = 4.0

# Added, in ulps of a result's maximum: the reference may be exact.
ERROR_FLOOR_ULPS = 8.0

# Added per step, in ulps of the state's dtype: 2^(step (A log2 e)) is within 1.5 ulps for long memories, and errors of
# equal steps add up.
ERROR_ULPS_A_STEP = 1.0

# Added per product of a sum, in ulps of the state's dtype, where an input repeats elements (stride 0): n products added
# in turn are off by up to n / 2 ulps of the sum of their magnitudes (Higham 2002, section 4.2). Equal products reach
# that, since every addition rounds the same way; others err like the square root of n, as the reference's do. A gate
# passes on less than half of its sum's relative error: |x| sigmoid'(x) < 0.23, |x| tanh'(x) < 0.45.
ERROR_ULPS_A_TERM = 0.5

# Added, in least normal numbers: kernels flush subnormals; a gradient sums a few hundred.
ERROR_FLUSHED = 1000.0

# Split or packed sequences and rollouts, relative to a result's maximum: only the order of sums over time (and
# channels, for gradients of B and C) differs. 16-bit results are rounded once.
SAME_KERNEL = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}

# gradcheck's default step: error about step², times the curvature of exp.
GRADCHECK = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-4}

# Extra memory over inputs, outputs and gradients: one state per chunk is 1/32 of a float32 activation for up to 128
# states per channel, with at least three activations.
SAVED_SHARE = 0.04

# About 30 without flush-to-zero; the margin covers a busy machine.
SUBNORMAL_SLOWDOWN = 5.0

# Beside special values (tests/core/test_special_values.py): of a result's size without them, and its own.
SPECIAL_ULPS = 64.0
