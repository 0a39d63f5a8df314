"""Runs the SSD scan's native kernels."""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.native_call import DTYPE_CODES, Members, output, run
from wmkernels.ssd_scan.meta import (
    DIFFERENTIABLE,
    SSDInputs,
    backward_outputs,
    forward_outputs,
    state_count,
)


def _members(inputs: SSDInputs, chunk: int, kept: int) -> Members:
    x, B = inputs.x, inputs.B
    batch, time, heads, d = x.shape
    dtype, held = x.dtype, state_dtype(x.dtype)
    per_head = (batch, time, heads)
    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous()
    return {
        "batch": batch,
        "time": time,
        "heads": heads,
        "d": d,
        "groups": B.shape[2],
        "n": B.shape[3],
        "sequences": inputs.sequences,
        "chunk": chunk,
        "kept_interval": kept,
        "dtype": DTYPE_CODES[dtype],
        "x": (x, x.shape, dtype),
        "gate": (inputs.gate, per_head, held),
        "weight": (inputs.weight, per_head, held),
        "B": (B, B.shape, dtype),
        "C": (inputs.C, B.shape, dtype),
        "own_weight": (inputs.own_weight, per_head, held),
        "D": (inputs.D, (heads, d), held),
        "z": (inputs.z, x.shape, dtype),
        "initial_state": (inputs.initial_state, inputs.state_shape, held),
        "reset": (inputs.reset, (batch, time), torch.bool),
        "cu_seqlens": (cu_seqlens, (inputs.sequences + 1,), torch.int64),
    }


def forward(inputs: SSDInputs, chunk: int, kept: int) -> tuple[Tensor, ...]:
    """As ``meta.forward_outputs``."""
    outputs = forward_outputs(inputs, kept)
    members = _members(inputs, chunk, kept or chunk)
    for name, tensor in zip(("out", "last_state", "chunk_states"), outputs, strict=True):
        members[name] = output(tensor)
    run("ssd_scan_forward", members, inputs.x.device)
    return outputs


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    inputs: SSDInputs,
    chunk_states: Tensor,
    chunk: int,
    kept: int,
) -> tuple[Tensor, ...]:
    """As ``meta.backward_outputs``."""
    x, shape = inputs.x, inputs.state_shape
    _, heads, d, n = shape
    held = state_dtype(x.dtype)
    members = _members(inputs, chunk, kept)
    rows = state_count(inputs, kept)
    members["chunk_states"] = (chunk_states.contiguous(), (rows, heads, n, d), held)
    members["grad_out"] = (grad_out, x.shape, x.dtype)
    members["grad_last_state"] = (grad_last_state, shape, held)
    gradients = backward_outputs(inputs)
    for name, gradient in zip(SSDInputs._fields[:DIFFERENTIABLE], gradients, strict=True):
        members[f"grad_{name}"] = output(gradient)
    run("ssd_scan_backward", members, x.device)
    return gradients
