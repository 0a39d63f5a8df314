"""Hands the tensors of a linear scan to the C++ (CPU) and CUDA kernels."""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.linear_scan.meta import backward_outputs, forward_outputs
from wmkernels.native_call import DTYPE_CODES, Members, output, run


def _members(gates: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool) -> Members:
    """Sizes and the inputs that both directions read, checked."""
    batch, channels, time = gates.shape
    dtype = gates.dtype
    return {
        "batch": batch,
        "channels": channels,
        "time": time,
        "dtype": DTYPE_CODES[dtype],
        "reverse": int(reverse),
        "gates": (gates, gates.shape, dtype),
        "initial_state": (initial_state, (batch, channels), state_dtype(dtype)),
        "reset": (reset, (batch, time), torch.bool),
    }


def forward(
    gates: Tensor, tokens: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool, channel_last: bool
) -> tuple[Tensor, Tensor]:
    """(out, last_state) of gates and tokens (batch, channels, time)."""
    out, last_state = forward_outputs(gates, channel_last)
    members = _members(gates, initial_state, reset, reverse)
    members["tokens"] = (tokens, gates.shape, gates.dtype)
    members["out"] = output(out)
    members["last_state"] = output(last_state)
    run("linear_scan_forward", members, gates.device)
    return out, last_state


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    gates: Tensor,
    out: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    channel_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (gates, tokens, initial_state)."""
    shape, dtype, device = gates.shape, gates.dtype, gates.device
    members = _members(gates, initial_state, reset, reverse)
    members["out"] = (out, shape, dtype)
    members["grad_out"] = (grad_out, shape, dtype)
    state = state_dtype(dtype)
    members["grad_last_state"] = (grad_last_state, tuple(shape[:2]), state)
    gradients = backward_outputs(gates, initial_state, channel_last)
    for name, gradient in zip(("gates", "tokens", "initial_state"), gradients, strict=True):
        members[f"grad_{name}"] = output(gradient)
    run("linear_scan_backward", members, device)
    return gradients
