"""Evaluation over whole episodes; episode i has seed + i.

Every requested episode is finished: the first to end would be biased towards short ones.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from worldmodel.acting.agent import Agent
from worldmodel.data.actions import MASK
from worldmodel.data.batch import State
from worldmodel.data.spaces import ActionSpec
from worldmodel.environments.single import make_single
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.model.deciders import Decider, decider_of
from worldmodel.model.world_model import WorldModel

if TYPE_CHECKING:
    import gymnasium

MAX_STEPS = 10_000  # of an episode whose environment has no limit
Progress = Callable[[int, int, Sequence[float]], None]  # episodes, steps, returns


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Results by episode, in seed order.

    Attributes:
        returns: undiscounted.
        lengths: actions per episode.
        cut: episodes that ``max_steps`` ended.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    cut: int = 0

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def standard_error(self) -> float:
        """Of the mean return; 0 for one episode."""
        return float(np.std(self.returns, ddof=1) / np.sqrt(len(self.returns))) if len(self.returns) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        summary = {
            "mean": self.mean,
            "standard_error": self.standard_error,
            "episodes": len(self.returns),
            "cut": self.cut,
        }
        return {**summary, "returns": list(self.returns), "lengths": list(self.lengths)}


def evaluate(
    agent: Agent,
    env: str,
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
    """Evaluates ``agent`` in ``env``; raises UnknownEnvironment or EnvironmentFailed.

    ``max_steps`` cuts longer episodes; None cuts at ``MAX_STEPS``, unless the environment has a limit of its own.
    ``progress`` is called after every step. ``env_args`` are arguments of the environment.

    ``seed`` is for the first episode and the decider's samples; ``decider`` is by default the agent's. ``environments``
    replace new ones and are closed. ``greedy`` is deprecated.
    """
    decider = decider_of(decider, greedy, agent.greedy)
    environments = environments or [make_single(env, **(env_args or {})) for _ in range(min(num_envs, episodes))]
    num_envs = len(environments)
    running = VectorEnvironment(environments, lambda number: seed + number, agent.observation_spec, agent.action_spec)
    torch.manual_seed(seed)
    limit = step_limit(environments[0], max_steps)
    results: dict[int, tuple[float, int]] = {}
    steps, cut = 0, 0
    returns, lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
    state = None
    try:
        while len(results) < episodes:
            episode_ids = list(running.episode_ids)
            actions, state = agent.act_encoded(running.observations, state, running.is_first, decider)
            happened = running.step(actions)
            returns += happened.rewards
            lengths += 1
            ended = happened.terminated | happened.truncated
            too_long = ~ended & (lengths >= limit) if limit else np.zeros_like(ended)
            for row in np.flatnonzero(ended | too_long):
                if episode_ids[row] < episodes:
                    results[episode_ids[row]] = (float(returns[row]), int(lengths[row]))
                    cut += int(too_long[row])
                returns[row] = lengths[row] = 0
            if too_long.any():
                running.restart(np.flatnonzero(too_long))
            steps += num_envs
            if progress is not None:
                progress(len(results), steps, [total for total, _ in results.values()])
    finally:
        running.close()
    ordered = [results[index] for index in range(episodes)]
    return Evaluated(tuple(r for r, _ in ordered), tuple(n for _, n in ordered), cut)


def step_limit(environment: "gymnasium.Env[Any, Any]", max_steps: int | None) -> int | None:
    """Steps after which ``evaluate`` cuts an episode; None leaves it to the environment."""
    if max_steps is not None:
        return max_steps
    return None if environment.spec is not None and environment.spec.max_episode_steps else MAX_STEPS


def random_policy(action_spec: ActionSpec, seed: int) -> Decider:
    """A ``Decider`` that draws every action at random of the legal ones, as ``ActionSpec.sample`` does."""
    random = np.random.default_rng(seed)

    def decide(world_model: WorldModel, state: State) -> torch.Tensor:
        features = state["features"]
        legal = state[MASK].cpu().numpy() if MASK in state else None
        drawn = torch.from_numpy(action_spec.sample(random, len(features), mask=legal)).to(features.device)
        return action_spec.encode(drawn).to(features.dtype)

    return decide


def evaluate_filmed(
    agent: Agent,
    env: str,
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
        first = evaluate(agent, env, filmed, seed, 1, decider=decider, environments=[camera], max_steps=max_steps)
    if filmed == episodes:
        return first
    how: dict[str, Any] = {"decider": decider, "max_steps": max_steps, "progress": progress, "env_args": env_args}
    rest = evaluate(agent, env, episodes - filmed, seed + filmed, num_envs, **how)
    return Evaluated(first.returns + rest.returns, first.lengths + rest.lengths, first.cut + rest.cut)
