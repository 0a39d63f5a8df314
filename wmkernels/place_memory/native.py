"""Runs the place memory's native kernels."""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.native_call import DTYPE_CODES, Members, output, run
from wmkernels.place_memory.meta import DIFFERENTIABLE, PlaceMemoryInputs, backward_outputs, forward_outputs


def _members(inputs: PlaceMemoryInputs) -> Members:
    values = inputs.values
    batch, time, places, channels = values.shape
    groups, rows = inputs.phase.shape[2:]
    sequences, dtype, kind = inputs.sequences, values.dtype, state_dtype(values.dtype)
    bounds = None if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous()
    return {
        "batch": batch,
        "time": time,
        "places": places,
        "channels": channels,
        "groups": groups,
        "frequencies": rows // 2,
        "sequences": sequences,
        "dtype": DTYPE_CODES[dtype],
        "values": (values, values.shape, dtype),
        "phase": (inputs.phase, (batch, time, groups, rows), kind),
        "keys": (inputs.keys, (places, rows), kind),
        "inverse": (inputs.inverse, (places, places), kind),
        "gate": (inputs.gate, (batch, time, places, groups), kind),
        "initial_state": (inputs.initial_state, inputs.state_shape, kind),
        "initial_phase": (inputs.initial_phase, (sequences, groups, rows), kind),
        "reset": (inputs.reset, (batch, time), torch.bool),
        "cu_seqlens": (bounds, (sequences + 1,), torch.int64),
    }


def forward(inputs: PlaceMemoryInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As ``meta.forward_outputs``."""
    outputs = forward_outputs(inputs, keep)
    members = _members(inputs)
    for name, tensor in zip(("out", "last_state", "residual"), outputs, strict=True):
        members[name] = output(tensor)
    run("place_memory_forward", members, inputs.values.device)
    return outputs


def backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    inputs: PlaceMemoryInputs,
    residual: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, ...]:
    """As ``meta.backward_outputs``."""
    members = _members(inputs)
    values = inputs.values
    kind = state_dtype(values.dtype)
    members["grad_out"] = (grad_out, values.shape, values.dtype)
    members["grad_last_state"] = (grad_last_state, inputs.state_shape, kind)
    members["residual"] = (residual.contiguous() if residual.numel() else None, values.shape, kind)
    gradients = backward_outputs(inputs, *wanted)
    for name, gradient in zip(inputs._fields[:DIFFERENTIABLE], gradients, strict=True):
        members[f"grad_{name}"] = output(gradient)
    run("place_memory_backward", members, values.device)
    return gradients
