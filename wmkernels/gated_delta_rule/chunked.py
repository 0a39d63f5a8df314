"""The gated delta rule by chunks of steps, in plain PyTorch: the WY form (Yang et al. 2024, arXiv 2406.06484).

With the keys of a chunk as rows of K, D_ij = exp(gate_{j+1} + ... + gate_i) and d_i the decay since the chunk's start,
the corrections solve a triangular system, of which all chunks' inverses are computed at once:

    (I + L) U = diag(beta) (V - diag(d) K S),   L_ij = beta_i D_ij k_i · k_j  (j < i)

Then a loop over chunks passes the state S: U = U_0 - W S, Y = A U + diag(d) Q S, S = d_C S + K^T diag(D_C) U.

Sums of gates begin anew at every j: a difference of two long sums would lose precision, and be NaN for gates of -inf.

Chunks begin at resets where these can be read. Elsewhere, in torch.func and in a trace, the steps before a reset are
masked out of its chunk: NaN among them would cross it.

Zeros above a diagonal are selected, never products: keys of one step may overflow where the recurrence does not, and
zero times infinity is NaN. On a CPU, steps that are not finite are in chunks of their own. Elsewhere NaN may reach
earlier steps of its chunk, at least the gradients of q and k.
"""

from bisect import bisect_left, bisect_right
from itertools import pairwise, repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels import chunked
from wmkernels.checks import no_autocast, require_sequences, state_dtype
from wmkernels.gated_delta_rule.meta import DeltaRuleInputs
from wmkernels.modes import can_read_values

MAX_CHUNK = 64
MAX_PADDING = 2  # padded steps per step, where resets make many short chunks


