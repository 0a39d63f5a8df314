"""Recorded episodes: what was recorded is read, in batches of every step, and other files are refused in a line."""

import dataclasses
import json
import os
import zipfile

import gymnasium
import numpy as np
import pytest
import torch
from worldmodel_environments import Echo
from worldmodel_examples import small_model

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.acting.recording import record
from worldmodel.commands.train import train_from_source
from worldmodel.data.datasets import EpisodeFile, EpisodeWriter, RecordedSource
from worldmodel.data.source import Source
from worldmodel.environments.registry import EnvironmentFailed, make
from worldmodel.environments.vector import random_seeds
from worldmodel.learning.settings import TrainConfig
from worldmodel.runs import storage
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import RunError
from worldmodel.runs.run import Run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """3 episodes of Rooms with an own heading, the last of them cut."""
    path = tmp_path_factory.mktemp("recorded") / "rooms.npz"
    options = {"size": 6, "view": 3, "own_heading": True, "length": 40}
    assert record("worldmodel/Rooms-v0", path, 100, seed=1, env_args=options) == 3
    return path


def test_a_recording_repeats_in_the_environment(path):
    file = EpisodeFile(path)
    assert (file.steps, file.episodes) == (103, 3) and file.about["env_args"]["length"] == 40
    arrays = file.arrays
    environment = make("worldmodel/Rooms-v0", **file.about["env_args"])
    starts = np.flatnonzero(arrays["is_first"])
    assert starts.tolist() == [0, 41, 82] and np.flatnonzero(arrays["is_last"]).tolist() == [40, 81, 102]
    for episode, start in enumerate(starts):
        seen, info = environment.reset(seed=random_seeds(1)(episode))
        for step in range(start, start + 41):
            assert np.array_equal(arrays["observations/observation"][step][..., 0], seen)
            assert arrays["heading"][step] == info["heading"] and not arrays["terminated"][step]
            if arrays["is_last"][step]:
                assert not arrays["rewards"][step] and not arrays["displacement"][step].any()
                break
            seen, reward, _, _, info = environment.step(arrays["actions"][step])
            assert arrays["rewards"][step] == np.float32(reward)
            assert np.array_equal(arrays["displacement"][step], info["displacement"])
    assert np.load(path)["actions"].shape == (103,), "numpy reads it as well"


def test_the_exploring_policy_and_the_random_one(tmp_path):
    shares = []
    for policy in ("auto", "random"):
        record("worldmodel/Rooms-v0", tmp_path / "a.npz", 250, policy=policy, env_args={"size": 200, "view": 1})
        actions = EpisodeFile(tmp_path / "a.npz").arrays["actions"][:-1]
        shares.append((actions[1:] == actions[:-1]).mean())
    assert shares[0] > 0.7 and shares[1] < 0.35
    with pytest.raises(ConfigurationError, match="wmtest/Echo-v0 has no exploring policy: use random"):
        record("wmtest/Echo-v0", tmp_path / "b.npz", 10, policy="explore")
    assert os.listdir(tmp_path) == ["a.npz"], "nothing is left of what failed"


def test_times_terminations_and_errors(tmp_path):
    record("worldmodel/Drift-v0", tmp_path / "a.npz", 50, env_args={"pause": 4, "length": 20})
    arrays = EpisodeFile(tmp_path / "a.npz").arrays
    assert (
        set(arrays["elapsed"].tolist()) == {1.0, 2.0, 3.0, 4.0} and (arrays["elapsed"][arrays["is_first"]] == 1).all()
    )
    record("wmtest/Numbered-v0", tmp_path / "b.npz", 200)
    arrays = EpisodeFile(tmp_path / "b.npz").arrays
    ended = np.flatnonzero(arrays["is_last"])[:-1] - 1
    seeds = arrays["observations/observation"][ended, 0]
    assert np.array_equal(arrays["terminated"][ended], seeds % 3 != 0) and 0 < arrays["terminated"].sum() < len(ended)
    with pytest.raises(EnvironmentFailed, match="wmtest/Numbered-v0, action 3: ArithmeticError: the simulator broke"):
        record("wmtest/Numbered-v0", tmp_path / "c.npz", 200, env_args={"fail_at": 4, "longest": 100})


