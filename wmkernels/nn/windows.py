"""Overlapping windows of a sequence, with a gradient of one pass per window that holds a step.

PyTorch differentiates a slice by zeros of the whole sequence, and ``unfold`` element by element: each takes several
times as long.
"""

from typing import Any

import torch
from torch import Tensor

from wmkernels.modes import can_checkpoint


def sliding_windows(x: Tensor, length: int, step: int) -> Tensor:
    """Windows (batch, count, length, ...), one per ``step``, of x (batch, (count - 1) * step + length, ...)."""
    if length == step:
        return x.unflatten(1, (-1, step))
    if torch.is_grad_enabled() and x.requires_grad and can_checkpoint():
        windows: Tensor = _Windows.apply(x, length, step)  # type: ignore[no-untyped-call]
        return windows
    return _windows(x, length, step)


def _windows(x: Tensor, length: int, step: int) -> Tensor:
    return x.unfold(1, length, step).movedim(-1, 2).contiguous()


def _sum_of_windows(windows: Tensor, step: int) -> Tensor:
    """Adds what windows (batch, count, length, ...) hold of each step of their sequence."""
    batch, count, length, *rest = windows.shape
    parts = -(-length // step)
    total = windows.new_zeros(batch, count + parts - 1, step, *rest)
    for part in range(parts):
        own = windows[:, :, part * step : (part + 1) * step]
        total[:, part : part + count, : own.shape[2]] += own
    return total.flatten(1, 2)[:, : (count - 1) * step + length]


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, step: int) -> Tensor:
        ctx.length, ctx.step = length, step
        return _windows(x, length, step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _SumOfWindows.apply(gradients[0], ctx.length, ctx.step), None, None  # type: ignore[no-untyped-call]


class _SumOfWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, windows: Tensor, length: int, step: int) -> Tensor:
        ctx.length, ctx.step = length, step
        return _sum_of_windows(windows, step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Windows.apply(gradients[0], ctx.length, ctx.step), None, None  # type: ignore[no-untyped-call]
