"""A ball that passes behind a curtain: an environment of small maps, each of which hides what comes next.

    python -m worldmodel train --preset moving --env worldmodel/HiddenBall-v0

A ball of ``BALL`` by ``BALL`` cells flies over a map of ``SIDE`` by ``SIDE``, one cell a step along each axis, and
bounces off the edges. In front of it hangs a curtain as high as the map, ``CURTAIN`` cells wide, which the actions move
to the left, leave, or move to the right. Where the ball flies to is in no single frame, and where it is behind the
curtain is in none at all: two frames or more have to be remembered, and gone on with. The reward is the share of the
ball that is in sight; an episode is cut after ``LENGTH`` steps.

The world draws nothing at random but how an episode begins, so its seed and the actions say all that happens.

``HiddenBallPixels-v0`` is the same seen as an image, every cell four by four pixels of a shade of grey.
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
FREE, CLOTH, LEATHER = range(3)  # what a cell shows: nothing, curtain, ball
SHADES = np.array([0, 96, 255], np.uint8)
LEFT, STAY, RIGHT = range(3)


class HiddenBall(gymnasium.Env[Any, Any]):
    """One ball, one curtain; ``render`` draws them.

    Args:
        render_mode: "rgb_array", or None.
        pixels: on a side of a cell, where shades of grey are seen; 0 for what each cell shows.

    Attributes:
        ball: int64 (2,), row and column of the ball's upper left pixel.
        flight: int64 (2,), what is added to it in a step, -1 or 1 each.
        curtain: leftmost column of the curtain.

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
        """A ball anywhere, flying to any corner, and a curtain anywhere."""
        super().reset(seed=seed)
        self.ball = self.np_random.integers(0, SIDE - BALL + 1, 2)
        self.flight = self.np_random.choice([-1, 1], 2)
        self.curtain = int(self.np_random.integers(0, SIDE - CURTAIN + 1))
        self.steps = 0
        return self._seen(self.picture()), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The curtain is moved, then the ball flies on."""
        self.curtain = min(max(self.curtain + int(action) - STAY, 0), SIDE - CURTAIN)
        ahead = self.ball + self.flight
        self.flight = np.where((ahead < 0) | (ahead > SIDE - BALL), -self.flight, self.flight)
        self.ball = self.ball + self.flight
        self.steps += 1
        picture = self.picture()
        in_sight = float((picture == LEATHER).sum()) / BALL**2
        return self._seen(picture), in_sight, False, self.steps >= LENGTH, {}

    def picture(self) -> np.ndarray:
        """What each cell shows, uint8 (side, side, 1)."""
        picture = np.full((SIDE, SIDE, 1), FREE, np.uint8)
        row, column = self.ball
        picture[row : row + BALL, column : column + BALL] = LEATHER
        picture[:, self.curtain : self.curtain + CURTAIN] = CLOTH
        return picture

    def render(self) -> np.ndarray:
        """The same in shades of grey, uint8 (side, side, 3)."""
        return SHADES[self.picture()].repeat(3, -1)

    def _seen(self, picture: np.ndarray) -> np.ndarray:
        """The cells themselves, or the image of them."""
        return SHADES[picture].repeat(self.pixels, 0).repeat(self.pixels, 1) if self.pixels else picture


register(gymnasium, "worldmodel.environments.hidden_ball:HiddenBall")
