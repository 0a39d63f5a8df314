"""Hands the tensors of a selective scan to the C++ (CPU) and CUDA kernels: allocation, pointers, the call."""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.pointers import DTYPE_CODES, Members, call, kernel, output, placement, view, words
from wmkernels.selective_scan.outputs import backward_outputs, forward_outputs, sequence_count


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
    op = "selective_scan"
    batch, channels, time = u.shape
    state = A.shape[1]
    dtype, parameter, device = u.dtype, state_dtype(u.dtype), u.device
    groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
    sequences = sequence_count(u, cu_seqlens)

    def projection(name: str, x: Tensor) -> tuple[int, ...]:
        if x.dim() == 4:
            return view(op, name, x, (batch, groups, state, time), dtype, device)
        return view(op, name, x, (channels, state), parameter, device)

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
        "u": view(op, "u", u, (batch, channels, time), dtype, device),
        "delta": view(op, "delta", delta, (batch, channels, time), dtype, device),
        "A": view(op, "A", A, (channels, state), parameter, device),
        "B": projection("B", B),
        "C": projection("C", C),
        "D": view(op, "D", D, (channels,), parameter, device),
        "z": view(op, "z", z, (batch, channels, time), dtype, device),
        "delta_bias": view(op, "delta_bias", delta_bias, (channels,), parameter, device),
        "initial_state": view(op, "initial_state", initial_state, (sequences, channels, state), parameter, device),
        "reset": view(op, "reset", reset, (batch, time), torch.bool, device),
        "cu_seqlens": view(op, "cu_seqlens", cu_seqlens, (sequences + 1,), torch.int64, device),
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
    op = "selective_scan"
    members["out"] = output(op, out)
    members["last_state"] = output(op, last_state)
    members["chunk_states"] = output(op, chunk_states)
    call("selective_scan_forward", op, members, u.device)
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
    op, parameter, device = "selective_scan", A.dtype, u.device
    members["chunk_states"] = view(op, "chunk_states", chunk_states, chunk_states.shape, parameter, device)
    members["grad_out"] = view(op, "grad_out", grad_out, u.shape, u.dtype, device)
    last_shape = (sequence_count(u, cu_seqlens), *A.shape)
    members["grad_last_state"] = view(op, "grad_last_state", grad_last_state, last_shape, parameter, device)
    gradients = backward_outputs(u, A, B, C, D, z, delta_bias, initial_state, channel_last)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    for name, gradient in zip(names, gradients, strict=True):
        members[f"grad_{name}"] = output(op, gradient)
    call("selective_scan_backward", op, members, device)
    return gradients


def step(
    state_in: Tensor,
    state_out: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    reset: Tensor | None,
    indices: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """One step; writes ``state_out``, which may be ``state_in``, and returns the output (batch, channels)."""
    op = "selective_step"
    batch, channels = u.shape
    states, _, state = state_in.shape
    groups = B.shape[1]
    dtype, parameter, device = u.dtype, state_dtype(u.dtype), u.device
    out = torch.empty((batch, channels), dtype=dtype, device=device)
    members: Members = {
        "batch": batch,
        "channels": channels,
        "state": state,
        "groups": groups,
        "states": states,
        "dtype": DTYPE_CODES[dtype],
        "state_dtype": DTYPE_CODES[state_in.dtype],
        "delta_softplus": int(delta_softplus),
        "state_in": view(op, "state", state_in, (states, channels, state), state_in.dtype, device),
        "state_out": view(op, "new state", state_out, (states, channels, state), state_in.dtype, device),
        "u": view(op, "u", u, (batch, channels), dtype, device),
        "delta": view(op, "delta", delta, (batch, channels), dtype, device),
        "A": view(op, "A", A, (channels, state), parameter, device),
        "B": view(op, "B", B, (batch, groups, state), dtype, device),
        "C": view(op, "C", C, (batch, groups, state), dtype, device),
        "D": view(op, "D", D, (channels,), parameter, device),
        "z": view(op, "z", z, (batch, channels), dtype, device),
        "delta_bias": view(op, "delta_bias", delta_bias, (channels,), parameter, device),
        "reset": view(op, "reset", reset, (batch,), torch.bool, device),
        "indices": view(op, "indices", indices, (batch,), torch.int64, device),
        "out": view(op, "out", out, (batch, channels), dtype, device),
        **placement(device),
    }
    kernel(op, device)(words(op, members))
    return out
