"""Floating-point operations of the gated delta rule, for ``torch.utils.flop_counter``.

Counted as in ``wmkernels/selective_scan/flops.py``, with the equations of ``reference.py``: a chunked kernel does other
work for the same result.
"""

from wmkernels.gated_delta_rule.meta import DeltaRuleInputs


def forward_flops(inputs: DeltaRuleInputs) -> int:
    """Per number of the state: its decay, 2 each for what k and q recall, k u and its sum; per value: 3; exp."""
    d_k, d_v = inputs.q.shape[2], inputs.v.shape[2]
    return inputs.gate.numel() * (7 * d_k * d_v + 3 * d_v + 1)


def backward_flops(inputs: DeltaRuleInputs) -> int:
    """Per number of the state 16, per value 6.

    2 each for the sums dq, dk (twice), du and d(decay); 1 each for the products that q, k and the decay add to the
    state's gradient, and for adding them. The residuals are kept, so nothing is computed again.
    """
    d_k, d_v = inputs.q.shape[2], inputs.v.shape[2]
    return inputs.gate.numel() * (16 * d_k * d_v + 6 * d_v + 2 * d_k + 1)
