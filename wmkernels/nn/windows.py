"""Overlapping windows of a sequence, with a gradient of one pass per window that holds a step.

PyTorch differentiates a slice by zeros of the whole sequence, and ``unfold`` element by element: each takes several
times as long.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.modes import can_checkpoint


def sliding_windows(x: Tensor, length: int, step: int, left: int = 0, count: int | None = None) -> Tensor:
    """Windows (batch, count, length, ...) of x (batch, time, ...), zero outside it.

    There is one per ``step``, at most ``length``; the first begins ``left`` before x. By default, none ends after x.
    """
    if count is None:
        count = (left + x.shape[1] - length) // step + 1
    if torch.is_grad_enabled() and x.requires_grad and can_checkpoint():
        windows: Tensor = _Windows.apply(x, length, step, left, count)
        return windows
    return _windows(x, length, step, left, count)


def _windows(x: Tensor, length: int, step: int, left: int, count: int) -> Tensor:
    time = x.shape[1]
    first = min(-(-left // step), count)  # the windows before this one begin before x
    end = max(min((left + time - length) // step + 1, count), first)  # those from here on end after x
    parts = []
    for begin, stop in ((0, first), (first, end), (end, count)):
        if begin == stop:
            continue
        start, after = begin * step - left, (stop - 1) * step - left + length
        held = x[:, max(start, 0) : max(after, 0)]
        before = min(max(-start, 0), after - start)
        held = padded(held, before, after - start - before - held.shape[1])
        parts.append(held.unfold(1, length, step).movedim(-1, 2))
    return torch.cat(parts, 1)


def padded(x: Tensor, left: int, right: int) -> Tensor:
    """Zeros before and after the second dimension; no copy without any."""
    return F.pad(x, [0, 0] * (x.dim() - 2) + [left, right]) if left or right else x


def _sum_of_windows(windows: Tensor, step: int, left: int, time: int) -> Tensor:
    """(batch, time, ...): the sum of what the windows hold of each step."""
    batch, count, length, *rest = windows.shape
    parts = -(-length // step)
    total = windows.new_empty(batch, max(count + parts - 1, -(-(left + time) // step)), step, *rest)
    total[:, count:] = 0
    total[:, :count] = windows[:, :, :step]
    for part in range(1, parts):
        own = windows[:, :, part * step : (part + 1) * step]
        total[:, part : part + count, : own.shape[2]] += own
    return total.flatten(1, 2)[:, left : left + time]


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, step: int, left: int, count: int) -> Tensor:
        ctx.geometry, ctx.time = (length, step, left, count), x.shape[1]
        return _windows(x, length, step, left, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        found = _SumOfWindows.apply(gradients[0], ctx.geometry, ctx.time)
        return found, None, None, None, None


class _SumOfWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, windows: Tensor, geometry: tuple[int, int, int, int], time: int) -> Tensor:
        ctx.geometry = geometry
        _, step, left, _ = geometry
        return _sum_of_windows(windows, step, left, time)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Windows.apply(gradients[0], *ctx.geometry), None, None
