"""Exact resumption; loading a run executes nothing stored in it."""

import dataclasses
import itertools
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import worldmodel_environments

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.commands.options import train_options
from worldmodel.commands.train import train
from worldmodel.environments.batched import GymnasiumVectorEnvironment
from worldmodel.environments.making import make_environments
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.vector import VectorEnvironment, random_seeds
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import Trainer
from worldmodel.runs import storage
from worldmodel.runs.run import Run, RunError

SMALL = ("--replay.window", "24", "--replay.batch-size", "2", "--replay.burn-in", "4", "--model.perception.hidden", "8")
FEW = ("--num-envs", "2", "--prefill", "20", "--train-ratio", "8", "--threads", "1", "--steps", "60")
pytestmark = pytest.mark.usefixtures("same_threads")


class Unseeded(worldmodel_environments.Echo):
    """Ignores its seed."""

    def __init__(self) -> None:
        super().__init__(length=100)
        self.random = np.random.default_rng(7)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seen = [int(self.random.integers(2))]
        return self.seen[-1], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        right = action == self.seen[-1]
        self.seen.append(int(self.random.integers(2)))
        return self.seen[-1], float(right), len(self.seen) > self.length, False, {}


class Easy(worldmodel_environments.Echo, gymnasium.utils.EzPickle):
    """Its pickle loses the current state."""

    def __init__(self) -> None:
        worldmodel_environments.Echo.__init__(self)
        gymnasium.utils.EzPickle.__init__(self)


