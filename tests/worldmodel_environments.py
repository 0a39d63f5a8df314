"""Environments whose observations identify episode and step."""

import threading
from typing import Any

import gymnasium
import numpy as np


class Numbered(gymnasium.Env[Any, Any]):
    """Observation: (episode seed, step, is first, last action).

    Episode lengths are random; episodes with a seed divisible by 3 are truncated.

    Args:
        longest: actions of the longest episode.
        fail_at: step that raises an error.
        nan_at: step that observes NaN.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, longest: int = 12, fail_at: int | None = None, nan_at: int | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = gymnasium.spaces.Discrete(5)
        self.longest, self.fail_at, self.nan_at = longest, fail_at, nan_at

    def _observation(self, action: int) -> np.ndarray:
        self.first = self.steps == 0
        value = float("nan") if self.steps == self.nan_at else float(self.steps)
        return np.array([self.episode, value, self.first, action], np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode = int(self.np_random.integers(2**20))
        self.length = int(self.np_random.integers(1, self.longest + 1))
        self.steps = 0
        return self._observation(-1), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.steps >= self.length:
            raise AssertionError("stepped after the end of the episode")
        self.steps += 1
        if self.steps == self.fail_at:
            raise ArithmeticError("the simulator broke")
        ended, cut = self.steps == self.length, self.episode % 3 == 0
        return self._observation(int(action)), self.steps / 4, ended and not cut, ended and cut, {}


class Echo(gymnasium.Env[Any, Any]):
    """Rewards repeating the observation from ``lag`` steps ago."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, lag: int = 1, length: int = 10) -> None:
        self.observation_space = gymnasium.spaces.Discrete(2)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.lag, self.length = lag, length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seen = [int(self.np_random.integers(2))]
        return self.seen[-1], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        right = len(self.seen) > self.lag and action == self.seen[-1 - self.lag]
        self.seen.append(int(self.np_random.integers(2)))
        return self.seen[-1], float(right), len(self.seen) > self.length, False, {}


def slow_echo(lag: int = 2) -> gymnasium.Env[Any, Any]:
    return gymnasium.wrappers.TimeLimit(Echo(lag), 6)


def undeclared(lag: int = 2):  # type: ignore[no-untyped-def]
    return Echo(lag)


class Locked(Echo):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(length=30)
        self.lock = threading.Lock()


class Catch(gymnasium.Env[Any, Any]):
    """Pixels: catching the falling ball gives reward 1."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, side: int = 24, balls: int = 3, render_mode: str | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, (side, side, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(3)
        self.side, self.balls, self.render_mode = side, balls, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.bar, self.left = self.side // 2, self.balls
        self._throw()
        return self.render(), {}

    def _throw(self) -> None:
        self.x, self.y = int(self.np_random.integers(2, self.side - 3)), 0
        self.speed = int(self.np_random.integers(-2, 3))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.bar = int(np.clip(self.bar + 2 * (int(action) - 1), 3, self.side - 4))
        self.y += 2
        self.x += self.speed
        if not 0 <= self.x <= self.side - 3:
            self.speed = -self.speed
            self.x += 2 * self.speed
        reward = 0.0
        if self.y >= self.side - 4:
            reward = float(abs(self.x + 1 - self.bar) <= 4)
            self.left -= 1
            self._throw()
        return self.render(), reward, self.left == 0, False, {}

    def render(self) -> np.ndarray:
        picture = np.full((self.side, self.side, 3), (18, 24, 48), np.uint8)
        picture[self.y : self.y + 3, self.x : self.x + 3] = 255, 200, 40
        picture[-2:, self.bar - 3 : self.bar + 4] = 90, 200, 250
        return picture


for name, entry in {"Numbered-v0": Numbered, "Echo-v0": Echo, "Locked-v0": Locked, "Catch-v0": Catch}.items():
    if f"wmtest/{name}" not in gymnasium.registry:
        gymnasium.register(f"wmtest/{name}", entry)
