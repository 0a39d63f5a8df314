"""Hands the tensors of a single step to the C++ (CPU) and CUDA kernels."""

import torch
from torch import Tensor

from wmkernels.native_call import DTYPE_CODES, Members, native, run


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
    run("selective_step", members, device)
    return out