class Costly(worldmodel_environments.Echo):
    """All returns are negative."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        return (observation, reward - 3.0, *rest)


def together(num_envs: int) -> Any:
    return gymnasium.vector.SyncVectorEnv([worldmodel_environments.Echo] * num_envs)


@pytest.fixture(autouse=True)
def environments() -> Iterator[None]:
    entries = {"Unseeded": Unseeded, "Easy": Easy, "Costly": Costly}
    for name, entry in entries.items():
        gymnasium.register(f"wmtest/{name}-v0", entry)
    gymnasium.register("wmtest/Together-v0", vector_entry_point=together)
    yield
    for name in (*entries, "Together"):
        del gymnasium.registry[f"wmtest/{name}-v0"]


def config(name: str, **changes: Any) -> TrainConfig:
    found, _, _ = train_options(["--env", f"wmtest/{name}-v0", *FEW, *SMALL])
    return dataclasses.replace(found, **changes)


def test_a_run_whose_returns_are_negative_goes_on(tmp_path: Path) -> None:
    run = train(config("Costly", steps=60), tmp_path / "run", quiet=True)
    saved = run.load("learner")["returns"]
    assert saved["low"] <= saved["high"] < 0
    assert train(config("Costly", steps=64), run.folder, resume=True, quiet=True).metrics[-1]["steps"] == 64


def test_a_limit_of_updates_is_exact_and_a_resumed_run_goes_on_inside_an_iteration(tmp_path: Path) -> None:
    def limited(updates: int) -> TrainConfig:
        return config("Easy", updates=updates, steps=None, train_ratio=80)  # three or four updates per iteration

    straight = train(limited(9), tmp_path / "straight", quiet=True)
    for updates in (1, 5, 9):
        run = train(limited(updates), tmp_path / "run", resume=updates > 1, quiet=True)
        assert run.load("trainer")["updates"] == updates == run.metrics[-1]["updates"]
    assert run.checkpoints[-1].name == straight.checkpoints[-1].name
    for name, value in straight.load("world_model").items():
        assert torch.equal(value, run.load("world_model")[name])


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.world_model.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    kept = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def interrupted(settings: TrainConfig, folder: Path) -> tuple[Run, dict[str, torch.Tensor]]:
    """A run saved within episodes; its weights 20 steps later."""
    run = Run.create(folder, {"train": {}, "spaces": {}})
    trainer = Trainer(settings)
    for _ in range(25):
        trainer.iterate()
    run.save(trainer.steps, trainer.state_dict())
    for _ in range(20):
        trainer.iterate()
    return run, weights(trainer)


def gone_on(settings: TrainConfig, run: Run, **how: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(99)  # another process has another generator state
    trainer = Trainer(settings)
    trainer.load(run, **how)
    for _ in range(20):
        trainer.iterate()
    return weights(trainer)


@pytest.mark.parametrize(
    ("name", "state"), [("Locked", "replay"), ("Unseeded", "pickle"), ("Together", "pickle"), ("Together", "replay")]
)
def test_a_run_goes_on_exactly_where_its_environments_can_be_kept(tmp_path: Path, name: str, state: str) -> None:
    settings = config(name, environment_state=state)
    run, expected = interrupted(settings, tmp_path / "run")
    if (name, state) == ("Together", "replay"):
        with pytest.raises(RunError, match="a vector environment of its own, whose episodes cannot be played again"):
            gone_on(settings, run)
        return
    found = gone_on(settings, run, unpickle=state == "pickle")
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_an_environment_that_does_not_repeat_itself_is_refused_however_little_of_it_shows(tmp_path: Path) -> None:
    settings = config("Unseeded")
    run, _ = interrupted(settings, tmp_path / "run")
    before = contents(run.folder)
    with pytest.raises(RunError) as refused:
        gone_on(settings, run)
    said = str(refused.value)
    assert "does not repeat itself" in said and f"--resume {run.folder} --new-episodes" in said
    # The last observation, one of two values, often agrees.
    saved = run.load("collector")["episodes"]
    agreed = set()
    for seed in range(100, 140):
        episodes = make_environments("wmtest/Unseeded-v0", 2, 0)
        for environment in episodes.environments:  # type: ignore[union-attr]
            environment.unwrapped.random = np.random.default_rng(seed)  # type: ignore[attr-defined]
        with pytest.raises(EnvironmentFailed, match="does not repeat itself"):
            episodes.load_state_dict(saved)
        last = episodes.environments[0].unwrapped.seen[-1]  # type: ignore[union-attr]
        agreed.add(last == saved["observations"]["observation"][0, 0])
    assert agreed == {True, False}
    assert contents(run.folder) == before


@pytest.mark.parametrize("name", ["Unseeded", "Together"])
def test_new_episodes_begin_only_when_they_are_asked_for_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = str(tmp_path / "run")
    assert main(["train", "--env", f"wmtest/{name}-v0", "--run", folder, *FEW, *SMALL]) == 0
    said = capsys.readouterr().err
    assert ("goes on with other episodes alone (--new-episodes)" in said) == (name == "Together")
    before = contents(tmp_path / "run")
    assert main(["train", "--resume", folder, "--steps", "80"]) == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and f"--resume {folder} --new-episodes goes on" in said
    assert contents(tmp_path / "run") == before
    assert main(["train", "--resume", folder, "--new-episodes", "--steps", "80"]) == 0
    said = capsys.readouterr().err
    assert "going on after 60 steps" in said and "other episodes begin; those that ran are dropped" in said
    assert Run(folder).metrics[-1]["steps"] == 80


def test_new_episodes_are_none_of_those_before() -> None:
    first = VectorEnvironment([worldmodel_environments.Echo() for _ in range(2)], random_seeds(3))
    seeds = set(first.seeds)
    for _ in range(25):
        first.step(np.zeros(2, np.int64))
        seeds |= set(first.seeds)
    second = VectorEnvironment([worldmodel_environments.Echo() for _ in range(2)], random_seeds(3))
    second.begin_anew(first.state_dict(), 50)
    assert second.is_first.all() and not set(second.seeds) & seeds
    vectors = [
        GymnasiumVectorEnvironment(gymnasium.vector.SyncVectorEnv([worldmodel_environments.Numbered] * 2), 3)
        for _ in "ab"
    ]
    assert np.array_equal(vectors[0].observations["observation"], vectors[1].observations["observation"])
    seen = [vectors[0].observations["observation"]]
    for steps in (50, 60):
        vectors[1].begin_anew(None, steps)
        seen.append(vectors[1].observations["observation"])
    assert all((a[:, 0] != b[:, 0]).all() for a, b in itertools.combinations(seen, 2))


class Trap:
    """Creates a folder when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_read_only_when_it_is_allowed_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    pickling = ["--environment-state", "pickle", *FEW, *SMALL]
    assert main(["train", "--env", "wmtest/Unseeded-v0", "--run", str(folder), *pickling]) == 0
    # Bytes and JSON: the pickle in them needs permission.
    path = Run(folder).checkpoints[-1] / "collector.safetensors"
    saved = storage.load(path)
    saved["episodes"]["pickle"] = np.frombuffer(pickle.dumps(Trap(mark)), np.uint8)
    storage.save(path, saved)
    capsys.readouterr()
    Agent.load(folder)
    for arguments in ([], ["--environment-state", "replay"]):
        assert main(["train", "--resume", str(folder), "--steps", "80", *arguments]) == 1
        said = capsys.readouterr().err
        assert "reading a pickle runs whatever is written in it; --unpickle reads it, if you trust" in said
        assert "--new-episodes" in said
    assert main(["train", "--resume", str(folder), "--new-episodes", "--steps", "70"]) == 0
    assert not mark.exists()
    path = Run(folder).checkpoints[-1] / "collector.safetensors"
    assert main(["train", "--resume", str(folder), "--unpickle", "--steps", "80"]) == 0
    assert f"read from a pickle in {path.parent}, as --unpickle allows" in capsys.readouterr().err
    saved["episodes"]["pickle"] = np.frombuffer(pickle.dumps(Trap(mark)), np.uint8)
    storage.save(Run(folder).checkpoints[-1] / "collector.safetensors", saved)
    with pytest.raises(Exception):  # noqa: B017
        train(config("Unseeded", steps=90), folder, resume=True, unpickle=True, quiet=True)
    assert mark.exists()  # the trap works


def test_environments_that_cannot_be_pickled_are_refused_before_anything_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(worldmodel_environments.Locked())
    for name, words in (("Locked", "cannot pickle"), ("Easy", "says how it was made, not where it is")):
        arguments = ["--env", f"wmtest/{name}-v0", "--environment-state", "pickle", *FEW, *SMALL]
        assert main(["train", "--run", str(tmp_path / name), *arguments]) == 1
        said = capsys.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1
        assert not (tmp_path / name).exists()


def test_options_that_say_how_to_go_on_need_a_run_to_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "run")
    for option in ("--new-episodes", "--unpickle"):
        assert main(["train", "--env", "wmtest/Locked-v0", option, "--run", folder, *FEW, *SMALL]) == 1
        assert "--resume is missing" in capsys.readouterr().err
    assert main(["train", "--env", "wmtest/Locked-v0", "--run", folder, *FEW, *SMALL]) == 0
    assert main(["train", "--resume", folder, "--new-episodes", "--unpickle"]) == 1
    assert "give one of them" in capsys.readouterr().err
    assert main(["train", "--resume", folder, "--unpickle", "--steps", "70"]) == 0
    assert "there is no pickle to read" in capsys.readouterr().err
