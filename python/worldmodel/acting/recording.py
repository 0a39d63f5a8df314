"""Records episodes of an environment in a file, as in ``data/datasets.py``.

An environment may have policies of its own, which take the present episode's next action: ``explore``, and ``expert``,
which is scripted for its task. The arm's expert is recorded in many arms at once, which is several times as fast.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from worldmodel.acting.agent import Agent
from worldmodel.acting.arm_episodes import record_demonstrations
from worldmodel.data.actions import MASK, action_generator
from worldmodel.data.datasets import EpisodeFile, EpisodeWriter
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments import calls
from worldmodel.environments.arm.game import Arm
from worldmodel.environments.grid_env import GridEnv
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.single import make_single
from worldmodel.environments.vector import random_seeds
from worldmodel.runs.fields import ConfigurationError

Policy = Literal["auto", "explore", "random", "scripted", "agent"]
_METHODS = {"explore": "explore", "scripted": "expert"}
_Choose = Callable[[dict[str, np.ndarray], bool], np.ndarray]  # encoded observation, is first -> encoded action


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
    agent: Agent | None = None,
) -> int:
    """Records ``steps`` actions in ``env``; the last episode is cut there.

    Args:
        env: name of the environment.
        path: of the file.
        steps: actions.
        policy: explore and scripted are the environment's own policies, random is uniform over the legal actions,
            agent that of ``agent``; auto is agent where one is given, else explore in environments of this package that
            have it, else random.
        seed: of episodes and random actions.
        env_args: arguments of the environment.
        kinds: of the observation's parts, for ``ObservationSpec.from_space``.
        progress: called with the actions so far, now and then.
        agent: acts greedily, trained on these spaces; its kinds of the observation's parts replace ``kinds``.

    Returns:
        Episodes.

    Raises:
        UnknownEnvironment, EnvironmentFailed: as for ``make``, or an error of the environment.
        ConfigurationError: unsupported spaces, no such policy, or an agent of other spaces.
    """
    environment = make_single(env, **(env_args or {}))
    try:
        arm = environment.unwrapped
        if policy == "scripted" and isinstance(arm, Arm) and arm.config.ends and kinds is None and agent is None:
            how: dict[str, Any] = {"noise": arm.noise, "length": arm.length, "seed": seed, "progress": progress}
            record_demonstrations(path, None, arm.config, steps=steps, **how)
            return EpisodeFile(path).episodes
        recording = _Recording(environment, env, seed, kinds if agent is None else agent.observation_spec)
        return recording.run(path, steps, recording.chooser(policy, agent), dict(env_args or {}), progress)
    finally:
        environment.close()


class _Recording:
    """Episodes of ``environment``, seeded one by one.

    Any environment may tell ``elapsed`` in ``info``; ``displacement`` and ``heading`` are the grid worlds'.
    """

    def __init__(
        self, environment: Any, name: str, seed: int, kinds: Mapping[str, str] | ObservationSpec | None
    ) -> None:
        self.environment, self.name, self.seed = environment, name, seed
        self.grid = environment.unwrapped if isinstance(environment.unwrapped, GridEnv) else None
        self.episodes, self.steps = 0, 0
        self.action_spec = ActionSpec.from_space(environment.action_space)
        self._reset()
        self.observation_spec = ObservationSpec.from_space(
            environment.observation_space, kinds, lambda: self._observation, self.action_spec, self._info
        )

    def chooser(self, policy: Policy, agent: Agent | None) -> _Choose:
        """Raises ConfigurationError without such a policy."""
        inner = self.environment.unwrapped
        if policy == "auto":
            own = type(inner).__module__.startswith("worldmodel.") and hasattr(inner, "explore")
            policy = "agent" if agent is not None else "explore" if own else "random"
        if (policy == "agent") != (agent is not None):
            raise ConfigurationError(
                f"policy is {policy!r} and the agent {'none' if agent is None else 'given'}, expected both or neither"
            )
        if agent is not None:
            return _AgentPolicy(agent, self)
        if policy == "random":
            return functools.partial(self._any, action_generator(self.seed))
        method = getattr(inner, _METHODS[policy], None)
        if not callable(method):
            others = [name for name, needed in _METHODS.items() if callable(getattr(inner, needed, None))]
            kind = "exploring" if policy == "explore" else policy
            use = " or ".join([*others, "random"])
            raise ConfigurationError(f"policy is {policy!r}, and {self.name} has no {kind} policy: use {use}")
        return lambda seen, first: self._own(method)

    def _any(self, random: np.random.Generator, seen: dict[str, np.ndarray], first: bool) -> np.ndarray:
        mask = seen[MASK][None] != 0 if MASK in seen and self.observation_spec.action_mask else None
        return self.action_spec.sample(random, 1, mask=mask)[0]

    def _own(self, method: Callable[[], Any]) -> np.ndarray:
        try:
            return self.action_spec.from_env(method())
        except Exception as error:
            raise self._failed(error) from error

    def run(
        self,
        path: Path,
        steps: int,
        choose: _Choose,
        env_args: dict[str, Any],
        progress: Callable[[int], None] | None,
    ) -> int:
        about = {"env": self.name, "env_args": env_args, "seed": self.seed}
        with EpisodeWriter(path, self.observation_spec, self.action_spec, about) as writer:
            first = True
            while self.steps < steps:
                seen, timed = self._encoded(), self._timed()
                action = choose(seen, first)
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
            self._observation, self.elapsed = calls.own(observation), 1.0
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
            self.elapsed = calls.elapsed(self._info.get(calls.ELAPSED, 1.0))
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
        return {"elapsed": self.elapsed, **heading}

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


class _AgentPolicy:
    """Acts as ``agent`` does; keeps its memory over an episode."""

    def __init__(self, agent: Agent, recording: _Recording) -> None:
        if differences := agent.observation_spec.differences(recording.observation_spec):
            raise ConfigurationError(
                f"the agent was trained on other observations than {recording.name}'s: {differences[0]}"
            )
        if agent.action_spec != recording.action_spec:
            raise ConfigurationError(
                f"the agent was trained on other actions than {recording.name}'s: {agent.action_spec}"
            )
        self.agent, self.recording = agent, recording
        self.state: Any = None

    def __call__(self, seen: dict[str, np.ndarray], first: bool) -> np.ndarray:
        encoded = {name: array[None] for name, array in seen.items()}
        elapsed = np.array([self.recording.elapsed], np.float32)
        actions, self.state = self.agent.act_encoded(encoded, self.state, np.array([first]), elapsed=elapsed)
        return actions[0]
