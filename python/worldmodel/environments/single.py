"""An environment that exists as a vector only, as a single one: for evaluation and imagination."""

from typing import Any

import numpy as np

from worldmodel.environments.registry import EnvironmentFailed, make, make_vector
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error


class FirstOfVector(gymnasium.Env[Any, Any]):
    """The only environment of ``envs``, a gymnasium vector environment; its episodes are begun by ``reset`` alone."""

    def __init__(self, envs: "gymnasium.vector.VectorEnv[Any, Any, Any]") -> None:
        self.envs = envs
        self.spec = envs.spec
        self.metadata = envs.metadata
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observations, _ = self.envs.reset(seed=seed, options=options)
        return self._first(self.envs.observation_space, observations), {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observations, rewards, terminated, truncated, info = self.envs.step(np.asarray(action)[None])
        if "final_obs" in info and (terminated[0] or truncated[0]):  # observations are the next episode's
            return info["final_obs"][0], rewards[0], terminated[0], truncated[0], {}
        return self._first(self.envs.observation_space, observations), rewards[0], terminated[0], truncated[0], {}

    def _first(self, space: Any, observations: Any) -> Any:
        return next(iter(gymnasium.vector.utils.iterate(space, observations)))

    def close(self) -> None:
        self.envs.close()


def make_single(name: str, **options: Any) -> "gymnasium.Env[Any, Any]":
    """``make``, or the environment's own vectorised form with one environment. Raises as ``make``."""
    try:
        return make(name, **options)
    except EnvironmentFailed as failure:
        try:
            return FirstOfVector(make_vector(name, 1, **options))
        except EnvironmentFailed:
            raise failure from None
