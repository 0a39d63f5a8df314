"""Evaluation over whole episodes; episode i has seed + i.

Every requested episode is finished: the first to end would be biased towards short ones.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from worldmodel.acting.agent import Agent
from worldmodel.data.actions import MASK, action_generator
from worldmodel.data.batch import State
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.single import make_single
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.model.deciders import Decider, EpisodeDecider, SampledPolicy, decider_of, policy_sample, random_seed
from worldmodel.model.world_model import WorldModel

if TYPE_CHECKING:
    import gymnasium

_RESAMPLES = 2000
MAX_STEPS = 10_000  # of an episode whose environment has no limit
Progress = Callable[[int, int, Sequence[float]], None]  # episodes, steps, returns


class Acting(Protocol):
    """Who acts: an ``Agent``, or an ``ImitationAgent``."""

    observation_spec: ObservationSpec
    action_spec: ActionSpec

    def act_encoded(
        self,
        observations: dict[str, np.ndarray],
        state: State | None,
        reset: np.ndarray,
        decider: Decider | None = None,
        *,
        elapsed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, State]:
        """As of ``Agent``."""
        ...


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Results by episode, in seed order.

    Attributes:
        returns: undiscounted.
        lengths: actions per episode.
        cut: episodes that ``max_steps`` ended.
        failures: a line per episode that an error of the environment ended; it has no return.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    cut: int = 0
    failures: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% confidence interval of the mean return, by the bootstrap, None for one episode.

        It is the same for the same returns.
        """
        returns = np.asarray(self.returns)
        if len(returns) == 1:
            return None
        drawn = np.random.default_rng(0).integers(0, len(returns), (_RESAMPLES, len(returns)))
        low, high = np.percentile(returns[drawn].mean(1), (2.5, 97.5))
        return float(low), float(high)

    @property
    def standard_error(self) -> float:
        """Of the mean return; 0 for one episode."""
        return float(np.std(self.returns, ddof=1) / np.sqrt(len(self.returns))) if len(self.returns) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        summary = {
            "mean": self.mean,
            "standard_error": self.standard_error,
            "interval": self.interval and list(self.interval),
            "episodes": len(self.returns),
            "cut": self.cut,
        }
        episodes = {name: list(getattr(self, name)) for name in ("returns", "lengths", "failures")}
        return {**summary, **episodes}


def evaluate(
    agent: Agent,
    env: Any,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int = 16,
    *,
    decider: Decider | None = None,
    greedy: bool | None = None,
    environments: "Sequence[gymnasium.Env[Any, Any]] | None" = None,
    max_steps: int | None = None,
    progress: Progress | None = None,
    env_args: Mapping[str, Any] | None = None,
) -> Evaluated:
    """Evaluates ``agent`` in ``env``, a name, or a function, class or environment as in ``TrainConfig``.

    Raises UnknownEnvironment, or EnvironmentFailed if no episode could be finished.

    ``max_steps`` cuts longer episodes; None cuts at ``MAX_STEPS``, unless the environment has a limit of its own.
    ``progress`` is called after every step. ``env_args`` are arguments of the environment.

    ``seed`` is for the first episode; ``decider`` is by default the agent's. ``environments`` replace new ones and are
    closed. ``greedy`` is deprecated.

    What ``policy_sample``, ``RandomPolicy`` and any ``EpisodeDecider`` draw follows from the seed of each episode, so
    that ``num_envs`` does not matter. Other deciders draw by PyTorch's generator, whose seed is ``seed``.
    """
    decider = decider_of(decider, greedy, agent.greedy)
    environments = environments or [make_single(env, **(env_args or {})) for _ in range(min(num_envs, episodes))]
    return finished(evaluate_in(agent, environments, episodes, seed, decider, max_steps, progress))


def finished(found: Evaluated) -> Evaluated:
    """``found``; raises EnvironmentFailed if no episode was finished."""
    if not found.returns:
        raise EnvironmentFailed(found.failures[0])
    return found


