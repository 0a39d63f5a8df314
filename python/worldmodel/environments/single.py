"""An environment that exists as a vector only, as a single one: for evaluation and imagination."""

from typing import Any

from worldmodel.data.actions import MASK
from worldmodel.environments.masks import masks_of
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
        observations, info = self.envs.reset(seed=seed, options=options)
        return self._first(self.envs.observation_space, observations), _first_mask(info)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        utils = gymnasium.vector.utils
        empty: Any = utils.create_empty_array(self.action_space, 1)
        actions = utils.concatenate(self.action_space, [action], empty)
        observations, rewards, terminated, truncated, info = self.envs.step(actions)
        ended = rewards[0], terminated[0], truncated[0]
        if "final_obs" in info and (terminated[0] or truncated[0]):  # observations are the next episode's
            return info["final_obs"][0], *ended, _first_mask(info.get("final_info", {}))
        return self._first(self.envs.observation_space, observations), *ended, _first_mask(info)

    def _first(self, space: Any, observations: Any) -> Any:
        return next(iter(gymnasium.vector.utils.iterate(space, observations)))

    def close(self) -> None:
        self.envs.close()


def _first_mask(info: dict[str, Any]) -> dict[str, Any]:
    mask = masks_of(info, 1)[0]
    return {} if mask is None else {MASK: mask}


def make_single(name: Any, /, **options: Any) -> "gymnasium.Env[Any, Any]":
    """``make``, or the environment's own vectorised form with one environment. Raises as ``make``."""
    try:
        return make(name, **options)
    except EnvironmentFailed as failure:
        try:
            return FirstOfVector(make_vector(name, 1, **options))
        except EnvironmentFailed:
            raise failure from None
