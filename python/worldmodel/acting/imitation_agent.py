"""A policy of ``imitate`` in environments: as an agent, and its success by task."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.acting.arm_episodes import PolicyActor, random_actor, success_by_task
from worldmodel.acting.rollout import Evaluated, Progress, evaluate_in, finished
from worldmodel.data.batch import State
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.arm.game import Arm
from worldmodel.environments.single import make_single
from worldmodel.learning.imitation_run import TASK, load_policy
from worldmodel.model.deciders import policy_sample
from worldmodel.model.imitation import ImitationPolicy
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.optional_dependencies import missing
from worldmodel.runs.run import Run

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

_Z = 1.959964  # of the normal distribution's 97.5%
_TOLD = ("success", "is_success")  # names in an environment's info


class ImitationAgent:
    """A policy that imitates, as ``evaluate_in`` calls it.

    Args:
        policy: trained.
        temperature: of ``ImitationPolicy.act``.
    """

    def __init__(self, policy: ImitationPolicy, temperature: float = 0.0) -> None:
        self.policy, self.temperature = policy.eval(), temperature
        self.observation_spec, self.action_spec = policy.observation_spec, policy.action_spec
        self.device = next(policy.parameters()).device

    @classmethod
    def load(
        cls,
        run: Path | str,
        device: str = "cpu",
        *,
        best: bool = False,
        temperature: float = 0.0,
        trust: bool = False,
    ) -> "ImitationAgent":
        """The newest checkpoint's policy, or that of the least loss on held-out episodes. Raises as ``load_policy``."""
        return cls(load_policy(Run.at_best(run) if best else Run(run), device, trust=trust), temperature)

    @torch.no_grad()
    def act_encoded(
        self,
        observations: dict[str, np.ndarray],
        state: State | None,
        reset: np.ndarray,
        decider: Any = None,
        *,
        elapsed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, State]:
        """As ``Agent.act_encoded``; ``decider`` and ``elapsed`` are a world model's and change nothing."""
        state = self.policy.init_state(len(reset)) if state is None else state
        checked = self.observation_spec.check(observations, len(reset), "ImitationAgent.act_encoded")
        seen = self.observation_spec.to_tensors(checked, self.device)
        is_first = torch.from_numpy(reset).to(self.device)
        actions, state = self.policy.act(seen, state, is_first, self.temperature)
        return actions.cpu().numpy(), state


class RandomAgent:
    """Uniform actions; draws by the seed alone."""

    def __init__(self, observation_spec: ObservationSpec, action_spec: ActionSpec, seed: int) -> None:
        self.observation_spec, self.action_spec = observation_spec, action_spec
        self._random = np.random.default_rng(seed)

    def act_encoded(
        self,
        observations: dict[str, np.ndarray],
        state: State | None,
        reset: np.ndarray,
        decider: Any = None,
        *,
        elapsed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, State]:
        return self.action_spec.sample(self._random, len(reset)), {}