def test_every_step_is_in_one_row_of_an_epoch_and_every_batch_is_full(path):
    file = EpisodeFile(path)
    source, taken, read = RecordedSource(file, batch_size=4, window=10, seed=0), [], file.rows
    file.rows = lambda starts, window: taken.extend(starts) or read(starts, window)
    assert isinstance(source, Source) and len(source) == 10 and source.transitions == 100
    found = []
    for _ in range(15):
        batch, _ = source.sample()
        assert batch.shape == (4, 10) and source.epochs == (len(taken) - 1) // 10
        assert batch.is_first[:, 0].all() and batch.is_last[:, -1].all() and batch.valid.all()
        found.extend(batch.observations["observation"])
    for epoch in range(0, 60, 10):
        starts = np.sort(taken[epoch : epoch + 10])
        assert np.array_equal(np.diff(starts), [10] * 9) and 0 <= starts[0] <= 3
    for start, row in zip(taken, found, strict=True):
        assert np.array_equal(row.numpy(), file.arrays["observations/observation"][start : start + 10])
    assert source.rows()["displacement"].shape == (4, 10, 2)
    few = RecordedSource(EpisodeFile(path), batch_size=25, window=10)
    assert few.rows()["actions"].shape[0] == 25 and few.epochs == 2


def test_a_row_that_begins_inside_an_episode_has_no_loss_until_its_burn_in_or_the_next_episode(path):
    file, kinds = EpisodeFile(path), set()
    source = RecordedSource(file, batch_size=4, window=7, seed=0, burn_in=4)
    first, read, starts = file.arrays["is_first"], file.rows, []
    file.rows = lambda taken, window: starts.extend(taken) or read(taken, window)
    for _ in range(20):
        batch, _ = source.sample()
        for start, mask in zip(starts[-4:], batch.loss_mask, strict=True):
            begun = np.flatnonzero(first[start : start + 4])
            expected = int(begun[0]) if len(begun) else 4
            assert mask.tolist() == [False] * expected + [True] * (7 - expected)
            kinds.add(min(expected, 1) + (expected == 4))
    assert kinds == {0, 1, 2}, "at an episode's first step, with one in the burn-in, and with none"
    with pytest.raises(ConfigurationError, match="burn_in is 6, expected 0 to less than window - 1 = 6"):
        RecordedSource(file, batch_size=4, window=7, burn_in=6)


class Told(Echo):
    """Its ``info``, an environment's own, is ``told`` at every third step."""

    def __init__(self, told):
        super().__init__(length=7)
        self.told = told

    def reset(self, **options):
        return super().reset(**options)[0], {"heading": 271.5, "displacement": "far"}

    def step(self, action):
        *result, _ = super().step(action)
        return *result, self.told if len(self.seen) % 3 == 0 else {}


gymnasium.register("test/Told-v0", Told)


def test_an_environment_s_own_info_is_no_heading_and_no_displacement(tmp_path):
    for told, times in (
        ({"elapsed": 2.5}, [1, 1, 2.5, 1, 1, 2.5, 1, 1]),
        ({"heading": "north", "displacement": [1, 2, 3]}, [1] * 8),
        (None, [1] * 8),
    ):
        record("test/Told-v0", tmp_path / "told.npz", 14, env_args={"told": told})
        arrays = EpisodeFile(tmp_path / "told.npz").arrays
        assert arrays["elapsed"].tolist() == times * 2 and not {"heading", "displacement"} & arrays.keys()
    for wrong in ("long", float("nan"), -3):
        with pytest.raises(EnvironmentFailed, match=r"test/Told-v0, action 1: info\['elapsed'\] is "):
            record("test/Told-v0", tmp_path / "wrong.npz", 14, env_args={"told": {"elapsed": wrong}})
    assert os.listdir(tmp_path) == ["told.npz"]


