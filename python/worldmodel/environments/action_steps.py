"""Several actions as one, as a world model with ``action_steps`` has them."""

from typing import Any

import numpy as np

from worldmodel.environments import calls
from worldmodel.runs.fields import Limit, checked_value
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error


class ActionSteps(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Takes ``steps`` actions of ``environment``, one after another, as one; of one step, it is that action itself.

    The reward is their sum, the observation and ``info`` are the last; an episode that ends leaves the rest out.

    Example:
        >>> from worldmodel.environments.two_rooms.game import TwoRooms
        >>> rooms = ActionSteps(TwoRooms(), 4)
        >>> before = rooms.reset(seed=0)[1]["position"]
        >>> after = rooms.step(np.full((4, 2), 0.5, np.float32))[-1]["position"]
        >>> rooms.action_space.shape, (after - before).tolist()
        ((4, 2), [2.0, 2.0])
    """

    def __init__(self, environment: "gymnasium.Env[Any, Any]", steps: int) -> None:
        super().__init__(environment)
        self.action_steps = checked_value(Limit, steps, "ActionSteps: steps")
        if steps > 1:
            self.action_space = gymnasium.vector.utils.batch_space(environment.action_space, steps)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total, elapsed = 0.0, []
        actions = [action] if self.action_steps == 1 else gymnasium.vector.utils.iterate(self.action_space, action)
        for one in actions:
            observation, reward, terminated, truncated, info = self.env.step(one)
            total += calls.scalar("reward", reward)
            elapsed.append(calls.elapsed(info.get(calls.ELAPSED, 1.0)))
            self._acted(info)
            if terminated or truncated:
                break
        if calls.ELAPSED in info:
            info = {**info, calls.ELAPSED: float(np.mean(elapsed))}
        return observation, total, terminated, truncated, info

    def _acted(self, info: dict[str, Any]) -> None:
        """After each action of ``environment``."""
