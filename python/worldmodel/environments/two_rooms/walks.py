"""Walks, starts and goals as PLDM and EB-JEPA publish them, drawn anew: their recorded data are not used.

A walk starts anywhere in free space with a random heading, which changes by von Mises noise from step to step; steps
have truncated normal lengths. A share of ``crossing`` walks is laid through the door instead: two walks begin in it,
one to each side, and the first, as far as it meets no wall, is walked backwards. A start and a goal lie in different
rooms.
"""

import dataclasses
import math
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from worldmodel.environments.two_rooms.moves import (
    BORDER,
    HALF_DOOR,
    HALF_WALL,
    HIGH,
    LOW,
    MARGIN,
    SIDE,
    Layouts,
    is_free,
    travel,
)
from worldmodel.environments.two_rooms.pictures import DOT_STD
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Share, Unit

_STEP_MEAN, _STEP_STD, _STEP_LOW, LONGEST_STEP = 1.0, 0.4, 0.2, 1.8  # pixels
_DOOR_STD = 1.4  # pixels, of a crossing's place in the door


@dataclasses.dataclass(frozen=True)
class WalkConfig(Checked):
    """How walks are drawn.

    Attributes:
        angle_noise: reciprocal of the von Mises concentration of a heading's change; EB-JEPA has .2.
        crossing: share of walks through the door; published values are .1 to .6.
        bumping: share of walks that head for the inner wall, beside the door; 0 as published.
    """

    angle_noise: Annotated[float, Bounds(0.01, 100), Unit("radians squared")] = 0.2
    crossing: Share = 0.35
    bumping: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crossing + self.bumping > 1:
            raise ConfigurationError(
                f"WalkConfig: crossing is {self.crossing} and bumping {self.bumping}, expected a sum of at most 1"
            )


@dataclasses.dataclass(frozen=True)
class Walks:
    """Recorded walks.

    Attributes:
        positions: pixels, float32 (walks, steps + 1, 2).
        moves: asked for, pixels, float32 (walks, steps, 2).
        layouts: (walks,).
    """

    positions: Tensor
    moves: Tensor
    layouts: Layouts


def sample_walks(random: np.random.Generator, layouts: Layouts, steps: int, config: WalkConfig) -> Walks:
    """A walk of ``steps`` in each of ``layouts``; raises ValueError for less than one step.

    Example:
        >>> random = np.random.default_rng(0)
        >>> walks = sample_walks(random, Layouts.sampled(random, 16), 90, WalkConfig())
        >>> walks.positions.shape, walks.moves.shape
        (torch.Size([16, 91, 2]), torch.Size([16, 90, 2]))
    """
    if steps < 1:
        raise ValueError(f"sample_walks: steps is {steps}, expected at least 1")
    count = len(layouts.wall)
    kind = random.random(count)
    crossing, bumping = kind < config.crossing, kind >= 1 - config.bumping
    walls, doors = layouts.wall.numpy(), layouts.door.numpy()
    side = np.where(random.random(count) < 0.5, -1.0, 1.0)  # of the wall that the walk goes to, or bumps into
    first = random.uniform(0, 2 * math.pi, count)
    quarter = (random.random(count) - 0.5) * math.pi / 2
    first = np.where(crossing | bumping, np.where(side > 0, 0, math.pi) + quarter * np.where(bumping, 1.6, 1), first)
    forth, back = (_steps(random, _headings(random, first, steps, config)) for _ in range(2))  # (count, steps, 2)
    at = random.integers(1, steps, count) if steps > 1 else np.ones(count, np.int64)  # step at the door or the wall
    half = HALF_DOOR - MARGIN
    in_door = _truncated_normal(random, (count,), 0, _DOOR_STD, -half, half)
    place = np.stack([walls + random.uniform(-HALF_WALL, HALF_WALL, count), doors + in_door], -1)
    if crossing.any():
        at = np.where(crossing, np.minimum(at, _free_steps(place, -back, layouts)), at)
    index = np.arange(steps) - at[:, None]
    before = (index < 0)[..., None]
    through = np.where(before, _taken(back, -index - 1), _taken(forth, index))
    moves = np.where(crossing[:, None, None], through, forth)
    near_door = doors + random.normal(0, 6, count)
    bump_at = np.where(random.random(count) < 0.5, random.uniform(LOW, HIGH, count), near_door).clip(LOW, HIGH)
    wall_side = walls - side * (HALF_WALL + 0.5)
    place = np.where(bumping[:, None], np.stack([wall_side, bump_at], -1), place)
    laid = (place - (moves * before).sum(1)).clip(LOW, HIGH)
    other_side = bumping & (np.sign(laid[:, 0] - walls) == side)
    laid[:, 0] = np.where(other_side, wall_side, laid[:, 0])
    starts = np.where((crossing | bumping)[:, None], laid, random.uniform(LOW, HIGH, (count, 2)))
    positions = _freed(torch.from_numpy(starts).float(), layouts, random)
    steps_taken = torch.from_numpy(moves).float()
    return Walks(travel(positions, steps_taken, layouts), steps_taken, layouts)


