"""Checks causal convolution arguments."""

import torch
from torch import Tensor

from wmkernels.causal_conv1d.meta import ConvInputs
from wmkernels.checks import (
    FLOATS,
    require_dtype,
    require_float,
    require_packing,
    require_reset,
    require_shape,
    shown,
    state_dtype,
)

OP, STEP = "causal_conv1d", "causal_conv1d_step"


def canonical(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    channel_last: bool,
) -> ConvInputs:
    """Time last, all but ``x`` in the state dtype. Raises ValueError, TypeError."""
    require_dtype(OP, "x", x, FLOATS, "")
    if x.dim() != 3:
        wanted = "(batch, time, channels) with channel_last=True" if channel_last else "(batch, channels, time)"
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)}, expected {wanted}")
    if channel_last:
        x = x.transpose(1, 2)
    _check_parameters(OP, x, weight, bias, "" if channel_last else "channel_last=True takes (batch, time, channels)")
    silu = _is_silu(OP, activation)
    require_packing(OP, cu_seqlens, x, "x")
    sequences = ("batch", x.shape[0]) if cu_seqlens is None else ("sequences", cu_seqlens.shape[0] - 1)
    initial_state = _canonical_window(OP, "initial_state", initial_state, x, weight, sequences, channel_last)
    require_reset(OP, reset, ("batch", "time"), (x.shape[0], x.shape[2]), x, "x")
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
    return _inputs(x, weight, bias, initial_state, reset, bounds, silu, channel_last)


def canonical_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reset: Tensor | None,
    channel_last: bool,
) -> ConvInputs:
    """A sequence of one input. Raises ValueError, TypeError."""
    require_dtype(STEP, "x", x, FLOATS, "")
    if x.dim() != 2:
        raise ValueError(f"{STEP}: x has shape {tuple(x.shape)}, expected (batch, channels)")
    _check_parameters(STEP, x, weight, bias, "")
    silu = _is_silu(STEP, activation)
    window = _canonical_window(STEP, "state", state, x, weight, ("batch", x.shape[0]), channel_last)
    require_reset(STEP, reset, ("batch",), (x.shape[0],), x, "x")
    flags = None if reset is None else reset.unsqueeze(-1)
    return _inputs(x.unsqueeze(-1), weight, bias, window, flags, None, silu, channel_last)


def _inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    channel_last: bool,
) -> ConvInputs:
    dtype = state_dtype(x.dtype)
    bias, initial_state = (None if x is None else x.to(dtype) for x in (bias, initial_state))
    return ConvInputs(x, weight.to(dtype), bias, initial_state, reset, cu_seqlens, silu, channel_last)


def _check_parameters(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, hint: str) -> None:
    channels = x.shape[1]
    require_float(op, "weight", weight, x, "x")
    if weight.dim() == 3 and weight.shape[1] == 1:
        hint = "weight.squeeze(1) has the weights of a depthwise torch.nn.Conv1d"
    elif x.dim() < 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        hint = ""
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected (channels={channels}, width) to match x"
            + (f"; {hint}" if hint else "")
        )
    if bias is not None:
        require_float(op, "bias", bias, x, "x")
        require_shape(op, "bias", bias, ("channels",), (channels,), "x")


def _is_silu(op: str, activation: str | None) -> bool:
    if activation not in (None, "silu"):
        raise ValueError(f'{op}: activation is {shown(activation)}, expected "silu" or None')
    return activation == "silu"


def _canonical_window(
    op: str,
    name: str,
    window: Tensor | None,
    x: Tensor,
    weight: Tensor,
    sequences: tuple[str, int],
    channel_last: bool,
) -> Tensor | None:
    if window is None:
        return None
    require_float(op, name, window, x, "x")
    labels, sizes = [sequences[0], "channels", "width - 1"], [sequences[1], weight.shape[0], weight.shape[1] - 1]
    order = (0, 2, 1) if channel_last else (0, 1, 2)
    hint = ""
    if window.dim() == 3 and window.shape[-1 if not channel_last else 1] == weight.shape[1]:
        hint = "leave out its oldest input, which no output after it reaches"
    require_shape(op, name, window, [labels[i] for i in order], [sizes[i] for i in order], "x and weight", hint)
    return window.transpose(1, 2) if channel_last else window