def evaluate_in(
    agent: Acting,
    environments: "Sequence[gymnasium.Env[Any, Any]]",
    episodes: int,
    seed: int,
    decider: Decider,
    max_steps: int | None,
    progress: Progress | None = None,
    close: bool = True,
) -> Evaluated:
    """``evaluate``, perhaps without a finished episode; without ``close`` the environments stay open."""
    specs = agent.observation_spec, agent.action_spec
    running = VectorEnvironment(environments, lambda number: seed + number, *specs, tolerant=True)
    torch.manual_seed(seed)
    if decider is policy_sample:
        decider = SampledPolicy()
    limit = step_limit(environments[0], max_steps)
    results: dict[int, tuple[float, int]] = {}
    failed: dict[int, str] = {}
    steps, cut = 0, 0
    returns, lengths = np.zeros(running.num_envs), np.zeros(running.num_envs, np.int64)
    state = None
    try:
        _begin_others(running, failed, episodes)
        while len(results) + len(failed) < episodes:
            episode_ids = list(running.episode_ids)
            if isinstance(decider, EpisodeDecider):
                for row in np.flatnonzero(running.is_first):
                    decider.begin(int(row), seed + episode_ids[row])
            actions, state = agent.act_encoded(
                running.observations, state, running.is_first, decider, elapsed=running.elapsed
            )
            try:
                happened = running.step(actions)
            except EnvironmentFailed as failure:
                happened = failure.happened
            rows = happened.rows
            returns[rows] += happened.rewards
            lengths[rows] += 1
            ended = np.zeros(running.num_envs, bool)
            ended[rows] = happened.terminated | happened.truncated
            too_long = ~ended & (lengths >= limit) if limit else np.zeros_like(ended)
            for row in np.flatnonzero(ended | too_long):
                if episode_ids[row] < episodes:
                    results[episode_ids[row]] = (float(returns[row]), int(lengths[row]))
                    cut += int(too_long[row])
            running.begin(np.flatnonzero(too_long).tolist())
            over = [*np.flatnonzero(ended | too_long), *running.failed]
            returns[over] = lengths[over] = 0
            _begin_others(running, failed, episodes)
            steps += len(rows)
            if progress is not None:
                progress(len(results), steps, [total for total, _ in results.values()])
    finally:
        if close:
            running.close()
    ordered = [results[index] for index in sorted(results)]
    said = tuple(failed[index] for index in sorted(failed))
    return Evaluated(tuple(r for r, _ in ordered), tuple(n for _, n in ordered), cut, said)


def _begin_others(running: VectorEnvironment, failed: dict[int, str], episodes: int) -> None:
    """Notes the episodes that failed, and begins others in their place while ``episodes`` are not begun."""
    while running.failed:
        for row in running.failed:
            if running.episode_ids[row] < episodes:
                failed[running.episode_ids[row]] = running.errors[row]
        if running.begun >= episodes:
            return
        running.begin(sorted(running.failed))


def step_limit(environment: "gymnasium.Env[Any, Any]", max_steps: int | None) -> int | None:
    """Steps after which ``evaluate`` cuts an episode; None leaves it to the environment."""
    if max_steps is not None:
        return max_steps
    return None if environment.spec is not None and environment.spec.max_episode_steps else MAX_STEPS


class RandomPolicy:
    """Every action at random of the legal ones, as ``ActionSpec.sample`` draws them, by a generator for each row.

    Rows of which no episode was begun have generators seeded by PyTorch's.
    """

    def __init__(self, action_spec: ActionSpec) -> None:
        self._action_spec = action_spec
        self._generators: dict[int, np.random.Generator] = {}

    def begin(self, row: int, seed: int) -> None:
        self._generators[row] = action_generator(seed)

    def __call__(self, world_model: WorldModel, state: State) -> torch.Tensor:
        features = state["features"]
        legal = state[MASK].cpu().numpy() if MASK in state else None
        for row in range(len(features)):
            if row not in self._generators:
                self.begin(row, random_seed())
        sampled = [
            self._action_spec.sample(self._generators[row], 1, mask=None if legal is None else legal[row : row + 1])
            for row in range(len(features))
        ]
        actions = torch.from_numpy(np.concatenate(sampled)).to(features.device)
        return self._action_spec.encode(actions).to(features.dtype)


def evaluate_filmed(
    agent: Agent,
    env: Any,
    file: Path,
    filmed: int,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int = 16,
    *,
    decider: Decider | None = None,
    greedy: bool | None = None,
    max_steps: int | None = None,
    progress: Progress | None = None,
    env_args: Mapping[str, Any] | None = None,
) -> Evaluated:
    """``evaluate``, with a video of the first ``filmed`` episodes, at least 1; raises NoVideo without rendering."""
    from worldmodel.acting.video import FRAMES_PER_SECOND, Camera, make_rendered, writer

    decider = decider_of(decider, greedy, agent.greedy)
    filmed = min(filmed, episodes)
    rendered = make_rendered(env, **(env_args or {}))
    with writer(file, float(rendered.metadata.get("render_fps") or FRAMES_PER_SECOND)) as film:
        camera = Camera(rendered, agent, filmed, film)
        first = evaluate_in(agent, [camera], filmed, seed, decider, max_steps)
    if filmed == episodes:
        return finished(first)
    others = [make_single(env, **(env_args or {})) for _ in range(min(num_envs, episodes - filmed))]
    rest = evaluate_in(agent, others, episodes - filmed, seed + filmed, decider, max_steps, progress)
    both = {name: getattr(first, name) + getattr(rest, name) for name in ("returns", "lengths", "cut", "failures")}
    return finished(Evaluated(**both))
