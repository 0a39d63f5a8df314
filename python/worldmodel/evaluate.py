"""Evaluation: whole episodes with a trained agent, each with a seed of its own.

Episode i runs with seed + i, whatever the number of environments, and every one of the episodes asked for is finished:
counting those that end first would favour short ones.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from worldmodel.agent import Agent
from worldmodel.environments import make
from worldmodel.episodes import Episodes


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What the episodes brought, in the order of their seeds.

    Attributes:
        returns: sums of rewards.
        lengths: actions.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def standard_error(self) -> float:
        """Of the mean return; 0 for one episode."""
        return float(np.std(self.returns, ddof=1) / np.sqrt(len(self.returns))) if len(self.returns) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values: the summary first."""
        summary = {"mean": self.mean, "standard_error": self.standard_error, "episodes": len(self.returns)}
        return {**summary, "returns": list(self.returns), "lengths": list(self.lengths)}


def evaluate(
    agent: Agent, env: str, episodes: int = 100, seed: int = 0, num_envs: int = 16, *, greedy: bool = True
) -> Evaluated:
    """Runs ``agent`` in the environment called ``env``.

    Args:
        agent: who acts.
        env: name of the environment, as for ``worldmodel.environments.resolve``.
        episodes: how many.
        seed: of the first; the others follow. Also of the policy's draws where it is not greedy.
        num_envs: environments that run side by side.
        greedy: take the best action; otherwise draw from the policy.

    Raises:
        UnknownEnvironment: nothing goes by that name.
        EnvironmentFailed: an environment raised an error, or gave NaN.
    """
    num_envs = min(num_envs, episodes)
    running = Episodes(
        [make(env) for _ in range(num_envs)], lambda number: seed + number, agent.observation_spec, agent.action_spec
    )
    torch.manual_seed(seed)
    results: dict[int, tuple[float, int]] = {}
    returns, lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
    state = None
    try:
        while len(results) < episodes:
            numbers = list(running.numbers)
            actions, state = agent.act_encoded(running.observations, state, running.reset, greedy=greedy)
            happened = running.step(actions)
            returns += happened.rewards
            lengths += 1
            for row in np.flatnonzero(happened.terminated | happened.truncated):
                if numbers[row] < episodes:
                    results[numbers[row]] = (float(returns[row]), int(lengths[row]))
                returns[row] = lengths[row] = 0
    finally:
        running.close()
    ordered = [results[index] for index in range(episodes)]
    return Evaluated(tuple(r for r, _ in ordered), tuple(n for _, n in ordered))