@dataclasses.dataclass(frozen=True)
class Success:
    """Of episodes of one task.

    Attributes:
        successes: episodes with one.
        episodes: in all.

    Example:
        >>> low, high = Success(9, 10).interval
        >>> round(low, 2), round(high, 2)
        (0.6, 0.98)
    """

    successes: int
    episodes: int

    @property
    def share(self) -> float:
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% score interval of the share (Wilson 1927)."""
        n, p = self.episodes, self.share
        middle, scale = p + _Z**2 / (2 * n), 1 + _Z**2 / n
        half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

    def to_json(self) -> dict[str, Any]:
        counts = {"successes": self.successes, "episodes": self.episodes}
        return {"share": self.share, "interval": list(self.interval), **counts}


@dataclasses.dataclass(frozen=True)
class EvaluatedTasks:
    """Episodes, and the success by task.

    Attributes:
        found: returns and lengths.
        success: by task; empty where the environment tells none.
    """

    found: Evaluated
    success: dict[str, Success]

    def to_json(self) -> dict[str, Any]:
        success = {task: each.to_json() for task, each in self.success.items()}
        return {**self.found.to_json(), "success": success}


def evaluate_tasks(
    agent: ImitationAgent | RandomAgent,
    env: str,
    episodes: int,
    seed: int,
    num_envs: int = 16,
    *,
    tasks: Sequence[int] = (),
    max_steps: int | None = None,
    progress: Progress | None = None,
    env_args: Mapping[str, Any] | None = None,
) -> EvaluatedTasks:
    """Whole episodes, and which were a success.

    Success is what the environment tells, ``info["success"]`` or ``info["is_success"]``, at any step. An episode's task
    is the part ``task`` of its first observation; without it, all are one task. Episodes of the arm run all at once, as
    many of each task.

    Args:
        agent: that acts.
        env: name of the environment.
        episodes: in all; of the arm, as many of each task as this allows, one at least.
        seed: of the first episode.
        num_envs: in parallel.
        tasks: of the arm, by index; those of its configuration if empty.
        max_steps: cuts longer episodes.
        progress: as for ``evaluate``.
        env_args: arguments of the environment.

    Raises:
        UnknownEnvironment, EnvironmentFailed: as ``evaluate``.
        ConfigurationError: an environment of other spaces.
    """
    environments = [make_single(env, **(env_args or {}))]
    arm = environments[0].unwrapped
    if isinstance(arm, Arm) and arm.config.ends:
        environments[0].close()
        return _arm_tasks(agent, arm, episodes, seed, tasks, max_steps)
    environments += [make_single(env, **(env_args or {})) for _ in range(min(num_envs, episodes) - 1)]
    actions = ActionSpec.from_space(environments[0].action_space)
    if actions.kind != "continuous" or actions.shape != agent.action_spec.shape:
        raise ConfigurationError(
            f"{env} has {actions.kind} actions {actions.shape}, expected {agent.action_spec.shape} numbers as imitated"
        )
    watched: list[gymnasium.Env[Any, Any]] = [_Watched(environment) for environment in environments]
    names = tuple(getattr(arm, "tasks", ()))
    found = finished(evaluate_in(agent, watched, episodes, seed, policy_sample, max_steps, progress))
    counted: dict[str, list[bool]] = {}
    for each in sorted((each for one in watched for each in one.told), key=lambda each: each.seed):  # type: ignore[attr-defined]
        if each.success is not None and seed <= each.seed < seed + episodes:
            counted.setdefault(_task_name(each.task, names), []).append(each.success)
    return EvaluatedTasks(found, {task: Success(sum(those), len(those)) for task, those in counted.items()})


def _task_name(task: int | None, names: Sequence[Any]) -> str:
    if task is None:
        return "all"
    return str(names[task]) if task < len(names) else f"task {task}"


def _arm_tasks(
    agent: ImitationAgent | RandomAgent, arm: Arm, episodes: int, seed: int, tasks: Sequence[int], most: int | None
) -> EvaluatedTasks:
    own = arm.tasks if arm.config.task == "any" else (arm.config.task,)
    chosen = [arm.tasks[task] for task in tasks if task < len(arm.tasks) and arm.tasks[task] in own] or list(own)
    steps = arm.length if most is None else min(most, arm.length)
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    actor = PolicyActor(agent.policy, agent.temperature) if isinstance(agent, ImitationAgent) else random_actor(random)
    performed = success_by_task(
        lambda task, worlds: actor, arm.config, max(1, episodes // len(chosen)), seed=seed, steps=steps, tasks=chosen
    )
    success = {task: Success(int(each.success.sum()), len(each.first)) for task, each in performed.items()}
    done = np.concatenate([each.success for each in performed.values()])
    lengths = np.concatenate([np.minimum(each.first, steps) for each in performed.values()])
    cut = int((~done).sum()) if steps < arm.length else 0
    returns = tuple(float(one) for one in done)
    return EvaluatedTasks(Evaluated(returns, tuple(int(length) for length in lengths), cut), success)


@dataclasses.dataclass
class _Told:
    """What an environment told of one episode; no success where it tells none."""

    seed: int
    task: int | None
    success: bool | None = None


class _Watched(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Notes what each episode's task is, and whether it was a success."""

    def __init__(self, environment: "gymnasium.Env[Any, Any]") -> None:
        super().__init__(environment)
        self.told: list[_Told] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        task = observation.get(TASK) if isinstance(observation, Mapping) else None
        of_task = int(np.asarray(task).item()) if task is not None and np.size(task) == 1 else None
        self.told.append(_Told(seed or 0, of_task))
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        said = [result[4][name] for name in _TOLD if isinstance(result[4], Mapping) and name in result[4]]
        if said:
            before = bool(self.told[-1].success)
            self.told[-1].success = before or bool(np.any(said))
        return result
