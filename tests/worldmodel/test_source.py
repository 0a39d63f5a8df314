import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worldmodel_environments import Echo, Numbered
from worldmodel_examples import small_model

from worldmodel.acting.agent import Agent
from worldmodel.commands.train import train_from_source
from worldmodel.data.replay import Replay, ReplayConfig
from worldmodel.data.source import Source
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.vector import VectorEnvironment, random_seeds
from worldmodel.learning.learner import LearnerConfig
from worldmodel.learning.objectives import ObjectiveConfig
from worldmodel.learning.settings import TrainConfig
from worldmodel.runs import storage
from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.run import Run

pytestmark = pytest.mark.usefixtures("same_threads")


def recorded(environment: Any, count: int, seed: int = 0) -> tuple[tuple[ObservationSpec, ActionSpec], list[Any]]:
    """Specs, and random episodes as arguments of ``add_episode``."""
    specs = ObservationSpec.from_space(environment.observation_space), ActionSpec.from_space(environment.action_space)
    random, episodes = np.random.default_rng(seed), []
    for index in range(count):
        seen, actions, rewards, ended = [environment.reset(seed=seed + index)[0]], [], [], (False, False)
        while not any(ended):
            actions.append(specs[1].sample(random, 1)[0])
            observation, reward, *ended, _ = environment.step(actions[-1])
            seen.append(observation)
            rewards.append(reward)
        encoded = [specs[0].encode(observation) for observation in seen]
        arrays = {name: np.stack([step[name] for step in encoded]) for name in specs[0].modalities}
        episodes.append((arrays, np.array(actions), np.array(rewards), ended[0]))
    return specs, episodes


def filled(specs: Any, episodes: Any, config: ReplayConfig, **more: Any) -> Replay:
    replay = Replay(*specs, 1, config)
    for observations, actions, rewards, terminated in episodes:
        replay.add_episode(observations, actions, rewards, terminated=terminated, **more)
    return replay


@pytest.mark.parametrize("burn_in", [0, 3])
def test_a_recorded_episode_is_cut_as_a_collected_one(burn_in: int) -> None:
    config = ReplayConfig(batch_size=2, window=9, burn_in=burn_in, max_steps=9999)
    episodes = VectorEnvironment([Numbered(40)], random_seeds(0))
    specs = episodes.observation_spec, episodes.action_spec
    collected, added = (Replay(*specs, 1, config) for _ in "ab")
    random, seen, actions, rewards = np.random.default_rng(0), [], [], []
    for _ in range(200):
        if episodes.is_first[0]:
            collected.begin(np.array([0]), episodes.observations)
            seen, actions, rewards = [episodes.observations["observation"][0].copy()], [], []
        action = specs[1].sample(random, 1)
        got = episodes.step(action)
        collected.add(got.rows, action, got.rewards, got.terminated, got.truncated, got.next_observations)
        seen.append(got.next_observations["observation"][0])
        actions.append(action[0])
        rewards.append(got.rewards[0])
        if got.terminated[0] or got.truncated[0]:
            added.add_episode(
                {"observation": np.stack(seen)}, np.array(actions), np.array(rewards), terminated=got.terminated[0]
            )
    pairs = list(zip(collected._chunks.values(), added._chunks.values(), strict=False))
    assert len(pairs) == len(added) > 20 and any(chunk.burn_in or chunk.state is not None for chunk, _ in pairs)
    for one, other in pairs:
        for field in dataclasses.fields(one):
            np.testing.assert_equal(getattr(one, field.name), getattr(other, field.name))


def test_masks_and_elapsed_time_come_out_where_they_were_put_in(tmp_path: Path) -> None:
    specs, [(observations, actions, rewards, _)] = recorded(Numbered(40), 1, seed=5)
    n = len(actions)
    config = ReplayConfig(batch_size=1, window=8, burn_in=2)
    mask, elapsed = np.arange(n) % 3 > 0, np.arange(n + 1, dtype=np.float32) / 4
    replay = Replay(*specs, 1, config)
    replay.add_episode(
        observations, actions, np.where(mask, rewards, np.nan), terminated=True, reward_mask=mask, elapsed=elapsed
    )
    storage.save(tmp_path / "replay.safetensors", replay.state_dict())
    again = Replay(*specs, 1, config)
    again.load_state_dict(storage.load(tmp_path / "replay.safetensors"))
    assert n > 14 and again.nbytes == replay.nbytes
    found = set()
    while again.epochs < 1:
        batch, _ = again.sample()
        for t in (batch.valid[0] & ~batch.is_last[0]).nonzero().flatten().tolist():
            step = int(batch.observations["observation"][0, t, 1])
            assert batch.reward_mask[0, t] == mask[step] and batch.elapsed[0, t] == elapsed[step]
            assert batch.rewards[0, t] == (rewards[step] if mask[step] else 0)
            found.add(step)
    assert found == set(range(n))
    plain = Replay(*specs, 1, config)
    plain.add_episode(observations, actions, rewards, terminated=True)
    batch, _ = plain.sample()
    assert batch.reward_mask.all() and (batch.elapsed == 1).all()
    assert all(chunk.reward_mask is None and chunk.elapsed is None for chunk in plain._chunks.values())


