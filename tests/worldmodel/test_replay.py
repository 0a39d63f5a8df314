"""Each transition is sampled once per epoch."""

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
from worldmodel_environments import Numbered

from worldmodel.data.batch import Batch
from worldmodel.data.replay import Replay, ReplayConfig
from worldmodel.environments.batched import GymnasiumVectorEnvironment
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.vector import VectorEnvironment, random_seeds

Transition = tuple[Any, ...]
STATE = {"memory.h": np.zeros((3,), np.float32)}


def single(num_envs: int, longest: int) -> VectorEnvironment:
    return VectorEnvironment([Numbered(longest) for _ in range(num_envs)], random_seeds(0))


def vector(mode: AutoresetMode) -> Callable[[int, int], GymnasiumVectorEnvironment]:
    def make(num_envs: int, longest: int) -> GymnasiumVectorEnvironment:
        envs: Any = SyncVectorEnv([lambda: Numbered(longest) for _ in range(num_envs)], autoreset_mode=mode)
        return GymnasiumVectorEnvironment(envs, seed=3)

    return make


MAKERS = {"single": single, **{mode.value: vector(mode) for mode in AutoresetMode}}


class Recorder:
    """Random actions, with a list of the transitions."""

    def __init__(self, episodes: VectorEnvironment | GymnasiumVectorEnvironment, config: ReplayConfig) -> None:
        self.episodes = episodes
        self.replay = Replay(episodes.observation_spec, episodes.action_spec, episodes.num_envs, config, STATE)
        self.random = np.random.default_rng(1)
        self.happened: list[list[Transition]] = [[] for _ in range(episodes.num_envs)]
        self.ended: list[Transition] = []  # of finished episodes
        self.version = 0

    def step(self) -> None:
        episodes = self.episodes
        seen = {name: array.copy() for name, array in episodes.observations.items()}
        begun = np.flatnonzero(episodes.is_first)
        self.replay.begin(begun, {name: array[begun] for name, array in seen.items()})
        actions = episodes.action_spec.sample(self.random, episodes.num_envs)
        now = seen["observation"]
        # The state identifies its episode and step.
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
    """Transitions outside burn-in."""
    found = []
    for row, time in zip(*np.nonzero((batch.losses_at & ~batch.is_last).numpy()), strict=True):
        now, following = (batch.observations["observation"][row, t].numpy() for t in (time, time + 1))
        action, reward = int(batch.actions[row, time]), float(batch.rewards[row, time])
        found.append((*now[:2], action, reward, bool(batch.terminated[row, time]), *following[:2]))
    return found


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("window", "burn_in"), [(16, 4), (7, 3), (5, 0)])
def test_every_transition_comes_out_once_per_epoch(maker: str, window: int, burn_in: int) -> None:
    recorder = Recorder(
        MAKERS[maker](3, 12), ReplayConfig(batch_size=2, window=window, burn_in=burn_in, max_steps=9999)
    )
    for _ in range(120):
        recorder.step()
    replay = recorder.replay
    out: collections.Counter[Transition] = collections.Counter()
    while replay.epochs < 3:
        out.update(transitions(replay.sample()[0]))
    expected = set(recorder.ended)
    assert expected <= set(out)
    still_running = {transition for row in recorder.happened for transition in row}
    assert set(out) - expected <= still_running  # of unfinished episodes
    assert len(out) == replay.transitions
    # Three epochs are complete, a fourth has started.
    assert set(out.values()) <= {3, 4}


@given(st.data())
@settings(max_examples=40)
def test_nothing_is_lost_or_doubled_whatever_the_order_of_adding_and_sampling(data: st.DataObject) -> None:
    window = data.draw(st.integers(2, 14), "window")
    config = ReplayConfig(
        batch_size=data.draw(st.integers(1, 4), "batch_size"),
        window=window,
        burn_in=data.draw(st.integers(0, window - 2), "burn_in"),
        max_steps=9999,
    )
    recorder = Recorder(
        single(data.draw(st.integers(1, 3), "num_envs"), data.draw(st.integers(1, 30), "longest")), config
    )
    replay = recorder.replay
    out: collections.Counter[Transition] = collections.Counter()
    for _ in range(data.draw(st.integers(1, 40), "rounds")):
        for _ in range(data.draw(st.integers(0, 5), "steps")):
            recorder.step()
        if len(replay) and data.draw(st.booleans(), "sample"):
            out.update(transitions(replay.sample()[0]))
            assert max(out.values()) <= replay.epochs + 1
    if not len(replay):
        return
    # The rest of this epoch and one more cover all.
    start = replay.epochs
    fresh: collections.Counter[Transition] = collections.Counter()
    while replay.epochs < start + 3:
        fresh.update(transitions(replay.sample()[0]))
    assert len(fresh) == replay.transitions
    assert max(fresh.values()) - min(fresh.values()) <= 2
    assert set(recorder.ended) <= set(fresh)


