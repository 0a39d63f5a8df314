"""The public linear scan."""

import torch
from torch import Tensor

from wmkernels.checks import Signature, is_autocast
from wmkernels.dispatch import choose
from wmkernels.linear_scan.autograd import OP, LinearScan
from wmkernels.linear_scan.chunked import linear_scan_chunked
from wmkernels.linear_scan.reference import linear_scan_reference
from wmkernels.linear_scan.validation import canonical
from wmkernels.modes import needs_autograd, requires_pytorch
from wmkernels.registration import differentiably


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
    """``h_t = gates_t h_{t-1} + tokens_t`` (Martin & Cundy 2018, arXiv 1709.04057), differentiable.

    In reverse ``h_t = gates_t h_{t+1} + tokens_t``, as for λ-returns.

    Args:
        gates: (batch, ..., time), any strides; float32, float64, bfloat16 or float16;
            arithmetic is in float32 (float64).
        tokens: as ``gates``; of another dtype, both are computed in float32 (float64).
        initial_state: (batch, ...), float32 or as ``gates``; in reverse, h after the last step; zeros if None.
        reverse: run from the end.
        reset: bool (batch, time), true at a sequence's first step: cuts h_{t-1} from h_t, in reverse h_t from h_{t-1}.
        channel_last: shapes are (batch, time, ...).
        return_last_state: also return the last h, in reverse the first (zero where ``reset[:, 0]``).
        backend: as for ``selective_scan``.

    Returns:
        h, as ``gates``; with ``return_last_state`` also (batch, ...), float32 (float64 for float64).

    Raises:
        ValueError: invalid shape, device or backend.
        TypeError: invalid dtype.

    Example:
        >>> import torch, wmkernels
        >>> reward, discount = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
        >>> wmkernels.linear_scan(discount, reward, reverse=True)
        tensor([[0.2500, 0.5000, 1.0000]])
    """
    _SIGNATURE.require(gates, tokens, initial_state, reverse, reset, channel_last, return_last_state, backend)
    inputs, inner = canonical(gates, tokens, initial_state, reset, reverse, channel_last)
    chosen = choose(OP, gates.device, backend, pytorch_for=requires_pytorch(inputs[:3]))
    if chosen == "reference":
        out, last_state = linear_scan_reference(inputs)
    elif chosen == "chunked":
        out, last_state = linear_scan_chunked(inputs)
    elif needs_autograd(inputs[:3]):
        out, last_state = differentiably(LinearScan, *inputs, chosen)
    else:
        out, last_state = torch.ops.wmkernels.linear_scan_forward(*inputs, chosen)
    if out.dtype != gates.dtype and not is_autocast(gates.device):  # widened beside tokens
        out = out.to(gates.dtype)
    batch, _, time = inputs.gates.shape
    out = out.transpose(1, 2).reshape(batch, time, *inner) if channel_last else out.reshape(batch, *inner, time)
    return (out, last_state.reshape(batch, *inner)) if return_last_state else out


_SIGNATURE = Signature(linear_scan)
