"""Dial: a hand goes on turning while nobody looks, for a time that differs from step to step.

    python -m worldmodel train --env worldmodel/Dial-v0

The hand of a dial moves one of ``POSITIONS`` per unit of time. It is shown at the first step alone; each later step
comes 1 to ``LONGEST`` units after the one before, told in ``info["elapsed"]`` and not in the observation. The action
names the hand's position, for a reward of 1. Whoever counts steps and not time is right by chance.
"""

from typing import Any

import numpy as np

from worldmodel.environments.calls import ELAPSED
from worldmodel.environments.ids import register
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

POSITIONS = 4
LONGEST = 4
LENGTH = 12
HIDDEN = POSITIONS


class Dial(gymnasium.Env[Any, Any]):
    """Observes the position, ``HIDDEN`` after the first step.

    Attributes:
        hand: its position.

    Example:
        >>> dial = Dial()
        >>> first, _ = dial.reset(seed=1)
        >>> following, reward, _, _, info = dial.step(int(first))
        >>> int(following) == HIDDEN, reward, dial.hand == (int(first) + info["elapsed"]) % POSITIONS
        (True, 1.0, True)
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Discrete(POSITIONS + 1)
        self.action_space = gymnasium.spaces.Discrete(POSITIONS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        super().reset(seed=seed)
        self.hand = int(self.np_random.integers(POSITIONS))
        self.steps = 0
        return np.int64(self.hand), {}

    def step(self, action: int) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        right = float(int(action) == self.hand)
        elapsed = int(self.np_random.integers(1, LONGEST + 1))
        self.hand = (self.hand + elapsed) % POSITIONS
        self.steps += 1
        return np.int64(HIDDEN), right, False, self.steps >= LENGTH, {ELAPSED: elapsed}


register(gymnasium, "worldmodel.environments.dial:Dial")
