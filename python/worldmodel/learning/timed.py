"""Trainings that end by their minutes or updates, and the rates of their optimizers on the way."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from worldmodel.learning.interval import CLOCKS, Clock
from worldmodel.runs.fields import Bounds, Checked, Limit, Positive, Seed, Share

Rate = Annotated[float, Bounds(0, 10, above=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedConfig(Checked):
    """Settings of every training that ends by its minutes or updates.

    Attributes:
        minutes: of training.
        clock: of ``minutes``, "wall", or "cpu" for processor time.
        updates: at most, if given.
        seed: of weights and data.
    """

    minutes: Positive = 1.0
    clock: Clock = "wall"
    updates: Limit | None = None
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledConfig(TimedConfig):
    """Settings of AdamW as well, for ``scheduled_step``.

    Attributes:
        lr: of AdamW, after ``warmup`` updates, until it falls to 2% of that.
        warmup: updates.
        cooldown: last share of the training, in which the rate falls.
        weight_decay: of AdamW.
        max_grad_norm: of the gradients of each optimizer together.
    """

    lr: Rate = 2e-3
    warmup: Limit = 50
    cooldown: Annotated[float, Bounds(0, 1, above=True)] = 0.5
    weight_decay: Share = 0.01
    max_grad_norm: Positive = 1.0


class Timed:
    """A training.

    Args:
        limits: at which it ends.

    Attributes:
        updates: so far.
        seconds: of training, by the limits' clock.
    """

    def __init__(self, limits: TimedConfig) -> None:
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


def set_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
    """The gradient of ``loss``, into ``parameters`` alone: others that it reaches, such as an opponent's, keep theirs.

    The graph stays for another loss; a parameter that the loss does not reach has no gradient.

    Example:
        >>> ours, theirs = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
        >>> set_gradients([ours], ours * theirs)
        >>> ours.grad, theirs.grad
        (tensor(3.), None)
    """
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def scheduled_step(
    optimizer: torch.optim.Optimizer, schedule: ScheduledConfig, updates: int, progress: float, name: str = ""
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
