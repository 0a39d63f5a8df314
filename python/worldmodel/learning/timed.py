"""Trainings that end by their minutes or updates, and the rates of their optimizers on the way."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch

from worldmodel.learning.interval import CLOCKS, Clock


class Limits(Protocol):
    """Settings: minutes by a clock, and updates at most, if given."""

    @property
    def minutes(self) -> float: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def updates(self) -> int | None: ...


class Schedule(Protocol):
    """Settings of an optimizer's step."""

    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def cooldown(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...


class Timed:
    """A training.

    Args:
        limits: at which it ends.

    Attributes:
        updates: so far.
        seconds: of training, by the limits' clock.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self.updates, self.seconds = limits, 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the minutes or updates that is over."""
        limits = self._limits
        updates = 0.0 if limits.updates is None else self.updates / limits.updates
        return max(updates, self.seconds / (60 * limits.minutes))

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Counts the block's seconds, unless it raises."""
        now = CLOCKS[self._limits.clock]
        start = now()
        yield
        self.seconds += now() - start


def falling(progress: float, cooldown: float = 0.5) -> float:
    """A rate's factor: 1, and in the last ``cooldown`` of the training down to 2%."""
    return min(1.0, max(0.02, (1 - progress) / cooldown))


def scheduled_step(
    optimizer: torch.optim.Optimizer, schedule: Schedule, updates: int, progress: float, name: str = ""
) -> float:
    """Clips the gradient and steps, after ``updates`` others; returns the norm before.

    Raises:
        ArithmeticError: a gradient, of ``name``, that is not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
    if not bool(norm.isfinite()):
        subject = f"the gradient of the {name}" if name else "the gradient"
        raise ArithmeticError(
            f"{subject} is {float(norm)} after {updates:,} updates: try a smaller lr than {schedule.lr}"
        )
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr * min(1.0, (updates + 1) / schedule.warmup) * falling(progress, schedule.cooldown)
    optimizer.step()
    return float(norm)
