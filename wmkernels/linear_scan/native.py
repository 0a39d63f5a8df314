"""Runs the linear scan's native kernels."""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.linear_scan.meta import LinearScanInputs, backward_outputs, forward_outputs
from wmkernels.native_call import DTYPE_CODES, Members, output, run


def _members(inputs: LinearScanInputs) -> Members:
    gates = inputs.gates
    batch, channels, time = gates.shape
    dtype = gates.dtype
    return {
        "batch": batch,
        "channels": channels,
        "time": time,
        "dtype": DTYPE_CODES[dtype],
        "reverse": int(inputs.reverse),
        "gates": (gates, gates.shape, dtype),
        "initial_state": (inputs.initial_state, (batch, channels), state_dtype(dtype)),
        "reset": (inputs.reset, (batch, time), torch.bool),
    }


def forward(inputs: LinearScanInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    gates = inputs.gates
    out, last_state = forward_outputs(inputs)
    members = _members(inputs)
    members["tokens"] = (inputs.tokens, gates.shape, gates.dtype)
    members["out"] = output(out)
    members["last_state"] = output(last_state)
    run("linear_scan_forward", members, gates.device)
    return out, last_state


def backward(
    grad_out: Tensor, grad_last_state: Tensor | None, inputs: LinearScanInputs, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``meta.backward_outputs``."""
    shape, dtype = inputs.gates.shape, inputs.gates.dtype
    members = _members(inputs)
    members["out"] = (out, shape, dtype)
    members["grad_out"] = (grad_out, shape, dtype)
    members["grad_last_state"] = (grad_last_state, tuple(shape[:2]), state_dtype(dtype))
    gradients = backward_outputs(inputs)
    for name, gradient in zip(("gates", "tokens", "initial_state"), gradients, strict=True):
        members[f"grad_{name}"] = output(gradient)
    run("linear_scan_backward", members, inputs.gates.device)
    return gradients
