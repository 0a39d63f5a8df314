"""The selective scan by ``wmkernels/chunked.py``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels import chunked
from wmkernels.checks import require_sequences, state_dtype
from wmkernels.selective_scan.meta import ScanInputs


def selective_scan_chunked(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens, delta_softplus, _ = inputs
    batch, channels, time = u.shape
    dtype = state_dtype(u.dtype)
    state = u.new_zeros((batch, *A.shape), dtype=dtype)
    packing = None
    resets = None if reset is None else reset.t()
    if cu_seqlens is not None:
        require_sequences("selective_scan", cu_seqlens, time)
        packing = _Packing(cu_seqlens.tolist(), initial_state, u)
    elif initial_state is not None:
        state = initial_state.to(dtype)
    steps = chunked.steps_per_chunk(batch * channels * A.shape[1] * dtype.itemsize)
    outputs, ends = [], []
    for start in range(0, time, steps):
        end = min(start + steps, time)

        def chunk(x: Tensor | None, start: int = start, end: int = end) -> Tensor | None:
            return x if x is None or x.dim() == 2 else x[..., start:end].movedim(-1, 0)

        flags = None if resets is None else resets[start:end]
        boundaries = (None, None, None, None) if packing is None else packing.chunk(start, end)
        varying = (chunk(u), chunk(delta), chunk(B), chunk(C), chunk(z))
        out, state, last = chunked.recomputed(
            _scan_chunk, *varying, A, D, delta_bias, delta_softplus, state, flags, *boundaries
        )
        outputs.append(out)
        ends.append(last)
    last_state = state if packing is None else packing.last_state(ends, state)
    if not outputs:
        return u.clone(), last_state.clone()
    return torch.cat(outputs).permute(1, 2, 0), last_state


def _scan_chunk(
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor,
    reset: Tensor | None,
    first: Tensor | None,
    starts: Tensor | None,
    initial_states: Tensor | None,
    lasts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, last state, sequence-end states); u (steps, batch, channels)."""
    dtype = state.dtype
    x, step = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias
    if delta_softplus:
        # Contiguous, because softplus_backward's fake has wrong strides for mixed layouts.
        step = F.softplus(step.contiguous())
    flags = None if reset is None else reset[..., None, None]
    if flags is None:
        exponent = step[..., None] * A
    else:
        # A, too: an infinite one times the exponent's gradient of zero would be NaN
        exponent = (step[..., None] * torch.where(flags, 0, A)).masked_fill(flags, 0)
    decay = torch.exp(exponent)
    inputs = (step * x)[..., None] * _per_channel(B, u.shape[2]).to(dtype)
    if initial_states is not None and starts is not None:
        factors, states = decay[starts, 0], initial_states
        if flags is not None:
            factors, states = (v.masked_fill(flags[starts, 0], 0) for v in (factors, states))
        inputs = inputs.index_copy(0, starts, torch.addcmul(inputs[starts, 0], factors, states)[:, None])
    if first is not None:
        flags = first[:, None, None, None] if flags is None else flags | first[:, None, None, None]
    states = chunked.affine_scan(decay, inputs, state, flags)
    y = (states * _per_channel(C, u.shape[2]).to(dtype)).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), states[-1], None if lasts is None else states[lasts, 0]


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """(steps, batch, groups, state) -> (steps, batch, channels or 1, state)."""
    if x.dim() == 2 or x.shape[2] == 1:
        return x
    return x.repeat_interleave(channels // x.shape[2], 2)


class _Packing:
    """Packed sequences: one row with resets."""

    def __init__(self, bounds: Sequence[int], initial_state: Tensor | None, u: Tensor) -> None:
        self.device, self.initial_state = u.device, initial_state
        self.sequences = len(bounds) - 1
        self.occupied = [k for k in range(self.sequences) if bounds[k] < bounds[k + 1]]
        self.bounds = bounds

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def chunk(self, start: int, end: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """(first-step flags, first steps, initial states, last steps)."""
        starting = [k for k in self.occupied if start <= self.bounds[k] < end]
        positions = self._index([self.bounds[k] - start for k in starting])
        first = torch.zeros(end - start, dtype=torch.bool, device=self.device).index_fill(0, positions, True)
        lasts = self._index(
            [self.bounds[k + 1] - 1 - start for k in self.occupied if start < self.bounds[k + 1] <= end]
        )
        if self.initial_state is None or not starting:
            return first, None, None, lasts
        return first, positions, self.initial_state[self._index(starting)], lasts

    def last_state(self, ends: Sequence[Tensor], like: Tensor) -> Tensor:
        """(sequences, channels, state)."""
        kept = self.initial_state
        if kept is None:
            kept = like.new_zeros((self.sequences, *like.shape[1:]))
        if not self.occupied:
            return kept.to(like.dtype)
        return kept.to(like.dtype).index_copy(0, self._index(self.occupied), torch.cat(list(ends)))
