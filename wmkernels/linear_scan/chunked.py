"""The linear scan in chunks (``wmkernels/chunked.py``)."""

import torch
from torch import Tensor

from wmkernels import chunked
from wmkernels.checks import state_dtype
from wmkernels.linear_scan.meta import LinearScanInputs


def linear_scan_chunked(inputs: LinearScanInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    gates, tokens, initial_state, reset, reverse, _ = inputs
    assert tokens is not None
    batch, channels, time = gates.shape
    dtype = state_dtype(gates.dtype)
    state = gates.new_zeros((batch, channels), dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if time == 0:
        return gates.clone(), state.clone()
    gates, tokens = gates.permute(2, 0, 1), tokens.permute(2, 0, 1)
    resets = None if reset is None else reset.t()[..., None]
    if reverse:
        gates, tokens = gates.flip(0), tokens.flip(0)
        if resets is not None:
            # A reset at t + 1 cuts h_{t+1} from h_t.
            resets = torch.cat([torch.zeros_like(resets[:1]), resets.flip(0)[:-1]])
    steps = chunked.steps_per_chunk(batch * channels * dtype.itemsize)
    outputs = []
    for start in range(0, time, steps):
        chunk = slice(start, start + steps)
        flags = None if resets is None else resets[chunk]
        out, state = chunked.recomputed(_scan_chunk, gates[chunk], tokens[chunk], state, flags)
        outputs.append(out)
    out = torch.cat(outputs)
    if reverse:
        out = out.flip(0)
        if reset is not None:
            state = state.masked_fill(reset[:, :1], 0)
    return out.permute(1, 2, 0), state


def _scan_chunk(gates: Tensor, tokens: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    states = chunked.affine_scan(gates.to(state.dtype), tokens.to(state.dtype), state, reset)
    return states.to(gates.dtype), states[-1]
