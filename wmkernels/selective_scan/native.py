"""Runs the selective scan's native kernels."""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.native_call import DTYPE_CODES, Expected, Members, output, run
from wmkernels.selective_scan.meta import DIFFERENTIABLE, ScanInputs, backward_outputs, chunk_count, forward_outputs


def _members(inputs: ScanInputs, chunk: int) -> Members:
    u, A = inputs.u, inputs.A
    batch, channels, time = activation = u.shape
    state = A.shape[1]
    dtype, parameter = u.dtype, state_dtype(u.dtype)
    groups, sequences = inputs.groups, inputs.sequences
    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous()

    def projection(x: Tensor) -> Expected:
        return (x, (batch, groups, state, time), dtype) if x.dim() == 4 else (x, (channels, state), parameter)

    return {
        "batch": batch,
        "channels": channels,
        "state": state,
        "time": time,
        "groups": groups,
        "sequences": sequences,
        "chunk": chunk,
        "dtype": DTYPE_CODES[dtype],
        "delta_softplus": int(inputs.delta_softplus),
        "B_varies": int(inputs.B.dim() == 4),
        "C_varies": int(inputs.C.dim() == 4),
        "u": (u, activation, dtype),
        "delta": (inputs.delta, activation, dtype),
        "A": (A, (channels, state), parameter),
        "B": projection(inputs.B),
        "C": projection(inputs.C),
        "D": (inputs.D, (channels,), parameter),
        "z": (inputs.z, activation, dtype),
        "delta_bias": (inputs.delta_bias, (channels,), parameter),
        "initial_state": (inputs.initial_state, (sequences, channels, state), parameter),
        "reset": (inputs.reset, (batch, time), torch.bool),
        "cu_seqlens": (cu_seqlens, (sequences + 1,), torch.int64),
    }


def forward(inputs: ScanInputs, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``meta.forward_outputs``."""
    outputs = forward_outputs(inputs, chunk)
    members = _members(inputs, chunk or inputs.u.shape[2])
    for name, tensor in zip(("out", "last_state", "chunk_states"), outputs, strict=True):
        members[name] = output(tensor)
    run("selective_scan_forward", members, inputs.u.device)
    return outputs


def backward(
    grad_out: Tensor, grad_last_state: Tensor | None, inputs: ScanInputs, chunk_states: Tensor, chunk: int
) -> tuple[Tensor, ...]:
    """As ``meta.backward_outputs``."""
    members = _members(inputs, chunk)
    u, A = inputs.u, inputs.A
    members["chunk_states"] = (chunk_states.contiguous(), (chunk_count(inputs, chunk), *A.shape), A.dtype)
    members["grad_out"] = (grad_out, u.shape, u.dtype)
    members["grad_last_state"] = (grad_last_state, (inputs.sequences, *A.shape), A.dtype)
    gradients = backward_outputs(inputs)
    for name, gradient in zip(ScanInputs._fields[:DIFFERENTIABLE], gradients, strict=True):
        members[f"grad_{name}"] = output(gradient)
    run("selective_scan_backward", members, u.device)
    return gradients
