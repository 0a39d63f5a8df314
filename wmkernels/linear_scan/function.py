"""The public linear scan."""

import torch
from torch import Tensor

from wmkernels.dispatch import choose
from wmkernels.linear_scan.autograd import OP, LinearScan
from wmkernels.linear_scan.chunked import linear_scan_chunked
from wmkernels.linear_scan.reference import linear_scan_reference
from wmkernels.linear_scan.validation import canonical
from wmkernels.registration import needs_autograd


def linear_scan(
    gates: Tensor,
    tokens: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    reset: Tensor | None = None,
    channel_last: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The first-order recurrence ``h_t = gates_t h_{t-1} + tokens_t``, differentiable in every input.

    In reverse ``h_t = gates_t h_{t+1} + tokens_t``, from the end: discounted returns and λ-returns are such scans.
    (Martin & Cundy 2018, arXiv 1709.04057.)

    Args:
        gates: (batch, ..., time), or (batch, time, ...) with ``channel_last``. Any strides. float32, float64, bfloat16
            or float16; the recurrence itself runs in float32, in float64 for float64 inputs.
        tokens: of the same shape and dtype.
        initial_state: (batch, ...), float32 or the dtype of ``gates``, zero if None: the state before the first
            step; in reverse, after the last.
        reverse: run from the end to the start.
        reset: bool (batch, time), true where a new sequence starts: h_{t-1} does not reach h_t, and in reverse h_t does
            not reach h_{t-1}.
        channel_last: time is the second dimension.
        return_last_state: also return the state that the next piece of the sequence starts from: the last h, in
            reverse the first (zero where ``reset[:, 0]``).
        backend: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"chunked"`` or ``"reference"``; the best trusted one if None.

    Returns:
        h, shaped as ``gates`` in its dtype; with ``return_last_state`` also (batch, ...) in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: a shape, a device or a backend that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch, wmkernels
        >>> reward, discount = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
        >>> wmkernels.linear_scan(discount, reward, reverse=True)
        tensor([[0.2500, 0.5000, 1.0000]])
    """
    inputs, inner = canonical(gates, tokens, initial_state, reset, reverse, channel_last)
    chosen = choose(OP, gates.device, backend)
    if chosen == "reference":
        out, last_state = linear_scan_reference(inputs)
    elif chosen == "chunked":
        out, last_state = linear_scan_chunked(inputs)
    elif needs_autograd(inputs[:3]):
        out, last_state = LinearScan.apply(*inputs, chosen)
    else:
        out, last_state = torch.ops.wmkernels.linear_scan_forward(*inputs, chosen)
    batch, _, time = inputs.gates.shape
    out = out.transpose(1, 2).reshape(batch, time, *inner) if channel_last else out.reshape(batch, *inner, time)
    return (out, last_state.reshape(batch, *inner)) if return_last_state else out
