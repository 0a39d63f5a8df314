"""The place memory in PyTorch: keys of a chunk of steps are turned at once.

A step's read-out is what the next step's delta write finds, so each step multiplies the state twice, not three times.
"""

import torch
from torch import Tensor

from wmkernels import chunked
from wmkernels.checks import no_autocast
from wmkernels.place_memory.meta import PlaceMemoryInputs
from wmkernels.place_memory.reference import each_sequence, first_of, merge_groups, split_groups, turned, unturned


def place_memory_chunked(inputs: PlaceMemoryInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    if inputs.cu_seqlens is not None:
        return each_sequence(place_memory_chunked, inputs)
    values, keys, reset = inputs.values, inputs.keys, inputs.reset
    state, phase = first_of(inputs)
    if values.shape[1] == 0:
        return values.clone(), state.clone()
    steps = chunked.steps_per_chunk(phase.shape[0] * phase.shape[1] * keys.numel() * state.dtype.itemsize)
    outputs = []
    with no_autocast(values.device):
        if reset is not None:  # what was before it is in no product: it may be NaN
            first = reset[:, 0, None, None]
            phase, state = torch.where(first, unturned(phase), phase), state.masked_fill(first[..., None], 0)
        write_keys = turned(keys, phase)  # (batch, groups, places, 2 frequencies)
        held = write_keys @ state
        for start in range(0, values.shape[1], steps):
            chunk = slice(start, start + steps)
            gate, flags = (None if x is None else x[:, chunk] for x in (inputs.gate, reset))
            own = (values[:, chunk], inputs.phase[:, chunk], gate, flags)
            out, state, write_keys, held = chunked.recomputed(
                _run_chunk, *own, keys, inputs.inverse, state, write_keys, held
            )
            outputs.append(out)
    return torch.cat(outputs, 1), state


def _run_chunk(
    values: Tensor,
    phase: Tensor,
    gate: Tensor | None,
    reset: Tensor | None,
    keys: Tensor,
    inverse: Tensor | None,
    state: Tensor,
    write_keys: Tensor,
    held: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, state, keys of the next write, what they read); ``write_keys`` and ``held`` are those of the first."""
    views = split_groups(values.to(state.dtype), phase.shape[2])  # (batch, time, groups, places, channels)
    gates = None if gate is None else gate.mT[..., None]
    outputs = []
    for t, read_keys in enumerate(turned(keys, phase).unbind(1)):
        if reset is not None:
            flags = reset[:, t, None, None, None]
            write_keys = torch.where(flags, keys, write_keys)
            state, held = state.masked_fill(flags, 0), held.masked_fill(flags, 0)
        written = views[:, t] if inverse is None else views[:, t] - held
        if gates is not None:
            written = written * gates[:, t]
        if inverse is not None:
            written = inverse @ written
        state = state + write_keys.mT @ written
        held, write_keys = read_keys @ state, read_keys
        outputs.append(held)
    return merge_groups(torch.stack(outputs, 1)).to(values.dtype), state, write_keys, held