@pytest.mark.parametrize("maker", MAKERS)
def test_episodes_keep_their_last_observation_and_begin_with_a_reset(maker: str) -> None:
    recorder = Recorder(MAKERS[maker](2, 9), ReplayConfig(batch_size=3, window=25, burn_in=4, max_steps=9999))
    for _ in range(80):
        recorder.step()
    truncated = 0
    for _ in range(10):
        batch, _ = recorder.replay.sample()
        assert batch.state is None and batch.loss_mask.all()
        seen, first = batch.observations["observation"], batch.observations["observation"][..., 2] == 1
        assert torch.equal(batch.is_first, first & batch.valid)
        last = batch.valid & batch.is_last
        for row, time in last.nonzero().tolist():
            before = seen[row, time - 1]
            # The same episode, one step later.
            assert seen[row, time, 0] == before[0] and seen[row, time, 1] == before[1] + 1
            assert seen[row, time, 3] == batch.actions[row, time - 1]
            cut = int(before[0]) % 3 == 0
            assert bool(batch.terminated[row, time - 1]) == (not cut)
            truncated += cut
            assert time + 1 == batch.shape[1] or batch.is_first[row, time + 1] or not batch.valid[row, time + 1 :].any()
        assert not (~batch.is_last & ~batch.valid).any()
        assert not (batch.terminated & batch.is_last).any()
    assert truncated


@pytest.mark.parametrize("burn_in", [1, 3, 5, 6, 9])
def test_only_windows_of_long_episodes_use_stored_states_each_the_one_of_its_first_step(burn_in: int) -> None:
    """Also where burn-in is longer than what a window adds, so that several windows have begun at once."""
    recorder = Recorder(single(3, 40), ReplayConfig(batch_size=4, window=11, burn_in=burn_in, max_steps=9999))
    for _ in range(200):
        recorder.step()
    stored = mixed = ages = 0
    for _ in range(60):
        batch, metrics = recorder.replay.sample(version=recorder.version)
        first = batch.observations["observation"][:, 0]
        inside = ~batch.is_first[:, 0]
        assert bool(inside.any()) == (batch.state is not None) == ("state_age" in metrics)
        assert (first[~inside, 1] == 0).all() and batch.loss_mask[~inside].all()
        if batch.state is None:
            continue
        assert not batch.loss_mask[inside, :burn_in].any() and batch.loss_mask[inside, burn_in:].all()
        assert torch.equal(batch.state["memory.h"][inside], first[inside, :3])
        assert not batch.state["memory.h"][~inside].any()  # the initial state
        assert 0 < metrics["state_age"] <= metrics["state_age_max"] <= 200
        stored += 1
        mixed += bool((~inside).any())
        ages += metrics["state_age"] != metrics["state_age_max"]
    assert stored and mixed and ages


def test_the_memory_limit_holds_and_the_oldest_go_first() -> None:
    config = ReplayConfig(batch_size=2, window=16, burn_in=4, max_steps=9999, max_megabytes=0.05)
    recorder = Recorder(single(2, 30), config)
    dropped = False
    for _ in range(400):
        recorder.step()
        assert recorder.replay.nbytes <= 0.05 * 2**20
        dropped |= recorder.replay.transitions < len(recorder.ended)
    assert dropped
    kept: set[Transition] = set()
    while recorder.replay.epochs < 2:
        kept.update(transitions(recorder.replay.sample()[0]))
    assert set(recorder.ended[-40:]) <= kept and not set(recorder.ended[:40]) & kept


def test_the_limit_of_steps_holds() -> None:
    recorder = Recorder(single(2, 30), ReplayConfig(batch_size=2, window=16, burn_in=4, max_steps=100))
    for _ in range(150):
        recorder.step()
        assert recorder.replay.transitions <= 100
    assert recorder.replay.transitions > 80 and recorder.replay.added == 300


def test_the_three_autoreset_modes_store_the_same_transitions() -> None:
    found = []
    for mode in AutoresetMode:
        recorder = Recorder(vector(mode)(1, 9), ReplayConfig(batch_size=2, window=16, burn_in=4, max_steps=9999))
        recorder.random = np.random.default_rng(0)
        while len(recorder.ended) < 60:
            recorder.step()
        found.append([(t[0], t[1], t[3:]) for t in recorder.ended[:60]])
    assert found[0] == found[1] == found[2]


