"""A gymnasium environment of one of the grid worlds."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from worldmodel.environments.grids import MOVES, Worlds
from worldmodel.runs.fields import Bounds, Limit, checked_value
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

__all__ = ["TILE", "GridEnv", "gymnasium"]

TILE = 16  # pixels per side of a cell in ``render``
_LEFT_OUT = ("tokens", "next_tokens", "actions", "heading", "next_heading", "pixels", "next_pixels")


class GridEnv(gymnasium.Env[Any, Any]):
    """One of ``make(1, config, generator)``; an episode is a new world, truncated after ``length`` steps.

    Observes classes, uint8 (view, view), or with ``config.pixels`` a picture, uint8 (height, width, 3). ``info`` of a
    step is what ``rollout`` returns of it, without the batch's and time's dimensions, places as (view, view). With an
    own heading, ``info`` has the ``heading`` of the observation, of a reset as well.

    Attributes:
        make: of the worlds.
        config: of the worlds.
        worlds: the present one, a batch of one; gymnasium's ResetNeeded before ``reset``.
        learned_from: options of the worlds that ``train-world`` learns from, where others are not given.
    """

    learned_from: ClassVar[dict[str, Any]] = {}

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        make: Callable[[int, Any, torch.Generator | None], Worlds],
        config: Any,
        length: int,
        render_mode: str | None = None,
    ) -> None:
        self.length = checked_value(Limit, length, f"{type(self).__name__}: length")
        self.make, self.config, self.render_mode = make, config, render_mode
        self._worlds: Worlds | None = None
        self.metadata = {**self.metadata, "cells": config.names}
        side = config.view * max(config.pixels, 1)
        shape, most = ((side, side, 3), 255) if config.pixels else ((side, side), config.classes - 1)
        self.observation_space = gymnasium.spaces.Box(0, most, shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(config.actions)

    @property
    def worlds(self) -> Worlds:
        if self._worlds is None:
            raise gymnasium.error.ResetNeeded(f"{type(self).__name__}: there is no world yet: call reset first")
        return self._worlds

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        generator = torch.Generator().manual_seed(int(self.np_random.integers(2**62)))
        self._worlds = self.make(1, self.config, generator)
        self.steps = 0
        pictures = self.worlds.pictures
        first = self._observation(self.worlds.tokens[0] if pictures is None else pictures[0])
        return first, self._turned(int(self.worlds.headings))

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Raises ConfigurationError for an action that is none of ``action_space``."""
        known = Annotated[int, Bounds(0, self.config.actions - 1)]
        index = checked_value(known, action, f"{type(self).__name__}: action")
        happened = self.worlds.rollout(1, torch.tensor([[index]]))
        self.steps += 1
        info = {name: self._squared(value[0, 0].numpy()) for name, value in happened.items() if name not in _LEFT_OUT}
        if "next_heading" in happened:
            info |= self._turned(int(happened["next_heading"]))
        seen = happened["next_pixels" if self.config.pixels else "next_tokens"]
        reward = float(self.worlds.rewards(happened))
        return self._observation(seen[0]), reward, False, self.steps >= self.length, info

    def explore(self) -> int:
        """An action of the policy that explores, with the configuration's persistence."""
        return int(self.worlds.choose())

    def render(self) -> np.ndarray:
        """The whole world, bright where it is in view: uint8 (height, width, 3)."""
        picture = self.worlds.colours[self.worlds.map[0].numpy()].astype(np.float32)
        bright = np.full(picture.shape[:2], 0.4, np.float32)
        bright[tuple(self.worlds.cells()[0, 0].T.numpy())] = 1
        picture = (picture * bright[..., None]).repeat(TILE, 0).repeat(TILE, 1)
        middle = self.worlds.positions[0, 0].numpy() * TILE + (TILE - 1) / 2
        y, x = np.mgrid[: len(picture), : len(picture)]
        for colour, radius, ahead in ((0, TILE / 3, 0), (255, TILE / 4, 0), (0, TILE / 8, TILE / 8)):
            row, column = middle + ahead * MOVES[int(self.worlds.headings[0, 0])]
            picture[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = colour
        return picture.astype(np.uint8)

    def _turned(self, heading: int) -> dict[str, Any]:
        return {"heading": heading} if getattr(self.config, "own_heading", False) else {}

    def _squared(self, value: np.ndarray) -> np.ndarray:
        return value.reshape(self.config.view, -1) if value.shape == (self.config.places,) else value

    def _observation(self, seen: torch.Tensor) -> np.ndarray:
        return seen.numpy().reshape(self.observation_space.shape).astype(np.uint8)
