"""Options that cannot work: one line on stderr, before anything runs, and nothing left on disk."""

import dataclasses
import itertools
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from worldmodel_examples import tiny_options

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.commands import evaluate, imagine
from worldmodel.commands import train as train_command
from worldmodel.commands.options import TrainOptions, train_options
from worldmodel.demo import command as demo
from worldmodel.runs.fields import Bounds, field_hints

ECHO = "worldmodel_environments:wmtest/Echo-v0"
START = ("--env", ECHO, "--num-envs", "2", "--threads", "1", *tiny_options())
KINDS = {
    "train": TrainOptions,
    "evaluate": evaluate.EvaluateOptions,
    "imagine": imagine.ImagineOptions,
    "demo": demo.MemoryDemoOptions,
}
pytestmark = pytest.mark.usefixtures("same_threads")


def leaves(kind: Any, example: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Options and annotations of a dataclass and of those in it, as in ``example``."""
    for name, hint in field_hints(kind).items():
        value, option = getattr(example, name, None), path + re.sub("_(?=.)", "-", name)
        for number, inner in enumerate(value) if isinstance(value, tuple) else ():
            if dataclasses.is_dataclass(inner):
                yield from leaves(type(inner), inner, f"{option}.{number}.")
        if dataclasses.is_dataclass(value):
            yield from leaves(type(value), value, f"{option}.")
        elif not (isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])):
            yield f"--{option}", hint


def wrong_values(hint: Any, bounds: Bounds | None = None) -> list[str]:
    """Values outside the type or the bounds of an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return wrong_values(arguments[0], hint.__metadata__[0])
    if type(None) in arguments:
        return wrong_values(next(each for each in arguments if each is not type(None)))
    if hint is int or hint is float:
        assert bounds is not None
        outside = [str(hint(bounds.low) - 1), str(hint(bounds.high) * 2)]
        return [*outside, *[str(hint(bounds.low))] * bounds.above, *["1.5"] * (hint is int), "nan", "inf", "", "x"]
    if hint is bool:
        return ["maybe"]
    if hint is str:
        return ["", "nowhere"]
    if hint is Path:
        return ["", "file", "file/below", "missing/name"]
    return ["", "neither"]


def ends_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail; returns what it said."""
    before = sorted(Path().rglob("*"))
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, said = capsys.readouterr()
    shown = [text[:80] for text in arguments]
    assert status != 0 and out == "", (shown, said)
    assert len(said.splitlines()) == 1 and said.startswith("error: ") and "Traceback" not in said, (shown, said)
    assert sorted(Path().rglob("*")) == before, shown
    return said


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a run and a file."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("options")
        patch.chdir(folder)
        assert main(["train", *START, "--run", "run", "--steps", "4", "--prefill", "0"]) == 0
        (folder / "file").touch()
        yield folder


def cases(command: str) -> Iterator[tuple[str, str]]:
    """All values; of numbers of ``train``, whose parser is slow, one each, in turn, and half of the nested options."""
    example = train_options([*START])[0] if command == "train" else None
    turn = itertools.count()
    for option, hint in leaves(KINDS[command], example):
        values = wrong_values(hint)
        if command == "train" and ("." in option or len(values) > 5):
            number = next(turn)
            values = [values[number // 2 % len(values)]] if "." not in option or number % 2 else []
        yield from ((option, value) for value in values)


# An empty folder is the working directory, in which `demo` may write; these names and texts may be given.
POSSIBLE = {
    ("demo", "--folder", ""),
    ("demo", "--folder", "missing/name"),
    ("imagine", "--output", "file"),
    ("imagine", "--output", "missing/name"),
    ("train", "--run", "missing/name"),
    ("evaluate", "--json", "file"),
    ("imagine", "--json", "file"),
}


@pytest.mark.parametrize("command", KINDS)
def test_a_value_that_cannot_work_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(train_command, "_run", lambda *_: pytest.fail("it runs"))
    monkeypatch.setattr(Agent, "act_encoded", lambda *_: pytest.fail("it runs"))
    monkeypatch.setattr(demo, "_run_all", lambda *_: pytest.fail("it runs"))
    start = {"train": list(START), "demo": ["memory"]}.get(command, ["run"])
    tried = set()
    for option, value in cases(command):
        if (command, option, value) in POSSIBLE:
            continue
        given = [value] if option == "--run" and command in ("evaluate", "imagine") else [*start, option, value]
        said = ends_in_one_line([command, *given], capsys)
        assert option in said or option[2:] in said or value in said, said
        tried.add(option)
    assert len(tried) >= {"train": 45, "evaluate": 13, "imagine": 12, "demo": 5}[command]


CONTRADICTIONS = {
    "train --action-steps 4": "--action-steps is 4, which is of recorded episodes, and data is not given",
    "train --random-envs 3": "--random-envs is 3, expected at least 0 and at most num_envs = 2",
    "train --replay.window 24 --replay.burn-in 23": "--replay.burn-in is 23, expected at least 0 and below window - 1",
    "train --resume run --run other": "--run names a new run and --resume one that exists: give one of them",
    "train --resume run --init-from run": "give one",
    "train --resume run --new-episodes --unpickle": "give one of them",
    "train --new-episodes": "--resume is missing",
    "train --unpickle": "--resume is missing",
    "train --resume run --seed 3": "seed is 0 there and 3 here",
    "train --resume run --replay.window 30": "replay.window is 24 there and 30 here",
    "train --run run": "run exists and is not empty; go on with it by --resume run, or name another",
    "train --model.memory.blocks.0.groups 3": "expected groups to divide",
    "train --preset popgym --model.memory.blocks.0.d-state 3": "an even number",
    "train --preset control --memory gru --model.memory.blocks.0.d-state 4": "no option --model.memory",
    "train --kinds state=image": "state",
    "train --env-args lengt=3": "lengt",
    "imagine run --random --sample": "--random and --sample both say which actions are played: give one of them",
    "imagine run --env CartPole-v1": "CartPole-v1",
    "evaluate run --env CartPole-v1": "CartPole-v1",
    "evaluate run --env-args lengt=3": "lengt",
}


@pytest.mark.parametrize("given", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    monkeypatch.setattr(train_command, "_run", lambda *_: pytest.fail("it runs"))
    command, *options = given.split()
    start = START if command == "train" and not {"--resume", "--preset"} & set(options) else ()
    if "--preset" in options:
        start = ("--env", ECHO)
    assert CONTRADICTIONS[given] in ends_in_one_line([command, *start, *options], capsys)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train -x", "'-x' belongs to no option"),
        ("train --no-new-episodse", "there is no option --no-new-episodse, did you mean --new-episodes?"),
        ("train --stesp 3", "there is no option --stesp, did you mean --steps? --help lists all"),
        ("train --model.memory.blocks.0.d-sttae 3", "did you mean --model.memory.blocks.0.d-state?"),
        (
            "train --learner.policy-rate 1",
            "--learner.policy-rate is an option of an earlier release: use --learner.pol",
        ),
        ("imagine run --draw", "--draw is an option of an earlier release: use --sample-latents"),
        ("evaluate --epsiodes 3 run", "there is no option --epsiodes, did you mean --episodes?"),
        ("evaluate run more", "'more' belongs to no option"),
        ("evaluate", "PATH is missing: Folder of the run."),
        ("evaluate run --episodes", "--episodes has no value"),
        ("train --env", "--env has no value"),
        ("train --steps 1e3", "--steps is '1e3', expected a whole number"),
        ("imagine run --fps fast", "--fps is 'fast', expected a number"),
        ("demo memory --secnds 3", "did you mean --seconds?"),
        ("demo memroy", "there is no demonstration 'memroy', expected memory, worlds, radar, plan or arm"),
    ],
)
@pytest.mark.parametrize("columns", ["40", None])
def test_what_cannot_be_parsed_is_one_line_that_names_the_option(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
    message: str,
    columns: str | None,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert message in ends_in_one_line(given.split(), capsys)
    assert os.environ.get("COLUMNS") == columns
