"""Collection: the world model acts, replay stores the transitions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from worldmodel.data.batch import State, times_of
from worldmodel.data.replay import Replay
from worldmodel.environments.batched import GymnasiumVectorEnvironment
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.model.deciders import Decider, policy_sample
from worldmodel.model.world_model import WorldModel


class Collector:
    """Fills a replay with the world model's or random actions.

    ``seed`` is for random actions; the decider uses PyTorch's generator.

    Attributes:
        steps: transitions collected.
        state: memory state of all environments.
        failure: of an environment, in the newest step; what the others did is in the replay.
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
        self.failure: EnvironmentFailed | None = None
        self.state = world_model.init_state(episodes.num_envs)
        self._random = np.random.default_rng(seed)
        self._returns = np.zeros(episodes.num_envs)
        self._lengths = np.zeros(episodes.num_envs, np.int64)
        self._device = next(world_model.parameters()).device

    def collect(self, *, random_rows: int = 0, version: int = 0) -> list[tuple[float, int]]:
        """Steps every environment; returns return and length of ended episodes.

        Args:
            random_rows: leading environments with random actions.
            version: the world model's updates.

        Raises:
            EnvironmentFailed: the step before has left a ``failure``.
        """
        if self.failure is not None:
            raise self.failure
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
                lambda world_model, state: self._decide(world_model, state, random_rows),
                elapsed=times_of(episodes.elapsed, self._device),
            )
        actions = chosen.cpu().numpy()
        try:
            happened = episodes.step(actions)
        except EnvironmentFailed as failure:
            self.failure = failure
            if failure.happened is None:
                self.state = before
                return []
            happened = failure.happened
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
            elapsed=happened.elapsed,
        )
        self.steps += len(rows)
        self._returns[rows] += happened.rewards
        self._lengths[rows] += 1
        ended = rows[happened.terminated | happened.truncated]
        return [(float(self._returns[row]), int(self._lengths[row])) for row in ended]

    def _decide(self, world_model: WorldModel, state: State, random_rows: int) -> torch.Tensor:
        """The decider's actions, encoded, but random ones in the first ``random_rows``; not called if all are."""
        if not random_rows:
            return self.decider(world_model, state)
        episodes, like = self.episodes, state["action"]
        legal = episodes.observation_spec.legal(episodes.observations)
        sampled = torch.from_numpy(episodes.action_spec.sample(self._random, episodes.num_envs, mask=legal))
        random = episodes.action_spec.encode(sampled.to(self._device)).to(like.dtype)
        if random_rows >= episodes.num_envs:
            return random
        return torch.cat([random[:random_rows], self.decider(world_model, state)[random_rows:]])

    def state_dict(self) -> dict[str, Any]:
        return {
            "episodes": self.episodes.state_dict(),
            "state": self.state,
            "steps": self.steps,
            "random": self._random.bit_generator.state,
            "returns": self._returns,
            "lengths": self._lengths,
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, new_episodes: bool = False, unpickle: bool = False) -> None:
        """As ``Trainer.load``; raises EnvironmentFailed, or PickleRefused without ``unpickle``."""
        self.steps = saved["steps"]
        self._random.bit_generator.state = saved["random"]
        self.state = {name: value.to(self._device) for name, value in saved["state"].items()}
        self._returns[...], self._lengths[...] = saved["returns"], saved["lengths"]
        if new_episodes:
            self.episodes.begin_anew(saved["episodes"], self.steps)
        else:
            self.episodes.load_state_dict(saved["episodes"], unpickle=unpickle)
