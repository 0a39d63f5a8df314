"""MiniGrid's Memory tasks with a view of three by three cells and the three actions that walk.

    python -m worldmodel train --preset wander --env worldmodel/MemoryS9-v0

A key or a ball, the *cue*, lies in the room where an episode begins; a corridor away lie one of each, and the episode
is rewarded where the one like the cue is reached. The grids are S7, S9, S11, S13 and S17. MiniGrid's view of seven by
seven cells covers half of the smallest grid; in this one, the cue is out of sight from a few steps away. Of MiniGrid's
seven actions, only left, right and forward have an effect here.
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

VIEW = 3  # cells on a side of the view
ACTIONS = ("left", "right", "forward")  # MiniGrid's actions 0, 1 and 2
KEY, BALL = 5, 6  # classes of a cell's first channel; 0 is a cell out of sight

_envs = require("minigrid.envs", "run worldmodel.environments.minigrid", "pip install minigrid")


class Walking(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Observes the image of the view alone, and acts by walking alone.

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
        """Begins an episode."""
        observation, info = self.env.reset(**options)
        return observation["image"], info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Turns, or moves by a cell."""
        observation, reward, terminated, truncated, info = self.env.step(int(action))
        return observation["image"], float(reward), terminated, truncated, info


def memory(size: int, **options: Any) -> Walking:
    """A Memory task whose grid has ``size`` cells on a side; ``options`` are those of MiniGrid's ``MemoryEnv``."""
    return Walking(_envs.MemoryEnv(size=size, agent_view_size=VIEW, **options))


def cue_kind(env: Any) -> int:
    """The cue of the running episode: ``KEY`` or ``BALL``."""
    unwrapped: MiniGridEnv = env.unwrapped
    cue = unwrapped.grid.get(*_cue_position(unwrapped))
    return {"key": KEY, "ball": BALL}[cue.type]  # type: ignore[union-attr]


def cue_cell(env: Any) -> tuple[int, int] | None:
    """The first two indices of the cue's cell in the view; None where it is outside.

    A cell inside the view may be hidden by a wall: its first channel is then 0.
    """
    unwrapped: MiniGridEnv = env.unwrapped
    position = unwrapped.relative_coords(*_cue_position(unwrapped))
    return None if position is None else (int(position[0]), int(position[1]))


def _cue_position(unwrapped: "MiniGridEnv") -> tuple[int, int]:
    """Column and row of the grid: in the corner of the first room, on the agent's left as it begins."""
    return 1, unwrapped.height // 2 - 1


register(gymnasium, "worldmodel.environments.minigrid:memory")
