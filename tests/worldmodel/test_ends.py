"""How commands end: signals, a full disk, a terminal that is gone."""

import errno
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import worldmodel_environments
from worldmodel_examples import tiny_options

from worldmodel.__main__ import main
from worldmodel.acting import rollout
from worldmodel.acting.agent import Agent
from worldmodel.commands import display, evaluate, imagine
from worldmodel.commands.options import train_options
from worldmodel.commands.train import train
from worldmodel.demo import command as demo
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import Trainer
from worldmodel.runs import storage
from worldmodel.runs.run import Run

ECHO = "worldmodel_environments:wmtest/Echo-v0"
FEW = ("--num-envs", "2", "--prefill", "20", "--train-ratio", "8", "--threads", "1", "--open-loop-minutes", "0")
OFTEN = ("--log-seconds", "1e-9", "--save-minutes", "1e-9")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
pytestmark = pytest.mark.usefixtures("same_threads", "terminal_signals")


def arguments(folder: Path, *more: str) -> list[str]:
    return ["train", "--env", ECHO, "--run", str(folder), *FEW, *tiny_options(), *more]


def config(*more: str) -> TrainConfig:
    return train_options(["--env", ECHO, *FEW, *tiny_options(), *more])[0]


def at(steps: int, happens: Any, patch: pytest.MonkeyPatch) -> None:
    """``happens`` after the iteration that reaches ``steps``."""
    real = Trainer.iterate

    def iterate(self: Trainer) -> None:
        real(self)
        if self.steps == steps:
            happens()

    patch.setattr(Trainer, "iterate", iterate)


