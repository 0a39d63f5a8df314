"""HiddenBall: a ball passes behind a curtain.

    python -m worldmodel train --preset moving --env worldmodel/HiddenBall-v0

The ball bounces on a ``SIDE`` x ``SIDE`` map, one cell per step along each axis; its direction and hidden position must
be remembered. The actions move the curtain. The reward is the ball's visible fraction; episodes are truncated after
``LENGTH`` steps. Only the initial state is random. ``HiddenBallPixels-v0`` observes 4 x 4 grey pixels per cell.
"""

from typing import Any

import numpy as np

from worldmodel.environments.ids import register
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

SIDE = 7
BALL = 2
CURTAIN = 3
LENGTH = 48
FREE, CLOTH, LEATHER = range(3)
SHADES = np.array([0, 96, 255], np.uint8)
LEFT, STAY, RIGHT = range(3)


class HiddenBall(gymnasium.Env[Any, Any]):
    """One ball, one curtain; observes classes, or ``pixels`` per cell side in grey.

    Attributes:
        ball: int64 (2,), row and column of its upper left cell.
        flight: int64 (2,), velocity.
        curtain: its leftmost column.

    Example:
        >>> ball = HiddenBall()
        >>> first, _ = ball.reset(seed=1)
        >>> following, reward, *_ = ball.step(STAY)
        >>> following.shape, following.dtype, bool((first == following).all())
        ((7, 7, 1), dtype('uint8'), False)
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "cells": ["nothing", "curtain", "ball"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, pixels: int = 0) -> None:
        self.render_mode = render_mode
        self.pixels = pixels
        most, side = (SHADES.max(), SIDE * pixels) if pixels else (LEATHER, SIDE)
        self.observation_space = gymnasium.spaces.Box(0, most, (side, side, 1), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.ball = self.np_random.integers(0, SIDE - BALL + 1, 2)
        self.flight = self.np_random.choice([-1, 1], 2)
        self.curtain = int(self.np_random.integers(0, SIDE - CURTAIN + 1))
        self.steps = 0
        return self._observation(self.picture()), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.curtain = min(max(self.curtain + int(action) - STAY, 0), SIDE - CURTAIN)
        ahead = self.ball + self.flight
        self.flight = np.where((ahead < 0) | (ahead > SIDE - BALL), -self.flight, self.flight)
        self.ball = self.ball + self.flight
        self.steps += 1
        picture = self.picture()
        in_sight = float((picture == LEATHER).sum()) / BALL**2
        return self._observation(picture), in_sight, False, self.steps >= LENGTH, {}

    def picture(self) -> np.ndarray:
        """Classes, uint8 (``SIDE``, ``SIDE``, 1)."""
        picture = np.full((SIDE, SIDE, 1), FREE, np.uint8)
        row, column = self.ball
        picture[row : row + BALL, column : column + BALL] = LEATHER
        picture[:, self.curtain : self.curtain + CURTAIN] = CLOTH
        return picture

    def render(self) -> np.ndarray:
        """``picture`` in grey, uint8 (``SIDE``, ``SIDE``, 3)."""
        return SHADES[self.picture()].repeat(3, -1)

    def _observation(self, picture: np.ndarray) -> np.ndarray:
        return SHADES[picture].repeat(self.pixels, 0).repeat(self.pixels, 1) if self.pixels else picture


register(gymnasium, "worldmodel.environments.hidden_ball:HiddenBall")