def test_a_checkpoint_continues_the_epoch(path, tmp_path):
    source = RecordedSource(EpisodeFile(path), 4, 10, seed=3)
    source.sample()
    run = Run.create(tmp_path / "run", {})
    storage.save(run.folder / "source.safetensors", source.state_dict())
    again = RecordedSource(EpisodeFile(path), 4, 10, seed=4)
    again.load_state_dict(storage.load(run.folder / "source.safetensors"))
    for _ in range(5):
        first, second = source.sample()[0], again.sample()[0]
        assert torch.equal(first.observations["observation"], second.observations["observation"])
    with pytest.raises(RunError, match=r"other episodes than .*, or another window"):
        RecordedSource(EpisodeFile(path), 4, 11).load_state_dict(source.state_dict())
    run.close()


@pytest.mark.usefixtures("same_threads")
def test_a_world_model_learns_from_a_file_and_resumes_bit_for_bit(tmp_path):
    record("wmtest/Echo-v0", tmp_path / "echo.npz", 200)
    config = TrainConfig(model=small_model().config, updates=2, threads=1, open_loop_minutes=0)
    ends = []
    for name, stops in (("straight", (2,)), ("cut", (1, 2))):
        for index, updates in enumerate(stops):
            source = RecordedSource(EpisodeFile(tmp_path / "echo.npz"), batch_size=2, window=30)
            part = dataclasses.replace(config, updates=updates)
            run = train_from_source(part, source, tmp_path / name, resume=index > 0, quiet=True)
        ends.append(run.load("world_model"))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def damaged(path, tmp_path, change):
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    return tmp_path / "bad.npz"


def test_other_files_are_refused(path, tmp_path):
    def spec(**fields):
        def change(arrays):
            told = json.loads(arrays["spec"].tobytes())
            arrays["spec"] = np.frombuffer(json.dumps({**told, **fields}).encode(), np.uint8)

        return change

    for change, said in (
        (spec(format="worldmodel episodes 2"), "its format is worldmodel episodes 2, expected 'worldmodel episodes 1'"),
        (lambda arrays: arrays.pop("spec"), "its format is None"),
        (lambda arrays: arrays.pop("actions"), "it has no actions"),
        (lambda arrays: arrays.update(more=np.zeros(103)), "more is none of the layout's arrays"),
        (
            lambda arrays: arrays.update(rewards=np.zeros(103)),
            r"rewards is float64 \(103,\), expected float32 \(103,\)",
        ),
        (lambda arrays: arrays.update(actions=arrays["actions"][1:]), r"actions is int64 \(102,\), expected"),
        (lambda arrays: arrays["is_first"].fill(False), "is_first and is_last do not fit"),
        (lambda arrays: arrays.update(rewards=np.array([None] * 103)), "expected numbers"),
        (spec(observation={"modalities": {}}), "modalities"),
    ):
        with pytest.raises(RunError, match=said) as refused:
            EpisodeFile(damaged(path, tmp_path, change))
        assert "bad.npz" in str(refused.value) and "\n" not in str(refused.value)
    content = path.read_bytes()
    for cut in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.npz").write_bytes(content[:cut])
        with pytest.raises(RunError, match=r"cut\.npz is no file of episodes, or damaged"):
            EpisodeFile(tmp_path / "cut.npz")
    np.savez_compressed(tmp_path / "small.npz", **np.load(path))
    with pytest.raises(RunError, match=r"compressed or encrypted, expected arrays as numpy\.savez writes"):
        EpisodeFile(tmp_path / "small.npz")
    (tmp_path / "link.npz").symlink_to(path)
    with pytest.raises(RunError, match="symbolic link"):
        EpisodeFile(tmp_path / "link.npz")
    with pytest.raises(RunError, match="No such file"):
        EpisodeFile(tmp_path / "none.npz")


def test_a_header_that_promises_more_is_refused(path, tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000,), }"
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        content = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n" + bytes(16)
        archive.writestr("rewards.npy", content)
    with pytest.raises(RunError, match="rewards has another size than it says"):
        EpisodeFile(tmp_path / "large.npz")


