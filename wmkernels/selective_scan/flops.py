"""Floating-point operations of the selective scan, for ``torch.utils.flop_counter``.

An addition, a multiplication and a function such as exp count 1 each, per element; sums count their terms. Equations
are those of ``reference.py``. Resets and casts count nothing.
"""

from wmkernels.selective_scan.meta import ScanInputs


def forward_flops(inputs: ScanInputs) -> int:
    """Per state: step A, exp, decay h, step u B, their sum, C h and its sum; per channel: step u and the options."""
    state = inputs.A.shape[1]
    with_D, with_z = inputs.D is not None, inputs.z is not None
    return inputs.u.numel() * (7 * state + _step_flops(inputs) + 2 * with_D + 2 * with_z)


def backward_flops(inputs: ScanInputs) -> int:
    """The states again, then their gradients.

    Per state 15: 2 each for the sums dh, dB, dC, dA, d(step) and d(step u), 1 each for d(decay), d(exponent) and the
    gradient carried to the step before. A gate needs the output again.
    """
    state = inputs.A.shape[1]
    with_D, with_z, with_bias = inputs.D is not None, inputs.z is not None, inputs.delta_bias is not None
    recomputed = 5 * state + _step_flops(inputs)
    gradients = 15 * state + 3 + 4 * with_D + with_bias + 2 * bool(inputs.delta_softplus)
    gate = with_z * (2 * state + 2 * with_D + 5)
    return inputs.u.numel() * (recomputed + gradients + gate)


def _step_flops(inputs: ScanInputs) -> int:
    """Of step and step u."""
    return 1 + (inputs.delta_bias is not None) + bool(inputs.delta_softplus)
