"""The arm as a gymnasium environment.

python -m worldmodel record --env worldmodel/Arm-v0 --env-args noise=0.3 joints=true --policy scripted --out arm.npz
"""

from typing import Any

import numpy as np

from worldmodel.environments.arm.body import OPEN
from worldmodel.environments.arm.expert import Expert, perturbed
from worldmodel.environments.arm.pictures import pictures
from worldmodel.environments.arm.worlds import TASKS, ArmConfig, ArmWorlds
from worldmodel.environments.ids import register
from worldmodel.runs.fields import ConfigurationError, Limit, Share, checked_value
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

SIDE = 32  # pixels of a picture


class Arm(gymnasium.Env[Any, Any]):
    """One arm; ``options`` are the fields of ``ArmConfig``. An episode is one task on a new table.

    Observes a ``picture``, uint8 (32, 32, 3), and the ``task``, an index into ``TASKS``; with ``joints`` also the three
    angles, radians, and the gripper's opening, 0 to 1. Actions are (4,), -1 to 1: turns of the joints, and the gripper,
    closed above 0. The reward is 1 where the task is done after the step, else 0.

    With ``noise``, what is executed of the expert's own actions is ``perturbed``; those of others are executed as they
    are.

    Example:
        >>> arm = Arm(task="stack")
        >>> first, info = arm.reset(seed=1)
        >>> following, reward, terminated, truncated, info = arm.step(arm.expert())
        >>> following["picture"].shape, int(following["task"]), info
        ((32, 32, 3), 2, {'success': False})

    Raises:
        ConfigurationError: options of other values, or an action that is none of ``action_space``.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    tasks = TASKS

    def __init__(self, render_mode: str | None = None, length: int = 100, noise: float = 0.0, **options: Any) -> None:
        self.render_mode, self.length = render_mode, checked_value(Limit, length, "Arm: length")
        self.noise = checked_value(Share, noise, "Arm: noise")
        self.config = ArmConfig(**options)
        parts: dict[str, gymnasium.spaces.Space[Any]] = {
            "picture": gymnasium.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8),
            "task": gymnasium.spaces.Discrete(len(TASKS)),
        }
        if self.config.joints:
            parts["joints"] = gymnasium.spaces.Box(-np.float32(np.pi), np.float32(np.pi), (4,))
        self.observation_space = gymnasium.spaces.Dict(parts)
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self._worlds: ArmWorlds | None = None

    @property
    def worlds(self) -> ArmWorlds:
        """The present table, a batch of one; gymnasium's ResetNeeded before ``reset``."""
        if self._worlds is None:
            raise gymnasium.error.ResetNeeded("Arm: there is no table yet: call reset first")
        return self._worlds

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._worlds = ArmWorlds(1, self.config, self.np_random)
        self._expert = Expert(self._worlds, self.np_random)
        self._advice: np.ndarray | None = None
        self.steps = 0
        return self._observation(), {"success": False}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        worlds, given = self.worlds, np.asarray(action, np.float64)
        if given.shape != (4,) or not (np.abs(given) <= 1 + 1e-6).all():
            raise ConfigurationError(f"Arm: action is {action!s:.60}, expected three turns and the gripper, -1 to 1")
        if self.noise and self._advice is not None and np.allclose(given, self._advice, atol=1e-5):
            given = perturbed(given[None], self.noise, self.np_random)[0]
        success = bool(worlds.step(given[None])[0])
        self._advice = None
        self.steps += 1
        ended, cut = success and self.config.ends, self.steps >= self.length
        return self._observation(), float(success), ended, cut, {"success": success}

    def expert(self) -> np.ndarray:
        """The scripted expert's action; it acts from the start of an episode."""
        self.worlds  # noqa: B018
        self._advice = self._expert.act()[0].astype(np.float32)
        return self._advice

    def render(self) -> np.ndarray:
        """The table, uint8 (256, 256, 3)."""
        return pictures(self.worlds, 256)[0]

    def _observation(self) -> dict[str, Any]:
        seen = {name: array[0] for name, array in observed(self.worlds).items()}
        return seen | {"task": np.int64(seen["task"])}


def observed(worlds: ArmWorlds) -> dict[str, np.ndarray]:
    """What ``Arm`` observes, of many: the picture, the task and, where they are observed, the joints, (batch, ...)."""
    seen = {"picture": pictures(worlds, SIDE), "task": worlds.task}
    if worlds.config.joints:
        seen["joints"] = np.concatenate([worlds.angles, worlds.opening[:, None] / OPEN], 1).astype(np.float32)
    return seen


register(gymnasium, "worldmodel.environments.arm.game:Arm")
