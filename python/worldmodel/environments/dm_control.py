"""The control suite of dm_control, with its physics and rewards, as environments of two control steps per action.

    python -m worldmodel train --env worldmodel/DMControl-v0 --env-args task=ball_in_cup-catch

Published results count control steps, which they call frames; a step here is ``action_repeat`` of them (Tassa et al.
2018, arXiv 1801.00690): an episode has 1,000 frames, 500 steps.
"""

import difflib
from typing import Any

from worldmodel.environments.ids import register
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.optional_dependencies import missing, require

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

_INSTALL = "pip install dm-control shimmy 'mujoco<4'"


class ActionRepeat(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Applies every action for several frames; their rewards are added, and an episode may end in between.

    Args:
        env: with a step per frame.
        frames: per action, at least 1, else ConfigurationError.

    Example:
        >>> import worldmodel
        >>> slow = ActionRepeat(gymnasium.make("worldmodel/Dial-v0"), 5)
        >>> _ = slow.reset(seed=0)
        >>> [slow.step(0)[3] for _ in range(3)]
        [False, False, True]
    """

    def __init__(self, env: Any, frames: int) -> None:
        super().__init__(env)
        if frames < 1:
            raise ConfigurationError(f"ActionRepeat: frames is {frames}, expected at least 1")
        self.frames = frames

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self.frames):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def make(task: str = "cartpole-swingup", action_repeat: int = 2, **options: Any) -> ActionRepeat:
    """A task of the suite, named domain-task; ``options`` are those of shimmy's environment.

    Raises:
        MissingPackage: dm_control or shimmy is not installed.
        ConfigurationError: no such task, or no frame per action.
    """
    require("shimmy", "run dm_control's tasks", _INSTALL)
    suite = require("dm_control.suite", "run dm_control's tasks", _INSTALL)
    known = ["-".join(pair) for pair in suite.ALL_TASKS]
    if task not in known:
        domains = sorted({f"{name.partition('-')[0]}-..." for name in known})
        near = ", ".join(difflib.get_close_matches(task, known) or domains)
        raise ConfigurationError(f"DMControl: task is {task!r}, expected one of dm_control's, such as {near}")
    return ActionRepeat(gymnasium.make(f"dm_control/{task}-v0", **options), action_repeat)


register(gymnasium, "worldmodel.environments.dm_control:make")
