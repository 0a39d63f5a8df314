"""The public linear scan: checks its inputs, brings them to (batch, channels, time), and calls the kernels."""

import math

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    promote_dtypes,
    require_device,
    require_dtype,
    require_reset,
    require_shape,
    require_tensor,
    state_dtype,
)
from wmkernels.dispatch import choose
from wmkernels.linear_scan.autograd import LinearScan
from wmkernels.linear_scan.reference import linear_scan_reference
from wmkernels.registration import needs_autograd

OP = "linear_scan"


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
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; the best that can run if None.

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
    require_tensor(OP, "gates", gates)
    require_tensor(OP, "tokens", tokens)
    require_dtype(OP, "gates", gates, FLOATS, "")
    if torch.is_autocast_enabled(gates.device.type):
        dtype = promote_dtypes([gates.dtype, tokens.dtype])
        gates, tokens = gates.to(dtype), tokens.to(dtype)
    require_device(OP, "tokens", tokens, gates.device, "gates")
    require_dtype(OP, "tokens", tokens, (gates.dtype,), "as gates has")
    if gates.dim() < 2:
        wanted = "(batch, time, ...)" if channel_last else "(batch, ..., time)"
        raise ValueError(f"{OP}: gates has shape {tuple(gates.shape)}, expected {wanted}")
    if tokens.shape != gates.shape:
        raise ValueError(f"{OP}: tokens has shape {tuple(tokens.shape)}, expected {tuple(gates.shape)} to match gates")
    if channel_last:
        gates, tokens = gates.movedim(1, -1), tokens.movedim(1, -1)
    batch, *inner, time = gates.shape
    _check_memory(gates, initial_state, reset)

    channels = math.prod(inner)
    # Only where needed: in PyTorch 2.11 a compiled graph that keeps views of its inputs, and none of them itself, drops
    # a second derivative in silence, where it raises otherwise.
    if len(inner) != 1:
        gates, tokens = gates.reshape(batch, channels, time), tokens.reshape(batch, channels, time)
        initial_state = None if initial_state is None else initial_state.reshape(batch, channels)
    if initial_state is not None:
        initial_state = initial_state.to(state_dtype(gates.dtype))
    chosen = choose(OP, gates.device, backend)
    if chosen == "reference":
        out, last_state = linear_scan_reference(gates, tokens, initial_state, reset, reverse)
    elif needs_autograd((gates, tokens, initial_state)):
        out, last_state = LinearScan.apply(gates, tokens, initial_state, reset, reverse, channel_last, chosen)
    else:
        out, last_state = torch.ops.wmkernels.linear_scan_forward(
            gates, tokens, initial_state, reset, reverse, channel_last, chosen
        )
    out = out.transpose(1, 2).reshape(batch, time, *inner) if channel_last else out.reshape(batch, *inner, time)
    return (out, last_state.reshape(batch, *inner)) if return_last_state else out


def _check_memory(gates: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> None:
    """``gates`` with time last."""
    if initial_state is not None:
        require_tensor(OP, "initial_state", initial_state)
        require_device(OP, "initial_state", initial_state, gates.device, "gates")
        allowed = (gates.dtype, state_dtype(gates.dtype))
        require_dtype(OP, "initial_state", initial_state, allowed, f"beside gates of {gates.dtype}")
        labels = ["batch", *("channels",) * (gates.dim() - 2)]
        require_shape(OP, "initial_state", initial_state, labels, gates.shape[:-1], "gates")
    sizes = (gates.shape[0], gates.shape[-1])
    require_reset(OP, reset, ("batch", "time"), sizes, gates, "gates")
