"""Whole episodes by planning in a trained world model, towards the goals that an environment tells.

``info["goal"]`` of a reset is an observation to reach, and ``info["success"]`` of a step whether it is; an environment
without goals is planned in for its return.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.acting.agent import Agent
from worldmodel.acting.plan_costs import LatentGoalCost, encode_goal
from worldmodel.acting.plan_decider import PlanningDecider
from worldmodel.acting.rollout import Evaluated, Progress, RandomPolicy, evaluate_in, finished
from worldmodel.acting.video import FRAMES_PER_SECOND, Camera, make_rendered, writer
from worldmodel.data.batch import State
from worldmodel.environments.action_steps import ActionSteps
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.single import make_single
from worldmodel.model.deciders import Decider
from worldmodel.model.world_model import WorldModel

if TYPE_CHECKING:
    import gymnasium


_EMPTY: dict[str, Any] = {"returns": (), "lengths": (), "cut": 0, "failures": ()}


@dataclasses.dataclass(frozen=True)
class Success:
    """Of one episode.

    Attributes:
        first: actions until the first success, infinite without one.
        held: whether the last action was one.
    """

    first: float = math.inf
    held: bool = False


class GoalEpisodes(ActionSteps):
    """``ActionSteps``, which keeps what an environment tells of goals.

    Attributes:
        goal: of the running episode, as the environment tells it; None without.
        successes: by the episode's seed; empty where the environment tells of none.
    """

    def __init__(self, environment: "gymnasium.Env[Any, Any]", steps: int = 1) -> None:
        super().__init__(environment, steps)
        self.goal: Any = None
        self.successes: dict[int, Success] = {}
        self._seed, self._actions = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self.goal = info.get("goal")
        self._seed, self._actions = seed or 0, 0
        return observation, info

    def _acted(self, info: dict[str, Any]) -> None:
        self._actions += 1
        if "success" in info:
            now, before = bool(info["success"]), self.successes.get(self._seed, Success())
            first = min(before.first, self._actions if now else math.inf)
            self.successes[self._seed] = Success(first, now)


class GoalDecider:
    """``PlanningDecider`` towards the goal of each row's environment: an ``EpisodeDecider``.

    Args:
        agent: whose world model is planned in.
        environments: one per row.
        planner: whose cost is set.

    Attributes:
        seconds: of CPU time, in all decisions.

    Raises:
        EnvironmentFailed: a goal that is no observation, or one in some episodes only.
    """

    def __init__(self, agent: Agent, environments: Sequence[GoalEpisodes], planner: PlanningDecider) -> None:
        self._agent, self._environments, self._planner = agent, environments, planner
        self._goals: list[Tensor | None] = [None] * len(environments)
        self.seconds = 0.0

    def begin(self, row: int, seed: int) -> None:
        self._planner.begin(row, seed)
        goal, spec = self._environments[row].goal, self._agent.observation_spec
        self._goals[row] = None
        if goal is None:
            return
        try:
            encoded = {name: array[None] for name, array in spec.encode(goal).items()}
        except ValueError as error:
            raise EnvironmentFailed(
                f"info['goal'] of the episode with seed {seed} is no observation: {error}"
            ) from error
        with torch.no_grad():
            self._goals[row] = encode_goal(self._agent.world_model, spec.to_tensors(encoded, self._agent.device))

    def __call__(self, world_model: WorldModel, state: State) -> Tensor:
        told = [goal for goal in self._goals if goal is not None]
        if len(told) not in (0, len(self._goals)):
            raise EnvironmentFailed(f"{len(told)} of {len(self._goals)} episodes have a goal, expected all or none")
        began = time.process_time()
        self._planner.cost = LatentGoalCost(torch.cat(told)) if told else None
        actions = self._planner(world_model, state)
        self.seconds += time.process_time() - began
        return actions


@dataclasses.dataclass(frozen=True)
class EvaluatedPlans:
    """Of ``evaluate_plans``.

    Attributes:
        episodes: returns and lengths; a length counts the world model's actions.
        successes: by episode, in seed order; empty where the environment tells of none.
        ms_per_action: CPU time of planning, per action of the environment; 0 of random actions.
    """

    episodes: Evaluated
    successes: tuple[Success, ...]
    ms_per_action: float

    @property
    def reached(self) -> float:
        """Share of episodes with a success."""
        return float(np.mean([success.first < math.inf for success in self.successes]))

    @property
    def held(self) -> float:
        """Share of episodes that end with a success."""
        return float(np.mean([success.held for success in self.successes]))

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {**self.episodes.to_json(), "ms_per_action": self.ms_per_action}
        if self.successes:
            firsts = [None if math.isinf(success.first) else success.first for success in self.successes]
            told |= {"reached": self.reached, "held": self.held, "first_success": firsts}
        return told


def evaluate_plans(
    agent: Agent,
    env: str,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int = 16,
    *,
    action_steps: int = 1,
    planner: Callable[[], PlanningDecider] | None = PlanningDecider,
    film: Path | None = None,
    filmed: int = 0,
    max_steps: int | None = None,
    progress: Progress | None = None,
    env_args: Mapping[str, Any] | None = None,
) -> EvaluatedPlans:
    """Episodes of ``env``, whose seeds follow ``seed``, by plans in the world model of ``agent``.

    Args:
        agent: with continuous actions.
        env: name of the environment.
        episodes: at least 1.
        seed: of the first episode, and of what its planner draws.
        num_envs: episodes at once, for which plans are searched together.
        action_steps: actions of the environment in one of the world model.
        planner: makes the decider; None for random actions, as a baseline.
        film: file of a video of the first ``filmed`` episodes; None for none.
        filmed: at most ``episodes``.
        max_steps: cuts longer episodes, in actions of the world model.
        progress: as for ``evaluate``.
        env_args: of the environment.

    Raises:
        UnknownEnvironment, EnvironmentFailed: as ``evaluate``, or a goal that is no observation.
        NoVideo: with ``film``, an environment without rendering.
    """
    options, results, seconds = dict(env_args or {}), [], 0.0
    successes: dict[int, Success] = {}

    def run(environments: Sequence[GoalEpisodes], first: int, count: int, camera: Any = None) -> None:
        nonlocal seconds
        decider: Decider = RandomPolicy(agent.action_spec)
        if planner is not None:
            decider = GoalDecider(agent, environments, planner())
        running = environments if camera is None else [camera]
        results.append(evaluate_in(agent, running, count, seed + first, decider, max_steps, progress))
        seconds += getattr(decider, "seconds", 0.0)
        for environment in environments:
            successes.update(environment.successes)

    filmed = min(filmed, episodes) if film is not None else 0
    if film is not None and filmed:
        rendered = GoalEpisodes(make_rendered(env, **options), action_steps)
        with writer(film, float(rendered.metadata.get("render_fps") or FRAMES_PER_SECOND) / action_steps) as frames:
            run([rendered], 0, filmed, Camera(rendered, agent, filmed, frames))
    if filmed < episodes:
        rows = min(num_envs, episodes - filmed)
        run([GoalEpisodes(make_single(env, **options), action_steps) for _ in range(rows)], filmed, episodes - filmed)
    both = {name: sum((getattr(each, name) for each in results), start) for name, start in _EMPTY.items()}
    found = finished(Evaluated(**both))
    kept = tuple(successes[number] for number in range(seed, seed + episodes) if number in successes)
    return EvaluatedPlans(found, kept, 1000 * seconds / (action_steps * sum(found.lengths)))
