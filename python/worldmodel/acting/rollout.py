"""Evaluation over whole episodes; episode i has seed + i.

Every requested episode is finished: the first to end would be biased towards short ones.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from worldmodel.acting.agent import Agent
from worldmodel.environments.registry import make
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.model.deciders import Decider, decider_of

if TYPE_CHECKING:
    import gymnasium


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Results by episode, in seed order.

    Attributes:
        returns: undiscounted.
        lengths: actions per episode.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def standard_error(self) -> float:
        """Of the mean return; 0 for one episode."""
        return float(np.std(self.returns, ddof=1) / np.sqrt(len(self.returns))) if len(self.returns) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        summary = {"mean": self.mean, "standard_error": self.standard_error, "episodes": len(self.returns)}
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
) -> Evaluated:
    """Evaluates ``agent`` in ``env``; raises UnknownEnvironment or EnvironmentFailed.

    ``seed`` is for the first episode and the decider's samples; ``decider`` is by default the agent's. ``environments``
    replace new ones and are closed. ``greedy`` is deprecated.
    """
    decider = decider_of(decider, greedy, agent.greedy)
    environments = environments or [make(env) for _ in range(min(num_envs, episodes))]
    num_envs = len(environments)
    running = VectorEnvironment(environments, lambda number: seed + number, agent.observation_spec, agent.action_spec)
    torch.manual_seed(seed)
    results: dict[int, tuple[float, int]] = {}
    returns, lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
    state = None
    try:
        while len(results) < episodes:
            episode_ids = list(running.episode_ids)
            actions, state = agent.act_encoded(running.observations, state, running.is_first, decider)
            happened = running.step(actions)
            returns += happened.rewards
            lengths += 1
            for row in np.flatnonzero(happened.terminated | happened.truncated):
                if episode_ids[row] < episodes:
                    results[episode_ids[row]] = (float(returns[row]), int(lengths[row]))
                returns[row] = lengths[row] = 0
    finally:
        running.close()
    ordered = [results[index] for index in range(episodes)]
    return Evaluated(tuple(r for r, _ in ordered), tuple(n for _, n in ordered))


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
) -> Evaluated:
    """``evaluate``, with a video of the first ``filmed`` episodes, at least 1; raises NoVideo without rendering."""
    from worldmodel.acting.video import FRAMES_PER_SECOND, Camera, make_rendered, writer

    decider = decider_of(decider, greedy, agent.greedy)
    filmed = min(filmed, episodes)
    rendered = make_rendered(env)
    with writer(file, float(rendered.metadata.get("render_fps") or FRAMES_PER_SECOND)) as film:
        camera = Camera(rendered, agent, filmed, film)
        first = evaluate(agent, env, filmed, seed, 1, decider=decider, environments=[camera])
    if filmed == episodes:
        return first
    rest = evaluate(agent, env, episodes - filmed, seed + filmed, num_envs, decider=decider)
    return Evaluated(first.returns + rest.returns, first.lengths + rest.lengths)