def test_saved_and_loaded_replay_goes_on_with_the_same_batches(tmp_path: Any) -> None:
    from worldmodel.runs import storage

    config = ReplayConfig(batch_size=3, window=11, burn_in=3, max_steps=300)
    recorder = Recorder(single(3, 40), config)
    for _ in range(130):
        recorder.step()
    first = recorder.replay
    first.sample()
    storage.save(tmp_path / "replay.safetensors", first.state_dict())
    episodes = recorder.episodes
    second = Replay(episodes.observation_spec, episodes.action_spec, episodes.num_envs, config, STATE, seed=9)
    second.load_state_dict(storage.load(tmp_path / "replay.safetensors"))
    assert second.nbytes == first.nbytes and second.transitions == first.transitions
    for _ in range(30):
        recorder.replay = first
        saved = recorder.random.bit_generator.state, recorder.version
        batches = [replay.sample(version=7) for replay in (first, second)]
        assert batches[0][1] == batches[1][1]
        assert_same(batches[0][0], batches[1][0])
        assert saved
        rows = np.arange(3)
        step = {"observation": recorder.random.normal(size=(3, 4)).astype(np.float32)}
        zeros = np.zeros(3, bool)
        for replay in (first, second):
            replay.add(rows, rows, np.ones(3, np.float32), zeros, zeros, step)


def assert_same(a: Batch, b: Batch) -> None:
    for name in (
        "actions",
        "rewards",
        "terminated",
        "is_last",
        "is_first",
        "valid",
        "loss_mask",
        "reward_mask",
        "elapsed",
    ):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.observations["observation"], b.observations["observation"])
    assert (a.state is None) == (b.state is None)
    if a.state is not None and b.state is not None:
        assert torch.equal(a.state["memory.h"], b.state["memory.h"])


def test_settings_that_cannot_work_are_refused_with_the_reason() -> None:
    for bad, words in (
        ({"burn_in": 255}, "below window - 1 = 255"),
        ({"batch_size": 0}, "expected a whole number, at least 1"),
        ({"max_steps": 10}, "at least window = 256"),
    ):
        with pytest.raises(ValueError, match=words):
            ReplayConfig(**bad)
    episodes = single(2, 5)
    specs = episodes.observation_spec, episodes.action_spec
    with pytest.raises(ValueError, match=r"at least 0\.0176, an unfinished window of 256 steps and a finished"):
        Replay(*specs, 64, ReplayConfig(max_megabytes=0.01), STATE)
    with pytest.raises(RuntimeError, match="nothing is stored yet"):
        Replay(*specs, 2, ReplayConfig(), STATE).sample()


@pytest.mark.parametrize(("options", "words"), [({"fail_at": 3}, "the simulator broke"), ({"nan_at": 3}, "NaN")])
def test_what_an_environment_does_wrong_is_said_with_the_step_and_the_seed(options: dict[str, int], words: str) -> None:
    episodes = VectorEnvironment([Numbered(30, **options)], random_seeds(0))
    with pytest.raises(EnvironmentFailed, match=rf"3 of the episode with seed \d+: .*{words}"):
        for _ in range(100):
            episodes.step(np.zeros(1, np.int64))


def test_running_episodes_come_back_from_their_seeds_and_actions() -> None:
    first = single(3, 20)
    random = np.random.default_rng(0)
    for _ in range(25):
        first.step(random.integers(0, 5, 3))
    second = single(3, 20)
    second.load_state_dict(first.state_dict())
    for _ in range(25):
        actions = random.integers(0, 5, 3)
        a, b = first.step(actions), second.step(actions)
        assert np.array_equal(a.next_observations["observation"], b.next_observations["observation"])
        assert np.array_equal(first.is_first, second.is_first)


class Forgetful(Numbered):
    """Ignores its seed."""

    made = itertools.count(7)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=next(self.made))


def test_an_environment_that_does_not_repeat_itself_is_told() -> None:
    first = VectorEnvironment([Forgetful()], random_seeds(0))
    with pytest.raises(EnvironmentFailed, match="does not repeat itself"):
        VectorEnvironment([Forgetful()], random_seeds(0)).load_state_dict(first.state_dict())


def test_gymnasiums_own_vector_environments_are_collected_from() -> None:
    episodes = GymnasiumVectorEnvironment(
        gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point"), seed=0
    )
    replay = Replay(episodes.observation_spec, episodes.action_spec, 2, ReplayConfig(batch_size=2, window=64))
    acted = 0
    for _ in range(120):
        begun = np.flatnonzero(episodes.is_first)
        replay.begin(begun, {name: array[begun] for name, array in episodes.observations.items()})
        got = episodes.step(np.zeros(2, np.int64))
        acted += len(got.rows)
        replay.add(got.rows, got.rows * 0, got.rewards, got.terminated, got.truncated, got.next_observations)
    assert replay.added == acted < 240  # some steps only reset
    batch, _ = replay.sample()
    starts = batch.observations["observation"][batch.is_first]
    assert (starts.abs() <= 0.05).all()  # CartPole's initial range
