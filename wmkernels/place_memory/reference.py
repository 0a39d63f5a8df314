"""The place memory as a loop: the specification.

The key of a place at offset o from the observer is k = [cos(w . o), sin(w . o)] over frequencies w, scaled. At the
observer's angle a it is turned: [cos(w . o + a), sin(w . o + a)]. With K_t the turned keys after the move of step t,
K_0 those at the start, and one column per channel:

    e_t = v_t - K_{t-1} h_{t-1}                              what a delta write changes; an additive write has e_t = v_t
    h_t = h_{t-1} + K_{t-1}^T M (gate_t e_t)                 M = (K K^T)^-1, the same for every angle; 1 for additive
    y_t = K_t h_t                                            what the map holds around the new position

Keys turn, the map does not (a unitary diagonal recurrence in the frame of its own rotation, with the delta rule of
Schlag et al. 2021, arXiv 2102.11174, for a whole view at once). reset[t] empties the map and turns the keys back before
step t.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wmkernels.checks import no_autocast, state_dtype
from wmkernels.packed import by_sequence
from wmkernels.place_memory.meta import PlaceMemoryInputs


def turned(keys: Tensor, phase: Tensor) -> Tensor:
    """(..., places, 2 frequencies): keys (places, 2 frequencies) at ``phase`` (..., 2 frequencies)."""
    cos, sin = phase[..., None, :].chunk(2, -1)
    c, s = keys.chunk(2, -1)
    return torch.cat([c * cos - s * sin, s * cos + c * sin], -1)


def split_groups(x: Tensor, groups: int) -> Tensor:
    """(..., places, channels) -> (..., groups, places, channels / groups)."""
    return x.unflatten(-1, (groups, -1)).transpose(-2, -3)


def merge_groups(x: Tensor) -> Tensor:
    """Inverse of ``split_groups``."""
    return x.transpose(-2, -3).flatten(-2)


def first_of(inputs: PlaceMemoryInputs) -> tuple[Tensor, Tensor]:
    """Initial state and phase."""
    dtype = state_dtype(inputs.values.dtype)
    state, phase = inputs.initial_state, inputs.initial_phase
    if state is None:
        state = torch.zeros(inputs.state_shape, dtype=dtype, device=inputs.values.device)
    if phase is None:
        phase = unturned(inputs.phase.new_empty((inputs.sequences, *inputs.phase.shape[2:])))
    return state.to(dtype), phase.to(dtype)


def unturned(phase: Tensor) -> Tensor:
    """The phase of angle zero, as ``phase``."""
    cos, sin = phase.detach().chunk(2, -1)
    return torch.cat([torch.ones_like(cos), torch.zeros_like(sin)], -1)


def place_memory_reference(inputs: PlaceMemoryInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    if inputs.cu_seqlens is not None:
        return each_sequence(place_memory_reference, inputs)
    values, groups = inputs.values, inputs.groups
    state, phase = first_of(inputs)  # (batch, groups, 2 frequencies, channels), (batch, groups, 2 frequencies)
    outputs = []
    with no_autocast(values.device):
        for t in range(values.shape[1]):
            if inputs.reset is not None:
                reset = inputs.reset[:, t, None, None]
                state = state.masked_fill(reset[..., None], 0)
                phase = torch.where(reset, unturned(phase), phase)
            keys = turned(inputs.keys, phase)  # (batch, groups, places, 2 frequencies)
            written = split_groups(values[:, t].to(state.dtype), groups)
            if inputs.inverse is not None:
                written = written - keys @ state
            if inputs.gate is not None:
                written = written * inputs.gate[:, t].mT[..., None]
            if inputs.inverse is not None:
                written = inputs.inverse @ written
            state = state + keys.mT @ written
            phase = inputs.phase[:, t]
            outputs.append(merge_groups(turned(inputs.keys, phase) @ state))
    if not outputs:
        return values.clone(), state.clone()
    return torch.stack(outputs, 1).to(values.dtype), state


def each_sequence(
    run: Callable[[PlaceMemoryInputs], tuple[Tensor, Tensor]], inputs: PlaceMemoryInputs
) -> tuple[Tensor, Tensor]:
    """``run`` for each packed sequence."""
    timed, firsts = ("values", "phase", "gate", "reset"), ("initial_state", "initial_phase")
    return by_sequence("place_memory", run, inputs, timed, firsts, 1)
