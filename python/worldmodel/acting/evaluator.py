"""The policy's return while it is trained."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from worldmodel.acting.agent import Agent
from worldmodel.acting.rollout import Evaluated, evaluate_in, finished
from worldmodel.environments.given import Given, is_given
from worldmodel.environments.making import specs_of
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.single import make_single
from worldmodel.learning.interval import Interval
from worldmodel.learning.settings import TrainConfig
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.configuration import ConfigurationError, differences, to_json

if TYPE_CHECKING:
    import gymnasium

SHARE = 0.05  # of training time
ALLOWANCE = 10.0  # seconds beyond the share, for the first minutes
_MOST_ENVS = 16
_STREAM = 1  # of random numbers: the trainer's seeds are of stream 0


class PolicyEvaluator(Interval):
    """Schedules evaluations of ``world_model``, each of the same episodes, which are no training's.

    No random generator of training moves. An evaluation that takes more than its share of the time is broken off, and
    the next one waits until there is time for twice as much.

    Args:
        config: ``eval_env`` and its arguments name the environment, else ``env``.
        world_model: with the spaces of training.
        trained: environments of training, which no evaluation may step.

    Attributes:
        described: the environment and the episodes: returns of others are no comparison.

    Raises:
        ConfigurationError: ``eval_env`` has other spaces, or is an object that the program does not have.
        UnknownEnvironment, EnvironmentFailed: ``eval_env`` cannot be made.
    """

    def __init__(
        self, config: TrainConfig, world_model: WorldModel, trained: "Sequence[gymnasium.Env[Any, Any]]" = ()
    ) -> None:
        super().__init__(config.eval_minutes, 0.0, SHARE, ALLOWANCE, config.clock)
        self._trained = {id(environment.unwrapped) for environment in trained}
        self._env = config.env, config.env_args
        if config.eval_env is not None:
            _check_spaces(config.eval_env, config, world_model)
            self._env = config.eval_env, config.eval_env_args
        self._episodes = config.eval_episodes
        self._environments: list[gymnasium.Env[Any, Any]] = []
        self._seed = int(np.random.SeedSequence((config.seed, _STREAM)).generate_state(1)[0] >> 2)
        name, arguments = self._env
        self.described = {"env": str(name), "env_args": arguments, "episodes": self._episodes, "seed": self._seed}

    def look(
        self, world_model: WorldModel, seconds: float, stop: Callable[[], bool] = lambda: False
    ) -> Evaluated | None:
        """Evaluates; None if there was too little time, or ``stop`` said so after a step.

        Raises EnvironmentFailed if the environment cannot be made, is one of training's, or finishes no episode.
        """
        began, most = self.now(), self.left(seconds)
        name, arguments = self._env
        while len(self._environments) < min(_MOST_ENVS, self._episodes):
            made = make_single(name, **arguments)
            others = self._trained.union(id(environment.unwrapped) for environment in self._environments)
            if id(made.unwrapped) in others:
                raise EnvironmentFailed(f"{name} is one environment that exists already, expected a new one")
            self._environments.append(made)

        def progress(episodes: int, steps: int, returns: Sequence[float]) -> None:
            if self.now() - began > most or stop():
                raise _BrokenOff

        training = world_model.training
        agent = Agent(world_model, world_model.observation_spec, world_model.action_spec)
        device = agent.device
        following = None
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                found = evaluate_in(
                    agent, self._environments, self._episodes, self._seed, agent.greedy, None, progress, close=False
                )
            return finished(found)
        except _BrokenOff:
            following = 2 * max(most, 1.0)
            return None
        finally:
            world_model.train(training)
            self.took(self.now() - began, seconds, following)

    def close(self) -> None:
        for environment in self._environments:
            environment.close()


class _BrokenOff(Exception):
    pass


def metrics_of(found: Evaluated) -> dict[str, float]:
    """Mean return with the ends of its 95% confidence interval, mean length, episodes; those that failed, if any."""
    interval = {} if found.interval is None else dict(zip(("eval/low", "eval/high"), found.interval, strict=True))
    return {
        "eval/return": found.mean,
        **interval,
        "eval/length": float(np.mean(found.lengths)),
        "eval/episodes": len(found.returns),
        **({"eval/failed": len(found.failures)} if found.failures else {}),
    }


def _check_spaces(eval_env: str, config: TrainConfig, world_model: WorldModel) -> None:
    if is_given(eval_env) and not isinstance(eval_env, Given):
        raise ConfigurationError(
            f"eval_env {eval_env} is a Python object, which only the program that gave it has: there, "
            "train(dataclasses.replace(config, eval_env=...), ...) gives it again; --eval-env names another one, and "
            "--eval-minutes 0 trains on without"
        )
    observation_spec, action_spec = specs_of(
        eval_env, world_model.observation_spec, config.eval_env_args, config.image_size
    )
    found = [f"observation.{line}" for line in world_model.observation_spec.differences(observation_spec)]
    found += [f"action.{line}" for line in differences(to_json(world_model.action_spec), to_json(action_spec))]
    if found:
        raise ConfigurationError(f"eval_env {eval_env} is not what training sees: {'; '.join(found)}")
