"""Collection: the world model acts in the environments, and what happens goes into replay."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from worldmodel.data.replay import Replay
from worldmodel.environments.vector import GymnasiumVectorEnvironment, VectorEnvironment
from worldmodel.model.deciders import Decider, policy_sample
from worldmodel.model.world_model import WorldModel


class Collector:
    """Steps environments with the actions of a world model, or with random ones, and fills a replay.

    Args:
        episodes: the environments.
        replay: where transitions go.
        world_model: who acts.
        seed: of random actions. The decider samples from PyTorch's default generator.
        decider: chooses the actions.

    Attributes:
        steps: transitions collected.
        state: the world model's memory of the episodes that run.
    """

    def __init__(
        self,
        episodes: VectorEnvironment | GymnasiumVectorEnvironment,
        replay: Replay,
        world_model: WorldModel,
        seed: int,
        decider: Decider = policy_sample,
    ) -> None:
        self.episodes = episodes
        self.replay = replay
        self.world_model = world_model
        self.decider = decider
        self.steps = 0
        self.state = world_model.init_state(episodes.num_envs)
        self._random = np.random.default_rng(seed)
        self._returns = np.zeros(episodes.num_envs)
        self._lengths = np.zeros(episodes.num_envs, np.int64)
        self._device = next(world_model.parameters()).device

    def collect(self, *, random_rows: int = 0, version: int = 0) -> list[tuple[float, int]]:
        """One step of every environment.

        Args:
            random_rows: how many of the environments, the first ones, draw their actions uniformly instead of asking
                the world model.
            version: updates that the world model has seen.

        Returns:
            Return and length of each episode that ended.
        """
        episodes = self.episodes
        begun = np.flatnonzero(episodes.is_first)
        if begun.size:
            self.replay.begin(begun, {name: array[begun] for name, array in episodes.observations.items()})
            self._returns[begun] = self._lengths[begun] = 0
        before = self.state
        with torch.no_grad():
            chosen, self.state = self.world_model.act(
                episodes.observation_spec.to_tensors(episodes.observations, self._device),
                before,
                torch.from_numpy(episodes.is_first).to(self._device),
                self.decider,
            )
        if random_rows:
            drawn = episodes.action_spec.sample(self._random, episodes.num_envs)
            chosen[:random_rows] = torch.from_numpy(drawn[:random_rows]).to(self._device)
            encoded = episodes.action_spec.encode(chosen).to(self.state["action"].dtype)
            self.state = {**self.state, "action": encoded}  # what it did, not what it would have done
        actions = chosen.cpu().numpy()
        happened = episodes.step(actions)
        rows = happened.rows
        self.replay.add(
            rows,
            actions[rows],
            happened.rewards,
            happened.terminated,
            happened.truncated,
            happened.next_observations,
            before,
            version,
        )
        self.steps += len(rows)
        self._returns[rows] += happened.rewards
        self._lengths[rows] += 1
        ended = rows[happened.terminated | happened.truncated]
        return [(float(self._returns[row]), int(self._lengths[row])) for row in ended]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, but replay and weights."""
        return {
            "episodes": self.episodes.state_dict(),
            "state": self.state,
            "steps": self.steps,
            "random": self._random.bit_generator.state,
            "returns": self._returns,
            "lengths": self._lengths,
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, new_episodes: bool = False, unpickle: bool = False) -> None:
        """What ``state_dict`` returned.

        Args:
            saved: what ``state_dict`` returned.
            new_episodes: begin other episodes instead of going on with those that ran.
            unpickle: whether pickled environments may be read, which runs whatever is written in them.

        Raises:
            EnvironmentFailed: the environments cannot be brought back to where they were.
            PickleRefused: they are pickled and may not be read.
        """
        self.steps = saved["steps"]
        self._random.bit_generator.state = saved["random"]
        self.state = {name: value.to(self._device) for name, value in saved["state"].items()}
        self._returns[...], self._lengths[...] = saved["returns"], saved["lengths"]
        if new_episodes:
            self.episodes.begin_anew(saved["episodes"], self.steps)
        else:
            self.episodes.load_state_dict(saved["episodes"], unpickle=unpickle)
