"""Hands the tensors of a selective scan to the C++ (CPU) and CUDA kernels: allocation, pointers, the call."""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.native_call import DTYPE_CODES, Expected, Members, output, run
from wmkernels.selective_scan.meta import backward_outputs, forward_outputs, sequence_count


def _members(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    chunk: int,
) -> Members:
    """Sizes and inputs, checked."""
    batch, channels, time = u.shape
    state = A.shape[1]
    dtype, parameter = u.dtype, state_dtype(u.dtype)
    groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
    sequences = sequence_count(u, cu_seqlens)

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
        "delta_softplus": int(delta_softplus),
        "B_varies": int(B.dim() == 4),
        "C_varies": int(C.dim() == 4),
        "u": (u, (batch, channels, time), dtype),
        "delta": (delta, (batch, channels, time), dtype),
        "A": (A, (channels, state), parameter),
        "B": projection(B),
        "C": projection(C),
        "D": (D, (channels,), parameter),
        "z": (z, (batch, channels, time), dtype),
        "delta_bias": (delta_bias, (channels,), parameter),
        "initial_state": (initial_state, (sequences, channels, state), parameter),
        "reset": (reset, (batch, time), torch.bool),
        "cu_seqlens": (cu_seqlens, (sequences + 1,), torch.int64),
    }


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    channel_last: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, last_state, chunk_states) of canonical inputs; ``chunk`` 0 saves no states."""
    out, last_state, chunk_states = forward_outputs(u, A, cu_seqlens, channel_last, chunk)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    members = _members(
        u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens, delta_softplus, chunk or u.shape[2]
    )
    members["out"] = output(out)
    members["last_state"] = output(last_state)
    members["chunk_states"] = output(chunk_states)
    run("selective_scan_forward", members, u.device)
    return out, last_state, chunk_states


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
    channel_last: bool,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state)."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    members = _members(u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens, delta_softplus, chunk)
    parameter = A.dtype
    members["chunk_states"] = (chunk_states, chunk_states.shape, parameter)
    members["grad_out"] = (grad_out, u.shape, u.dtype)
    last_shape = (sequence_count(u, cu_seqlens), *A.shape)
    members["grad_last_state"] = (grad_last_state, last_shape, parameter)
    gradients = backward_outputs(u, A, B, C, D, z, delta_bias, initial_state, channel_last)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    for name, gradient in zip(names, gradients, strict=True):
        members[f"grad_{name}"] = output(gradient)
    run("selective_scan_backward", members, u.device)
    return gradients
