"""Hands the tensors of a selective scan to the C++ (CPU) and CUDA kernels: allocation, pointers, the call."""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.pointers import DTYPE_CODES, Expected, Members, call, launch, native, output, placement
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
    call("selective_scan_forward", "selective_scan", members, u.device)
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
    call("selective_scan_backward", "selective_scan", members, u.device)
    return gradients


def step_at_once(tensors: tuple[Tensor | None, ...], delta_softplus: bool) -> bool:
    """One step on a CPU in one call, from float32 or float64 tensors that fit; else False, and nothing is done.

    ``tensors`` are state_in, state_out, out, u, delta, A, B, C, D, z, delta_bias and reset; B and C (batch, state).
    """
    done: bool = native.cpu_selective_step_at_once(tensors, delta_softplus, torch.get_num_threads())
    return done


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
    """One step; writes ``state_out``, which may be ``state_in``, and returns the output (batch, channels).

    B and C are (batch, groups, state). A step takes a few microseconds, so this does no more than it must.
    """
    batch, channels = activation = u.shape
    states = state_in.shape
    dtype, device, held = u.dtype, u.device, state_in.dtype
    parameter = torch.float64 if dtype is torch.float64 else torch.float32
    per_channel = (channels,)
    projection = (batch, B.shape[1], states[2])
    out = u.new_empty(activation)
    members: Members = {
        "batch": batch,
        "channels": channels,
        "state": states[2],
        "groups": B.shape[1],
        "states": states[0],
        "dtype": DTYPE_CODES[dtype],
        "state_dtype": DTYPE_CODES[held],
        "delta_softplus": delta_softplus,
        "state_in": (state_in, (states[0], channels, states[2]), held),
        "state_out": (state_out, states, held),
        "u": (u, activation, dtype),
        "delta": (delta, activation, dtype),
        "A": (A, (channels, states[2]), parameter),
        "B": (B, projection, dtype),
        "C": (C, projection, dtype),
        "D": (D, per_channel, parameter),
        "z": (z, activation, dtype),
        "delta_bias": (delta_bias, per_channel, parameter),
        "reset": (reset, (batch,), torch.bool),
        "indices": (indices, (batch,), torch.int64),
        "out": (out, activation, dtype),
    }
    members.update(placement(device))
    launch("selective_step", "selective_step", members, device)
    return out
