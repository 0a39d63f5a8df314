"""Every tolerance of the tests, with its reason."""

import torch

# A kernel's largest error over that of the reference in the same dtype, both against float64. A polynomial exp (about
# one ulp) and another order of sums change errors by a small factor; the largest of a few hundred varies by about two.
ERROR_MULTIPLE = 4.0

# Added, in ulps of a result's largest number: the reference may happen to be exact (one step, one channel).
ERROR_FLOOR_ULPS = 8.0

# Added per time step, in ulps of the state's dtype: a kernel's exp(step A) is 2^(step (A log2 e)), within 1.5 ulps
# where memory is long. Equal steps have equal errors, which add up.
ERROR_ULPS_A_STEP = 1.0

# Added, in least normal numbers of the state's dtype: kernels flush subnormals, and a gradient sums a few hundred.
ERROR_FLUSHED = 1000.0

# The same kernel on a split or packed sequence or a rollout, relative to the result's largest number: only sums over
# time, and over channels for the gradients of B and C, are split elsewhere. 16-bit results are rounded once.
SAME_KERNEL = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}

# gradcheck's central differences in float64: its own default step, error about step², and the curvature of exp.
GRADCHECK = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-4}

# Memory of a training step beyond inputs, outputs and gradients, as a fraction of them: one state per chunk is 1/32 of
# a float32 activation at up to 128 states per channel, and there are at least three activations (u, delta, out).
SAVED_SHARE = 0.04

# Slowdown of a scan whose input decays into subnormals: about 30 without flush-to-zero; the rest is for a busy machine.
SUBNORMAL_SLOWDOWN = 5.0
