"""Records episodes of an environment in a file, as in ``data/datasets.py``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from worldmodel.data.actions import MASK
from worldmodel.data.datasets import EpisodeWriter
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments import calls
from worldmodel.environments.grid_env import GridEnv
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.single import make_single
from worldmodel.environments.vector import random_seeds
from worldmodel.runs.fields import ConfigurationError

Policy = Literal["auto", "explore", "random"]


def record(
    env: str,
    path: Path,
    steps: int,
    *,
    policy: Policy = "auto",
    seed: int = 0,
    env_args: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Records ``steps`` actions in ``env``; the last episode is cut there.

    Args:
        env: name of the environment.
        path: of the file.
        steps: actions.
        policy: explore is the environment's own policy, random uniform over the legal actions; auto is the first where
            there is one.
        seed: of episodes and random actions.
        env_args: arguments of the environment.
        kinds: of the observation's parts, for ``ObservationSpec.from_space``.
        progress: called with the actions so far, after each.

    Returns:
        Episodes.

    Raises:
        UnknownEnvironment, EnvironmentFailed: as for ``make``, or an error of the environment.
        ConfigurationError: unsupported spaces, or no exploring policy.
    """
    environment = make_single(env, **(env_args or {}))
    try:
        return _Recording(environment, env, seed, kinds).run(path, steps, policy, dict(env_args or {}), progress)
    finally:
        environment.close()


class _Recording:
    """Episodes of ``environment``, seeded one by one.

    Any environment may tell ``elapsed`` in ``info``; ``displacement`` and ``heading`` are the grid worlds'.
    """

    def __init__(self, environment: Any, name: str, seed: int, kinds: Mapping[str, str] | None) -> None:
        self.environment, self.name, self.seed = environment, name, seed
        self.grid = environment.unwrapped if isinstance(environment.unwrapped, GridEnv) else None
        self.episodes, self.steps = 0, 0
        self.action_spec = ActionSpec.from_space(environment.action_space)
        self._reset()
        self.observation_spec = ObservationSpec.from_space(
            environment.observation_space, kinds, lambda: self._observation, self.action_spec, self._info
        )

    def run(
        self, path: Path, steps: int, policy: Policy, env_args: dict[str, Any], progress: Callable[[int], None] | None
    ) -> int:
        if policy == "explore" and self.grid is None:
            raise ConfigurationError(f"policy is 'explore', and {self.name} has no exploring policy: use random")
        random = np.random.default_rng(self.seed)
        about = {"env": self.name, "env_args": env_args, "seed": self.seed}
        with EpisodeWriter(path, self.observation_spec, self.action_spec, about) as writer:
            first = True
            while self.steps < steps:
                seen, timed = self._encoded(), self._timed()
                mask = seen[MASK][None] != 0 if MASK in seen and self.observation_spec.action_mask else None
                action = self.action_spec.sample(random, 1, mask=mask)[0]
                if self.grid is not None and policy != "random":
                    action = np.asarray(self.grid.explore())
                reward, terminated, ended = self._step(action)
                moved = {} if self.grid is None else {"displacement": self._info["displacement"]}
                writer.step(
                    seen, actions=action, rewards=reward, terminated=terminated, is_first=first, **moved, **timed
                )
                first = False
                if progress is not None:
                    progress(self.steps)
                if ended or self.steps == steps:
                    writer.step(self._encoded(), is_last=True, **self._timed())
                    first = True
                    if self.steps < steps:
                        self._reset()
        return self.episodes

    def _reset(self) -> None:
        try:
            observation, info = self.environment.reset(seed=random_seeds(self.seed)(self.episodes))
            self._observation, self._elapsed = calls.own(observation), 1.0
            self._info = {} if info is None else info
        except Exception as error:
            raise self._failed(error) from error
        self.episodes += 1

    def _step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Reward, whether the episode terminated, and whether it ended."""
        try:
            given = self.action_spec.rows_to_env(action[None])[0]
            observation, reward, terminated, truncated, info = self.environment.step(given)
            self._observation, self._info = calls.own(observation), {} if info is None else info
            self._elapsed = calls.elapsed(self._info.get(calls.ELAPSED, 1.0))
            number = calls.scalar("reward", reward)
        except Exception as error:
            raise self._failed(error) from error
        if not np.isfinite(number):
            raise EnvironmentFailed(f"{self.name}, action {self.steps}: a reward is NaN or infinite: {number}")
        self.steps += 1
        return number, bool(terminated), bool(terminated or truncated)

    def _timed(self) -> dict[str, float]:
        """What is recorded with the present observation."""
        heading = {"heading": self._info["heading"]} if self.grid is not None and "heading" in self._info else {}
        return {"elapsed": self._elapsed, **heading}

    def _encoded(self) -> dict[str, np.ndarray]:
        try:
            mask = self._info.get(MASK) if self.observation_spec.action_mask == "info" else None
            return self.observation_spec.encode(
                self._observation, None if mask is None else self.action_spec.encode_mask(mask)
            )
        except ValueError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> EnvironmentFailed:
        return EnvironmentFailed(f"{self.name}, action {self.steps}: {calls.told(error)}")