def sample_tasks(random: np.random.Generator, layouts: Layouts) -> tuple[Tensor, Tensor]:
    """Starts and goals in different rooms, two standard deviations of the dot from all walls: float32 (count, 2)."""
    count, padding = len(layouts.wall), 2 * DOT_STD
    low, high = BORDER - 1 + padding, SIDE - BORDER - padding
    walls = layouts.wall.numpy()
    left = random.uniform(low, walls - HALF_WALL - padding)
    right = random.uniform(walls + HALF_WALL + padding, high)
    heights = random.uniform(low, high, (2, count))
    ends = torch.from_numpy(np.stack([np.stack([left, heights[0]], -1), np.stack([right, heights[1]], -1)])).float()
    swapped = torch.from_numpy(random.random(count) < 0.5)[:, None]
    return torch.where(swapped, ends[1], ends[0]), torch.where(swapped, ends[0], ends[1])


def _headings(random: np.random.Generator, first: np.ndarray, steps: int, config: WalkConfig) -> np.ndarray:
    noise = random.vonmises(0, 1 / config.angle_noise, (len(first), steps))
    noise[:, 0] = 0
    return first[:, None] + noise.cumsum(1)


def _steps(random: np.random.Generator, headings: np.ndarray) -> np.ndarray:
    lengths = _truncated_normal(random, headings.shape, _STEP_MEAN, _STEP_STD, _STEP_LOW, LONGEST_STEP)
    return np.stack([np.cos(headings), np.sin(headings)], -1) * lengths[..., None]


def _taken(steps: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(steps, index.clip(0)[..., None], 1)


def _free_steps(starts: np.ndarray, moves: np.ndarray, layouts: Layouts) -> np.ndarray:
    """How many of ``moves`` (count, steps, 2) are taken before one meets a wall: int64 (count,)."""
    path = travel(torch.from_numpy(starts), torch.from_numpy(moves), layouts).numpy()
    free = np.abs(path[:, 1:] - path[:, :-1] - moves).max(-1) < 1e-6
    return np.logical_and.accumulate(free, 1).sum(1)


def _truncated_normal(
    random: np.random.Generator, shape: tuple[int, ...], mean: float, std: float, low: float, high: float
) -> np.ndarray:
    """By the inverse of its distribution function."""
    ends = torch.special.ndtr(torch.tensor([(low - mean) / std, (high - mean) / std], dtype=torch.float64)).numpy()
    quantiles = torch.special.ndtri(torch.from_numpy(random.uniform(ends[0], ends[1], shape)))
    return (mean + std * quantiles.numpy()).clip(low, high)


def _freed(positions: Tensor, layouts: Layouts, random: np.random.Generator) -> Tensor:
    """``positions`` (count, 2), those in the inner wall moved beside it."""
    side = torch.from_numpy(np.where(random.random(len(positions)) < 0.5, -1.0, 1.0)).float()
    beside = torch.stack([layouts.wall + side * (HALF_WALL + 2 * MARGIN), positions[:, 1]], -1)
    return torch.where(is_free(positions, layouts)[:, None], positions, beside)
