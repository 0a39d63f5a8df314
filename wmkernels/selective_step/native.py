"""Runs native step kernels."""

import torch
from torch import Tensor

from wmkernels.native_call import DTYPE_CODES, Members, native, run
from wmkernels.selective_step.meta import StepInputs


def step_fast_path(tensors: tuple[Tensor | None, ...], delta_softplus: bool) -> bool:
    """One CPU step; False if the extension declines.

    ``tensors``: state_in, state_out, out, u, delta, A, B, C, D, z, delta_bias, reset; B and C (batch, state).
    """
    done: bool = native.cpu_selective_step_fast_path(tensors, torch.get_num_threads(), delta_softplus)
    return done


def step(inputs: StepInputs, state_out: Tensor, indices: Tensor | None) -> Tensor:
    """Writes ``state_out``, which may be ``inputs.state``; returns the output (batch, channels)."""
    state_in, u, delta, A, B, C, D, z, delta_bias, reset, delta_softplus = inputs
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
