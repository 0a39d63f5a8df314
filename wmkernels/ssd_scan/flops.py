"""Floating-point operations of the SSD scan, for ``torch.utils.flop_counter``.

Counted as in ``wmkernels/selective_scan/flops.py``, with the recurrence of ``SSDInputs``: a chunked kernel does other
work for the same result.
"""

from wmkernels.ssd_scan.meta import SSDInputs


def forward_flops(inputs: SSDInputs) -> int:
    """Per number of the state: its decay, x B, their sum, h C and its sum; per channel: weight x and options; exp."""
    n = inputs.B.shape[3]
    with_own, with_D, with_z = (x is not None for x in (inputs.own_weight, inputs.D, inputs.z))
    own = with_own * (2 * n + 2)
    return inputs.x.numel() * (5 * n + 1 + 2 * with_D + 2 * with_z) + inputs.gate.numel() * (1 + own)


def backward_flops(inputs: SSDInputs) -> int:
    """The states again, then their gradients.

    Per number of the state 12: 2 each for the sums dh, dB, dC, d(weight x) and d(decay), 1 for the gradient carried to
    the step before, 1 for adding to it. A gate z needs the output again.
    """
    n = inputs.B.shape[3]
    with_own, with_D, with_z = (x is not None for x in (inputs.own_weight, inputs.D, inputs.z))
    gate = with_z * (2 * n + 5 + 2 * with_D)
    own = with_own * (6 * n + 4)
    return inputs.x.numel() * (3 * n + 12 * n + 4 + 4 * with_D + gate) + inputs.gate.numel() * (1 + own)
