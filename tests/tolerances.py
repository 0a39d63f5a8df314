"""Every tolerance of the tests, with its reason."""

import torch

# What a kernel is allowed over the reference in the same dtype, both held against the reference in float64. The kernels
# evaluate exp by a polynomial good to about an ulp and sum in another order than the reference; both change an error by
# a small factor, and the largest error of a few hundred numbers is itself a random number that varies by about two.
ERROR_MULTIPLE = 4.0

# Added to the reference's error, in units of the last place of the largest number of a result: where the reference
# happens to be exact (a single step, a single channel) its error says nothing about what a dtype can hold.
ERROR_FLOOR_ULPS = 8.0

# Added for every step of time, in units of the state's dtype: a kernel's exp(step A) is 2^(step (A log2 e)), within an
# ulp and a half of the true decay where memory is long. Where steps are alike so are their errors, which then add up.
ERROR_ULPS_A_STEP = 1.0

# Added in multiples of the least normal number of the state's dtype: kernels flush what is smaller to zero, and a
# gradient sums a few hundred of such numbers.
ERROR_FLUSHED = 1000.0

# Two ways through the same kernel (a sequence cut, a sequence packed, a rollout): the recurrence is the same chain of
# operations, but sums over time, and over channels for the gradients of B and C, are split elsewhere. As a share of the
# largest number of the result. 16-bit results are rounded once at the end, so a difference in float32 shows as one ulp.
SAME_KERNEL = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}

# gradcheck's central differences in float64: its own default step, error about step², and the curvature of exp.
GRADCHECK = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-4}

# A training step may keep, beyond inputs, outputs and gradients, this share of them: one state a chunk is 1/32 of one
# float32 activation at 128 states a channel and less, and there are at least three activations (u, delta, out).
SAVED_SHARE = 0.04

# How much longer a scan may take over an input that decays into subnormal numbers than over one that does not. Without
# flush-to-zero it is about thirty times; the rest is for a busy machine.
SUBNORMAL_SLOWDOWN = 5.0