def test_episodes_that_do_not_fit_are_refused() -> None:
    specs, [(observations, actions, rewards, _)] = recorded(Echo(), 1)
    good = {"observations": observations, "actions": actions, "rewards": rewards, "terminated": True}
    replay = Replay(*specs, 1, ReplayConfig())
    seen = observations["observation"]
    for changed, words in (
        ({"actions": actions[:0]}, "actions is empty"),
        ({"actions": actions[1:]}, r"rewards has shape \(10,\), expected \(9,\)"),
        ({"actions": actions + 7}, "expected integers from 0 and below"),
        ({"actions": actions * 1.0}, "actions has dtype float64"),
        ({"observations": {}}, r"observations has keys \[\], expected \['observation'\]"),
        ({"observations": {"observation": seen[1:]}}, r"observations\['observation'\] has shape \(10, 1\)"),
        ({"observations": {"observation": seen + 9}}, "expected classes below"),
        ({"observations": {"observation": seen + 0.5}}, "has values that uint8 does not hold"),
        ({"rewards": rewards * np.nan}, "rewards holds NaN or infinity"),
        ({"reward_mask": np.ones(10)}, "reward_mask has dtype float64, expected bool"),
        ({"elapsed": np.ones(10)}, r"elapsed has shape \(10,\), expected \(11,\)"),
        ({"elapsed": np.full(11, -1.0)}, "elapsed holds NaN, infinity or a negative time"),
    ):
        with pytest.raises(ValueError, match=rf"Replay.add_episode: .*{words}"):
            replay.add_episode(**{**good, **changed})
    assert len(replay) == 0
    replay.add_episode(**good)
    assert len(replay) == 1


def test_a_run_learns_from_recorded_episodes_without_an_environment(tmp_path: Path) -> None:
    """The best action repeats the previous observation."""
    specs, episodes = recorded(Echo(), 60)
    replay = filled(specs, episodes, ReplayConfig(batch_size=8, window=24, burn_in=0))
    assert isinstance(replay, Source)
    model = dataclasses.replace(small_model().config)
    config = TrainConfig(
        model=model,
        learner=LearnerConfig(
            model_lr=0.01, policy_lr=0.01, warm_up=1, objective=ObjectiveConfig(horizon=2, imagination_starts=4)
        ),
        updates=150,
        threads=1,
        log_seconds=0.01,
        open_loop_minutes=0,
    )
    folder = tmp_path / "run"
    with pytest.raises(ConfigurationError, match="expected one of them to end the run"):
        train_from_source(dataclasses.replace(config, updates=None), replay, folder)
    run = train_from_source(config, replay, folder, quiet=True)
    assert run.metrics[-1]["updates"] == run.metrics[-1]["steps"] == 150 == int(run.checkpoints[-1].name)
    agent, correct, total = Agent.load(folder), 0, 0
    environment = Echo()
    for seed in range(1000, 1020):
        observation, state, done = environment.reset(seed=seed)[0], None, False
        while not done:
            action, state = agent.act(observation, state)
            observation, reward, done, *_ = environment.step(action)
            correct, total = correct + reward, total + 1
    assert correct / total > 0.8  # chance level is 0.45


def test_a_run_from_a_source_resumes_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    specs, episodes = recorded(Echo(), 20)
    config = TrainConfig(model=small_model().config, updates=12, threads=1, open_loop_minutes=0)
    made = ReplayConfig(batch_size=2, window=24, burn_in=0)
    ends = []
    for name, stops in (("straight", (12,)), ("cut", (5, 12))):
        for index, updates in enumerate(stops):
            run = train_from_source(
                dataclasses.replace(config, updates=updates),
                filled(specs, episodes, made),
                tmp_path / name,
                resume=index > 0,
                quiet=True,
            )
        ends.append(run.load("world_model"))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    with pytest.raises(ConfigurationError, match="the source is not what it was"):
        other = filled(*recorded(Numbered(5), 3), made)
        train_from_source(config, other, tmp_path / "cut", resume=True, quiet=True)
    assert Run(tmp_path / "cut").metrics[-1]["steps"] == 12