@pytest.mark.parametrize("header", ["{'descr': (", "{[1]: 2}", "-" * 3000 + "1"], ids=["open", "unhashable", "deep"])
def test_a_header_that_python_cannot_read_is_refused(header, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("rewards.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(RunError, match=r"bad\.npz is no file of episodes, or damaged") as refused:
        EpisodeFile(tmp_path / "bad.npz")
    assert "\n" not in str(refused.value)


def test_an_archive_of_a_later_zip_is_refused(path, tmp_path):
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99  # version needed to read the first member
    (tmp_path / "later.npz").write_bytes(content)
    with pytest.raises(RunError, match="no file of episodes, or damaged: zip file version 9"):
        EpisodeFile(tmp_path / "later.npz")


def test_values_that_the_specs_do_not_have_are_told_when_read(path, tmp_path):
    for name, value, said in (
        ("observations/observation", 9, "expected classes below 9"),
        ("actions", 3, "expected integers from 0 and below"),
        ("rewards", np.nan, "rewards holds NaN"),
        ("displacement", np.inf, "displacement holds NaN or infinity"),
        ("heading", 10**15, "heading is from 1000000000000000 to 1000000000000000, expected quarter turns, 0 to 3"),
        ("heading", -1, "heading is from -1 to -1, expected"),
    ):
        bad = damaged(path, tmp_path, lambda arrays, n=name, v=value: arrays[n].fill(v))
        with pytest.raises(RunError, match=said):
            RecordedSource(EpisodeFile(bad), 4, 10).sample()


def test_errors_name_episode_and_step(path, tmp_path):
    """Episodes begin at the steps 0, 41 and 82."""

    def opened(name, index, value):
        return EpisodeFile(damaged(path, tmp_path, lambda arrays: arrays[name].__setitem__(index, value)))

    for index, place in ((44, "episode 1, step 3"), (81, "episode 1, step 40"), (82, "episode 2, step 0")):
        file = opened("actions", index, 3)
        with pytest.raises(RunError, match=rf"bad\.npz: {place}: episodes: actions has .*, expected integers"):
            file.rows(np.array([0, 40, 80]), 20)
        file.rows(np.array([0, 20]), 20)
        with pytest.raises(RunError, match=rf"bad\.npz: {place}: rewards holds NaN or infinity"):
            opened("rewards", index, np.inf)
        with pytest.raises(RunError, match=f"{place}: episodes: .*expected classes below 9"):
            opened("observations/observation", index, 9).rows(np.array([40]), 60)
    with pytest.raises(RunError, match="episode 0, step 30: is_first and is_last do not fit"):
        opened("is_last", 30, True)

    def short(arrays):
        arrays["is_last"][41] = arrays["is_first"][42] = True

    with pytest.raises(RunError, match="episode 1, step 0: the episode has one step and no action, expected two"):
        EpisodeFile(damaged(path, tmp_path, short))


def test_missing_continuous_actions_are_told(tmp_path):
    assert record("worldmodel/TwoRooms-v0", tmp_path / "a.npz", 9, env_args={"task": "walk", "length": 6}) == 2
    bad = damaged(tmp_path / "a.npz", tmp_path, lambda arrays: arrays["actions"].__setitem__(8, np.nan))
    with pytest.raises(RunError, match=r"bad\.npz: episode 1, step 1: episodes: actions has values from nan to nan"):
        RecordedSource(EpisodeFile(bad), 1, 11).sample()


def test_an_environment_s_own_policies_are_recorded(tmp_path):
    options = {"task": "walk", "length": 8}
    record("worldmodel/TwoRooms-v0", tmp_path / "walks.npz", 16, seed=3, env_args=options)
    file = EpisodeFile(tmp_path / "walks.npz")
    environment = make("worldmodel/TwoRooms-v0", **options).unwrapped
    for episode in range(2):
        environment.reset(seed=random_seeds(3)(episode))
        for step in range(8):
            walked = environment.explore()
            taken = file.action_spec.to_env(file.arrays["actions"][9 * episode + step])
            assert np.allclose(taken, walked, atol=1e-5)
            observation = environment.step(walked)[0]
            seen = file.arrays["observations/observation"][9 * episode + step + 1]
            assert np.abs(observation.astype(int) - seen).max() <= 1
    record("worldmodel/Arm-v0", tmp_path / "arm.npz", 70, policy="scripted", env_args={"task": "push"})
    arrays = EpisodeFile(tmp_path / "arm.npz").arrays
    ended = np.flatnonzero(arrays["terminated"])
    assert len(ended) and (arrays["rewards"][ended] == 1).all() and arrays["rewards"].sum() == len(ended)
    assert np.abs(arrays["actions"]).max() <= 1
    for env, policy, said in (
        ("worldmodel/Arm-v0", "explore", "worldmodel/Arm-v0 has no exploring policy: use scripted or random"),
        ("worldmodel/TwoRooms-v0", "scripted", "worldmodel/TwoRooms-v0 has no scripted policy: use explore or random"),
        ("wmtest/Echo-v0", "agent", "policy is 'agent' and the agent none, expected both or neither"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            record(env, tmp_path / "none.npz", 5, policy=policy)
    assert not (tmp_path / "none.npz").exists()


def test_an_agent_is_recorded_as_it_acts(tmp_path):
    model = small_model(gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(2), torch.float32)
    agent = Agent(model, model.observation_spec, model.action_spec)
    record("wmtest/Echo-v0", tmp_path / "a.npz", 25, agent=agent)
    arrays, state = EpisodeFile(tmp_path / "a.npz").arrays, None
    for step, last in enumerate(arrays["is_last"]):
        if not last:
            seen = int(arrays["observations/observation"][step, 0])
            action, state = agent.act(seen, state, bool(arrays["is_first"][step]))
            assert action == arrays["actions"][step]
    three = small_model(gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(3), torch.float32)
    other = Agent(three, three.observation_spec, three.action_spec)
    with pytest.raises(ConfigurationError, match="the agent was trained on other actions than wmtest/Echo-v0's"):
        record("wmtest/Echo-v0", tmp_path / "b.npz", 5, agent=other)
    with pytest.raises(ConfigurationError, match=r"'observation' is Box.*, which cannot be read as 'categorical'"):
        record("wmtest/Numbered-v0", tmp_path / "b.npz", 5, agent=agent)
    with pytest.raises(ConfigurationError, match="policy is 'random' and the agent given, expected both or neither"):
        record("wmtest/Echo-v0", tmp_path / "b.npz", 5, agent=agent, policy="random")


def test_a_negative_time_is_refused(path, tmp_path):
    times = np.linspace(-5, 5, 103, dtype=np.float32)
    with pytest.raises(RunError, match=r"elapsed is from -5\.0 to 5\.0, expected times of at least 0"):
        EpisodeFile(damaged(path, tmp_path, lambda arrays: arrays.update(elapsed=times)))


def test_bad_rows_and_steps_are_told(path, tmp_path):
    for batch_size, window in ((0, 10), (4, 1), (4, 104)):
        with pytest.raises(ConfigurationError, match="from 2 to the 103 steps"):
            RecordedSource(EpisodeFile(path), batch_size, window)
    file = EpisodeFile(path)
    seen = {"observation": np.zeros((3, 3, 1))}
    for steps, said in (
        ([seen, {"speed": 3}], r"\['speed'\] were not given at the first step"),
        ([{"observation": [1, 2]}], r"observations/observation has shape \(2,\), expected \(3, 3, 1\)"),
        ([], "no step was added"),
    ):
        with (
            pytest.raises(ValueError, match=said),
            EpisodeWriter(tmp_path / "a.npz", file.observation_spec, file.action_spec) as writer,
        ):
            for step in steps:
                writer.step(seen, **step) if "speed" in step else writer.step(step)
    assert not os.listdir(tmp_path)


def test_the_command_records(tmp_path, capsys):
    out = str(tmp_path / "drift.npz")
    arguments = ["--env", "worldmodel/Drift-v0", "--env-args", "length=30", "--steps", "40", "--out", out]
    assert main(["record", *arguments]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == out and "40 steps in 2 episodes of worldmodel/Drift-v0" in said.err
    assert EpisodeFile(out).steps == 42
    assert main(["record", "--env", "worldmodel/Drift-v0", "--out", "drift.txt"]) == 1
    assert "--out is 'drift.txt', expected a name that ends with .npz" in capsys.readouterr().err
    assert main(["record", "--env", "worldmodel/Drift-v0", "--out", out, "--trust"]) == 1
    assert "--trust is of the run of an agent: --agent is missing" in capsys.readouterr().err
    assert main(["record"]) == 1 and "--env is missing" in capsys.readouterr().err