def gated_delta_rule_chunked(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    q, k, v, gate, beta, initial_state, reset, cu_seqlens, scale, _ = inputs
    dtype, time = state_dtype(v.dtype), v.shape[3]
    state = v.new_zeros(inputs.state_shape, dtype=dtype) if initial_state is None else initial_state
    if time == 0:
        return v.clone(), state.clone()
    steps = min(MAX_CHUNK, chunked.steps_per_chunk(1))
    if cu_seqlens is not None:
        require_sequences("gated_delta_rule", cu_seqlens, time)
    resets, borders = _read_resets(inputs), _not_finite(inputs)
    if cu_seqlens is None and not resets and not borders:
        chunks = _regular(time, steps, reset)
    else:
        chunks = _by_sequence(q, steps, resets, borders, reset, cu_seqlens)
    q, k, v, gate, beta = (chunks.gather(x.to(dtype)) for x in (q, k, v, gate[:, :, None], beta[:, :, None]))
    with no_autocast(q.device):
        out, state = _scan(q, k, v, gate, beta, chunks.reset, scale, state)
    return chunks.scatter(out).to(inputs.v.dtype), state


class _Chunks(NamedTuple):
    """Chunks of equally many steps, padded at their ends, and where each step is among them."""

    position: Tensor | None  # (sequences, chunks, steps), in batch * time; one behind the last for padding
    place: Tensor | None  # (batch, time), in sequences * chunks * steps
    reset: Tensor | None  # (sequences, chunks, steps)
    time: int
    steps: int

    def gather(self, x: Tensor) -> Tensor:
        """(batch, heads, size, time) -> (sequences, heads, chunks, steps, size)."""
        x = x.permute(0, 3, 1, 2)  # (batch, time, heads, size)
        if self.position is None:
            x = F.pad(x, (0, 0, 0, 0, 0, -self.time % self.steps)).unflatten(1, (-1, self.steps))
        else:
            x = F.pad(x.flatten(0, 1), (0, 0, 0, 0, 0, 1))[self.position]
        return x.permute(0, 3, 1, 2, 4)

    def scatter(self, x: Tensor) -> Tensor:
        """Inverse of ``gather``."""
        x = x.permute(0, 2, 3, 1, 4)  # (sequences, chunks, steps, heads, size)
        x = x.flatten(1, 2)[:, : self.time] if self.place is None else x.flatten(0, 2)[self.place]
        return x.permute(0, 2, 3, 1)


def _regular(time: int, steps: int, reset: Tensor | None) -> _Chunks:
    if reset is not None:
        reset = F.pad(reset, (0, -time % steps)).unflatten(1, (-1, steps))
    return _Chunks(None, None, reset, time, steps)


def _read_resets(inputs: DeltaRuleInputs) -> list[int]:
    """Steps of batch * time with a reset, where these can be read."""
    reset = inputs.reset
    if reset is None or not can_read_values(reset, on_gpu=True):
        return []
    return _true(reset)


def _not_finite(inputs: DeltaRuleInputs) -> list[int]:
    """Steps of batch * time that begin or follow a run of steps that are not finite."""
    alone = None
    for x in inputs[:5]:
        if can_read_values(x) and not x.isfinite().all():
            here = ~x.isfinite().transpose(1, -1).flatten(2).all(-1)  # (batch, time)
            alone = here if alone is None else alone | here
    return [] if alone is None else _true(alone != F.pad(alone[:, :-1], (1, 0)))


def _true(x: Tensor) -> list[int]:
    return x.flatten().nonzero()[:, 0].tolist()


def _by_sequence(
    q: Tensor, steps: int, resets: list[int], borders: list[int], reset: Tensor | None, cu_seqlens: Tensor | None
) -> _Chunks:
    """Chunks that begin with each sequence and at each of ``resets`` and ``borders``; short ones for many resets.

    What is not finite in a sequence changes no chunk of another. Of very many borders the last ones are left out.
    """
    batch, _, _, time = q.shape
    if cu_seqlens is None:
        bounds = [(row * time, (row + 1) * time) for row in range(batch)]
    else:
        bounds = list(pairwise(cu_seqlens.tolist()))
    rows = [[*pairwise([start, *_within(resets, start, end), end])] for start, end in bounds]
    longest = max([1, *(end - start for start, end in bounds)])
    while steps > 1 and steps * max(map(_count, rows, repeat(steps)), default=0) > MAX_PADDING * longest:
        steps //= 2
    most = 2 + longest // steps
    rows = [[part for a, b in row for part in pairwise([a, *_within(borders, a, b)[:most], b])] for row in rows]
    chunks = [[(t, min(t + steps, end)) for start, end in row for t in range(start, end, steps)] for row in rows]
    count = max([1, *map(len, chunks)])
    padded = [row + [(0, 0)] * (count - len(row)) for row in chunks]
    first, last = torch.tensor(padded, dtype=torch.int64).view(len(rows), count, 2, 1).unbind(2)
    position = first + torch.arange(steps)
    position = position.where(position < last, batch * time)
    place = torch.empty(batch * time + 1, dtype=torch.int64)
    place[position.flatten()] = torch.arange(position.numel())
    position, place = position.to(q.device), place[:-1].view(batch, time).to(q.device)
    flags = None if reset is None else F.pad(reset.flatten(), (0, 1))[position]
    return _Chunks(position, place, flags, time, steps)


def _within(cuts: list[int], start: int, end: int) -> list[int]:
    return cuts[bisect_right(cuts, start) : bisect_left(cuts, end)]


def _count(segments: list[tuple[int, int]], steps: int) -> int:
    """Chunks of ``steps`` that hold the segments."""
    return sum(-((start - end) // steps) for start, end in segments)


def _scan(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, reset: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, last state); inputs (sequences, heads, chunks, steps, size)."""
    steps = q.shape[3]
    later = torch.ones(steps, steps, dtype=torch.bool, device=q.device).tril(-1)  # j < i
    # [i, j]: the sum of the gates after step j up to i
    since_step = torch.where(later, gate, 0).cumsum(-2).masked_fill(later.mT, -torch.inf)
    since_start = gate.cumsum(-2)
    if reset is not None:
        episode = reset[:, None].long().cumsum(-1)  # (sequences, 1, chunks, steps)
        since_step = since_step.masked_fill(episode[..., :, None] != episode[..., None, :], -torch.inf)
        since_start = since_start.masked_fill(episode[..., None] > 0, -torch.inf)
    between, decay = since_step.exp(), since_start.exp()
    kept = decay[..., -1:, :]  # (sequences, heads, chunks, 1, 1): of the state over the whole chunk
    lower = beta * between * (k @ k.mT).tril(-1)
    right = torch.cat([beta * v, beta * decay * k], -1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    corrections, erased = solved.split([v.shape[-1], k.shape[-1]], -1)
    attention = scale * between * (q @ k.mT).tril()
    queries = scale * decay * q
    keys = (between[..., -1, :, None] * k).mT
    outputs = []
    for chunk in range(q.shape[2]):
        if reset is not None:
            state = state.masked_fill(reset[:, chunk, :1, None, None], 0)
        u = corrections[:, :, chunk] - erased[:, :, chunk] @ state
        outputs.append(_causal_product(attention[:, :, chunk], u) + queries[:, :, chunk] @ state)
        state = kept[:, :, chunk] * state + keys[:, :, chunk] @ u
    return torch.stack(outputs, 2), state


def _causal_product(lower: Tensor, x: Tensor) -> Tensor:
    """``lower @ x``, of whose rows those before an infinity or NaN in ``x`` are as without it."""
    if can_read_values(x) and x.isfinite().all():
        return lower @ x
    reached = (0 * x.detach()).sum(-1, keepdim=True).cumsum(-2).isnan()
    return torch.where(reached, lower @ x, lower @ x.nan_to_num(0.0, 0.0, 0.0))