def ask(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def partial(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "partial" in path.name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "echo"
    assert main(arguments(folder, "--steps", "40")) == 0
    return folder


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_the_exit_status_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    # A closing terminal and `timeout` send theirs twice.
    at(30, lambda: ask(number, *[number] * (number != signal.SIGINT)), monkeypatch)
    assert main(arguments(tmp_path / "run", "--steps", "100")) == 128 + number
    assert [path.name for path in Run(tmp_path / "run").checkpoints] == ["000000000030"]
    assert f"interrupted and saved; go on with --resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(20, lambda: ask(signal.SIGHUP), monkeypatch)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(arguments(tmp_path / "run", "--steps", "22")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert Run(tmp_path / "run").checkpoints[-1].name == f"{22:012d}"


def test_a_second_ctrl_c_leaves_the_older_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(folder)], check=True)
    real = storage._write

    def interrupted(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        real(tensors, path, metadata)
        ask(signal.SIGINT, signal.SIGINT)

    monkeypatch.setattr(storage, "_write", interrupted)
    capsys.readouterr()
    assert main(["train", "--resume", str(folder), "--steps", "42"]) == 130
    kept = Run(folder).checkpoints
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted without saving; the newest checkpoint is {kept[0]}"
    assert [path.name for path in kept] == [f"{40:012d}"] and not partial(folder)


@pytest.mark.parametrize(
    ("place", "name", "command"),
    [
        (Agent, "load", "evaluate"),
        (Agent, "act_encoded", "evaluate"),
        (evaluate, "parse", "evaluate"),
        (Agent, "act_encoded", "imagine"),
        (imagine, "draw_gif", "imagine"),
        (Trainer, "__init__", "train"),
        (demo, "run_memory", "demo"),
    ],
)
def test_ctrl_c_anywhere_is_one_line(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: Any,
    name: str,
    command: str,
) -> None:
    given = {"train": arguments(tmp_path / "run")[1:], "demo": ["memory"]}.get(command, [str(trained)])
    monkeypatch.setattr(place, name, lambda *arguments, **options: ask(signal.SIGINT))
    capsys.readouterr()
    assert main([command, *given]) == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted"]


def test_ctrl_c_that_an_import_turns_into_its_own_error_is_one_line_too(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def imported(*arguments: Any) -> None:
        try:
            ask(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("numpy.core.multiarray failed to import") from error

    monkeypatch.setattr(evaluate, "parse", imported)
    assert main(["evaluate", str(trained)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupted_demonstration_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*given: Any, **options: Any) -> "subprocess.Popen[bytes]":
        started.append(real(*given, **options))
        return started[-1]

    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(demo.subprocess, "Popen", popen)
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: ask(signal.SIGINT))
    assert main(["demo", "memory", "--folder", str(tmp_path / "demo"), "--processes", "3"]) == 130
    assert len(started) == 3 and all(process.returncode == -signal.SIGTERM for process in started)
    # Ctrl-C in a terminal does not reach them, so they print nothing.
    assert capsys.readouterr().err == "interrupted\n"


@pytest.fixture
def disk() -> Iterator[Any]:
    """``disk(bytes)``: no file of this process grows beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], disk: Any
) -> None:
    straight = train(config("--steps", "40"), tmp_path / "straight", quiet=True)
    folder, found = tmp_path / "run", {}

    def look() -> None:
        found.update({path.name: list(path.iterdir()) for path in Run(folder).checkpoints})
        assert not partial(folder)
        disk(resource.RLIM_INFINITY)

    with monkeypatch.context() as patch:
        at(24, lambda: disk(2000), patch)
        at(34, look, patch)
        run = train(config("--steps", "40", *OFTEN), folder)
    said = capsys.readouterr().err
    assert sorted(found) == [f"{20:012d}", f"{22:012d}"] and {len(files) for files in found.values()} == {5}
    for what in ("the log", "a checkpoint"):
        assert said.count(f"warning: {what} cannot be written, and training goes on: [Errno {errno.EFBIG}]") == 1
    steps = [json.loads(line)["steps"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and 22 in steps and 30 not in steps and steps[-1] == 40
    for name, value in straight.load("world_model").items():
        assert torch.equal(value, run.load("world_model")[name])


def test_a_last_checkpoint_without_room_is_an_error_that_names_the_one_before(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], disk: Any
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(folder)], check=True)
    at(42, lambda: disk(2000), monkeypatch)
    assert main(["train", "--resume", str(folder), "--steps", "44", "--log-seconds", "60"]) == 1
    kept = Run(folder).checkpoints
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the last checkpoint cannot be written: ") and last.endswith(f"is {kept[-1]}")
    assert [path.name for path in kept] == [f"{40:012d}"] and not partial(folder)


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    at(20, lambda: ask(signal.SIGHUP), monkeypatch)
    assert main(arguments(tmp_path / "run", "--steps", "100")) == 128 + signal.SIGHUP
    assert Run(tmp_path / "run").checkpoints


class Endless(worldmodel_environments.Echo):
    def __init__(self) -> None:
        super().__init__(length=10**9)


def test_the_evaluation_of_an_endless_task_ends_and_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gymnasium.register("wmtest/Endless-v0", Endless)
    clock = iter(range(10**9))
    monkeypatch.setattr(display.time, "monotonic", lambda: 5.0 * next(clock))
    monkeypatch.setattr(rollout, "MAX_STEPS", 30)
    target = tmp_path / "found.json"
    given = ["evaluate", str(trained), "--env", "wmtest/Endless-v0", "--episodes", "5", "--num-envs", "2"]
    capsys.readouterr()
    try:
        assert main([*given, "--random-episodes", "3", "--json", str(target)]) == 0
        told = capsys.readouterr()
        assert main([*given, "--max-steps", "7", "--random-episodes", "0"]) == 0
        shorter = capsys.readouterr().out
    finally:
        del gymnasium.registry["wmtest/Endless-v0"]
    found = json.loads(target.read_text())
    assert found["lengths"] == [30] * 5 and found["cut"] == 5 and found["random"]["lengths"] == [30] * 3
    assert len(set(found["random"]["returns"])) > 1 and all(0 < total < 30 for total in found["random"]["returns"])
    assert "over 5 episodes, 5 of them cut after 30 steps (--max-steps)\nrandom policy: mean return" in told.out
    assert "wmtest/Endless-v0: 2 of 5 episodes, 6" in told.err and "steps per second, mean return so far" in told.err
    assert "5 of them cut after 7 steps" in shorter and "random" not in shorter
    agent = Agent.load(trained)  # an environment that ends by itself is not cut
    assert rollout.evaluate(agent, ECHO, 3).cut == 0 and rollout.evaluate(agent, ECHO, 3, max_steps=10).cut == 0


def test_words_come_at_the_right_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my run"
    assert main(arguments(folder, "--steps", "60", "--log-seconds", "1e-9")) == 0
    told = capsys.readouterr()
    assert "collecting 20 random steps first" in told.err and told.out == f"{folder}\n"
    assert told.err.splitlines()[-3:] == [
        "next:",
        f"  python -m worldmodel evaluate '{folder}'",
        f"  python -m worldmodel imagine '{folder}'",
    ]
    assert re.search(
        r"100%  60 steps  \d+ updates  \d+ s  [\d,]+ steps per second  about 0 s left  return \d", told.err
    )
    assert main(["train", "--resume", str(folder), "--steps", "62"]) == 0
    assert "random steps" not in capsys.readouterr().err


def test_a_run_that_ends_before_its_first_update_says_that_nothing_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", "--steps", "10")) == 0
    notice = "nothing is learned yet: the run ended after 10 steps, before its first update (--prefill: 20 random steps"
    assert notice in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "60"]) == 0
    assert "nothing is learned" not in capsys.readouterr().err


def test_time_left_and_a_smoothed_return() -> None:
    pace, settings = display.Pace(), TrainConfig(env=ECHO, steps=1000)
    assert pace.measure(settings, {"steps": 0, "updates": 0, "seconds": 0.0, "episodes": 0}) == {}
    first = pace.measure(settings, {"steps": 500, "updates": 0, "seconds": 1.0, "episodes": 50, "episode/return": 1.0})
    assert first == {"return": 1.0, "steps per second": 500.0}  # random steps are faster
    for second in range(2, 80):
        steps = 500 + 2 * second
        found = pace.measure(
            settings,
            {
                "steps": steps,
                "updates": second,
                "seconds": float(second),
                "episodes": 50 + second,
                "episode/return": 3.0,
            },
        )
    assert found["steps per second"] == pytest.approx(2.0) and found["seconds left"] == pytest.approx(171.0)
    assert 1.5 < found["return"] < 2.5
