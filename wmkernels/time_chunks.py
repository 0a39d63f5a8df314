"""Cuts time into chunks of matrix products, for the forms in plain PyTorch.

Chunks begin with sequences, and at resets where these can be read. On a CPU, runs of steps that are not finite are in
chunks of their own: zero times infinity in a product of matrices would spread to steps before them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import require_sequences
from wmkernels.modes import can_read_values

MAX_PADDING = 2  # padded steps per step, where resets make many short chunks


class TimeChunks(NamedTuple):
    """Chunks of equally many steps, padded at their ends, and where each step is among them."""

    position: Tensor | None  # (sequences, chunks, steps), in batch * time; one behind the last for padding
    place: Tensor | None  # (batch, time), in sequences * chunks * steps
    reset: Tensor | None  # (sequences, chunks, steps)
    time: int
    steps: int

    def gather(self, x: Tensor) -> Tensor:
        """(batch, time, heads, size) -> (sequences, heads, chunks, steps, size)."""
        if self.position is None:
            x = F.pad(x, (0, 0, 0, 0, 0, -self.time % self.steps)).unflatten(1, (-1, self.steps))
        else:
            x = F.pad(x.flatten(0, 1), (0, 0, 0, 0, 0, 1))[self.position]
        return x.permute(0, 3, 1, 2, 4)

    def scatter(self, x: Tensor) -> Tensor:
        """Inverse of ``gather``."""
        x = x.permute(0, 2, 3, 1, 4)  # (sequences, chunks, steps, heads, size)
        return x.flatten(1, 2)[:, : self.time] if self.place is None else x.flatten(0, 2)[self.place]


def cut(
    op: str, inputs: Sequence[Tensor | None], steps: int, reset: Tensor | None, cu_seqlens: Tensor | None
) -> TimeChunks:
    """Chunks of ``steps`` of ``inputs``, (batch, time, ...), of which the first is not None."""
    x = inputs[0]
    assert x is not None
    batch, time = x.shape[:2]
    if cu_seqlens is not None:
        require_sequences(op, cu_seqlens, time)
    resets = _true(reset) if reset is not None and can_read_values(reset, on_gpu=True) else []
    borders = _not_finite(inputs)
    if cu_seqlens is None and not resets and not borders:
        if reset is not None:
            reset = F.pad(reset, (0, -time % steps)).unflatten(1, (-1, steps))
        return TimeChunks(None, None, reset, time, steps)
    return _by_sequence(batch, time, x.device, steps, resets, borders, reset, cu_seqlens)


def _not_finite(inputs: Sequence[Tensor | None]) -> list[int]:
    """Steps of batch * time that begin or follow a run of steps that are not finite."""
    alone = None
    for x in inputs:
        if x is not None and can_read_values(x) and not x.isfinite().all():
            here = ~x.isfinite().flatten(2).all(-1)  # (batch, time)
            alone = here if alone is None else alone | here
    return [] if alone is None else _true(alone != F.pad(alone[:, :-1], (1, 0)))


def _true(x: Tensor) -> list[int]:
    return x.flatten().nonzero()[:, 0].tolist()


def _by_sequence(
    batch: int,
    time: int,
    device: torch.device,
    steps: int,
    resets: list[int],
    borders: list[int],
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> TimeChunks:
    """Chunks that begin with each sequence and at each of ``resets`` and ``borders``; short ones for many resets.

    What is not finite in a sequence changes no chunk of another. Of very many borders the last ones are left out.
    """
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
    position, place = position.to(device), place[:-1].view(batch, time).to(device)
    flags = None if reset is None else F.pad(reset.flatten(), (0, 1))[position]
    return TimeChunks(position, place, flags, time, steps)


def _within(cuts: list[int], start: int, end: int) -> list[int]:
    return cuts[bisect_right(cuts, start) : bisect_left(cuts, end)]


def _count(segments: list[tuple[int, int]], steps: int) -> int:
    """Chunks of ``steps`` that hold the segments."""
    return sum(-((start - end) // steps) for start, end in segments)


def causal_product(lower: Tensor, x: Tensor) -> Tensor:
    """``lower @ x``, of whose rows those before an infinity or NaN in ``x`` are as without it."""
    if can_read_values(x) and x.isfinite().all():
        return lower @ x
    reached = (0 * x.detach()).sum(-1, keepdim=True).cumsum(-2).isnan()
    return torch.where(reached, lower @ x, lower @ x.nan_to_num(0.0, 0.0, 0.0))
