"""Laws of collection and replay: what happened comes out, once a pass, and nothing else does."""

import collections
import itertools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worldmodel_environments import Numbered
from worldmodel.batch import Batch
from worldmodel.environments import EnvironmentFailed
from worldmodel.episodes import Episodes, VectorEpisodes
from worldmodel.replay import Replay, ReplayConfig

Transition = tuple[Any, ...]
STATE = {"memory.h": np.zeros((3,), np.float32)}


def single(num_envs: int, longest: int) -> Episodes:
    seeds = itertools.count()
    return Episodes([Numbered(longest) for _ in range(num_envs)], lambda: next(seeds))


def vector(mode: AutoresetMode) -> Callable[[int, int], VectorEpisodes]:
    def make(num_envs: int, longest: int) -> VectorEpisodes:
        envs: Any = SyncVectorEnv([lambda: Numbered(longest) for _ in range(num_envs)], autoreset_mode=mode)
        return VectorEpisodes(envs, seed=3)

    return make


MAKERS = {"single": single, **{mode.value: vector(mode) for mode in AutoresetMode}}


class Recorder:
    """Collects with random actions, and keeps a plain list of the transitions that happened."""

    def __init__(self, episodes: Episodes | VectorEpisodes, config: ReplayConfig) -> None:
        self.episodes = episodes
        self.replay = Replay(episodes.observation_spec, episodes.action_spec, episodes.num_envs, config, STATE)
        self.random = np.random.default_rng(1)
        self.happened: list[list[Transition]] = [[] for _ in range(episodes.num_envs)]
        self.ended: list[Transition] = []  # of episodes that are over
        self.version = 0

    def step(self) -> None:
        episodes = self.episodes
        seen = {name: array.copy() for name, array in episodes.observations.items()}
        begun = np.flatnonzero(episodes.reset)
        self.replay.begin(begun, {name: array[begun] for name, array in seen.items()})
        actions = episodes.action_spec.sample(self.random, episodes.num_envs)
        now = seen["observation"]
        # A state that says where it was taken: in front of which step of which episode.
        states = {"memory.h": torch.from_numpy(now[:, :3].astype(np.float32))}
        got = episodes.step(actions)
        self.replay.add(
            got.rows, actions[got.rows], got.rewards, got.terminated, got.truncated, got.next_observations, states,
            self.version,
        )  # fmt: skip
        self.version += 1
        for index, row in enumerate(got.rows):
            following = got.next_observations["observation"][index]
            transition = (*now[row][:2], int(actions[row]), float(got.rewards[index]), bool(got.terminated[index]))
            assert following[3] == actions[row], "the environment got another action than replay"
            self.happened[row].append((*transition, *following[:2]))
            if got.terminated[index] or got.truncated[index]:
                self.ended += self.happened[row]
                self.happened[row] = []


def transitions(batch: Batch) -> list[Transition]:
    """What is to be learned from a batch: its transitions outside burn-in, each with the observation after it."""
    found = []
    for row, time in zip(*np.nonzero(batch.has_action.numpy()), strict=True):
        if time < batch.burn_in:
            continue
        now, following = (batch.observations["observation"][row, t].numpy() for t in (time, time + 1))
        action, reward = int(batch.actions[row, time]), float(batch.rewards[row, time])
        found.append((*now[:2], action, reward, bool(batch.terminated[row, time]), *following[:2]))
    return found


def one_pass(replay: Replay) -> list[Transition]:
    """All that comes out until everything has come out once."""
    found: list[Transition] = []
    batch, _ = replay.sample()
    found += transitions(batch)
    passes = replay.passes
    while any(replay.state_dict()["left"]) and replay.passes == passes:
        batch, _ = replay.sample()
        found += transitions(batch)
    return found


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("window", "burn_in"), [(16, 4), (7, 3), (5, 0)])
def test_every_transition_comes_out_once_a_pass(maker: str, window: int, burn_in: int) -> None:
    recorder = Recorder(MAKERS[maker](3, 12), ReplayConfig(batch_size=2, window=window, burn_in=burn_in, max_steps=9999))
    for _ in range(150):
        recorder.step()
    replay = recorder.replay
    out: collections.Counter[Transition] = collections.Counter()
    for _ in range(60):
        batch, _ = replay.sample()
        out.update(transitions(batch))
        assert replay.passes - 1 <= min(out.values(), default=0) or len(out) < replay.transitions
    counts = set(out.values())
    assert max(counts) - min(counts) <= 1 and min(counts) >= 2
    expected = set(recorder.ended)
    assert expected <= set(out)
    unfinished = {transition for row in recorder.happened for transition in row}
    assert set(out) - expected <= unfinished  # complete windows of episodes that still run
    assert len(out) == replay.transitions
