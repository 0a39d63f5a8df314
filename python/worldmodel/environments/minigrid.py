"""MiniGrid's Memory tasks (S7 to S17) with a 3 x 3 view and three actions: left, right, forward.

    python -m worldmodel train --preset wander --env worldmodel/MemoryS9-v0

The first room holds a key or a ball, the *cue*. Beyond a corridor lies one of each; reaching the one like the cue is
rewarded.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from worldmodel.environments.ids import register
from worldmodel.runs.optional_dependencies import missing, require

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

if TYPE_CHECKING:
    from minigrid.minigrid_env import MiniGridEnv

VIEW = 3  # cells per side
ACTIONS = ("left", "right", "forward")
KEY, BALL = 5, 6  # first channel of a cell; 0 is hidden

_envs = require("minigrid.envs", "run worldmodel.environments.minigrid", "pip install minigrid")


class Walking(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Observes the view's image; actions only walk.

    Example:
        >>> import worldmodel.environments.registry
        >>> walking = worldmodel.environments.registry.make("worldmodel/MemoryS9-v0")
        >>> walking.action_space, walking.reset(seed=0)[0].shape
        (Discrete(3), (3, 3, 3))
    """

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.observation_space = env.observation_space["image"]
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        return observation["image"], info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(int(action))
        return observation["image"], float(reward), terminated, truncated, info


def memory(size: int, **options: Any) -> Walking:
    """A Memory task of ``size`` x ``size`` cells; ``options`` are ``MemoryEnv``'s."""
    return Walking(_envs.MemoryEnv(size=size, agent_view_size=VIEW, **options))


def cue_kind(env: Any) -> int:
    """``KEY`` or ``BALL``."""
    unwrapped: MiniGridEnv = env.unwrapped
    cue = unwrapped.grid.get(*_cue_position(unwrapped))
    return {"key": KEY, "ball": BALL}[cue.type]  # type: ignore[union-attr]


def cue_cell(env: Any) -> tuple[int, int] | None:
    """The cue's first two indices in the view, None if outside; a wall may hide it."""
    unwrapped: MiniGridEnv = env.unwrapped
    position = unwrapped.relative_coords(*_cue_position(unwrapped))
    return None if position is None else (int(position[0]), int(position[1]))


def _cue_position(unwrapped: "MiniGridEnv") -> tuple[int, int]:
    return 1, unwrapped.height // 2 - 1


register(gymnasium, "worldmodel.environments.minigrid:memory")
