"""Runs of somebody else: nothing in them is executed, written outside, or believed before it is checked."""

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from worldmodel_examples import tiny_options

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.learning.settings import saved_config, saved_specs
from worldmodel.learning.trainer import Trainer, TrainingFailed
from worldmodel.model.world_model import outline
from worldmodel.runs import files, storage
from worldmodel.runs.memory import machine_memory
from worldmodel.runs.run import Run, RunError
from worldmodel.runs.sequences import Sequences

ECHO = "worldmodel_environments:wmtest/Echo-v0"
FEW = ("--num-envs", "2", "--prefill", "20", "--train-ratio", "8", "--threads", "1", "--open-loop-minutes", "0")
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "evaluate": lambda run: ["evaluate", str(run), "--episodes", "1", "--random-episodes", "0", "--threads", "1"],
    "imagine": lambda run: ["imagine", str(run), "--horizon", "2", "--context", "2", "--threads", "1"],
    "resume": lambda run: ["train", "--resume", str(run), "--steps", "42"],
    "init-from": lambda run: ["train", "--init-from", str(run), "--run", f"{run}-new", "--steps", "20", *FEW[2:4]],
}
HOSTILE = """
    from pathlib import Path
    Path(__file__).with_name("executed").touch()
    import gymnasium
    from worldmodel.model.blocks import GRU
    class Block(GRU):
        pass
    def make() -> gymnasium.Env:
        return gymnasium.make("worldmodel_environments:wmtest/Echo-v0")
"""
pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "honest"
    assert main(["train", "--env", ECHO, "--run", str(folder), *FEW, *tiny_options(), "--steps", "40"]) == 0
    return folder


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "run"))


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that stays as it is."""
    folder = tmp_path / "outside"
    (folder / "000000000007").mkdir(parents=True)
    for name in ("file", "left.partial", "000000000007/world_model.safetensors"):
        (folder / name).write_text("mine")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def changed(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What was said, in one line."""
    capsys.readouterr()
    assert main(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said.isprintable() and len(said) < 1500
    return said


def named(run: Path, kind: str, module: str) -> None:
    def change(config: dict[str, Any]) -> None:
        if kind == "environment":
            config["train"]["env"] = f"{module}:make"
        else:
            config["train"]["model"]["memory"]["blocks"] = [
                {"kind": "custom", "block": f"{module}:Block", "options": {}}
            ]

    changed(run, change)


# Code


@pytest.mark.parametrize("kind", ["environment", "block"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_run_names_and_is_not_installed_is_not_executed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, kind: str
) -> None:
    module = f"hostile_{command.replace('-', '_')}_{kind}"
    named(run, kind, module)
    (run / f"{module}.py").write_text(textwrap.dedent(HOSTILE))
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "path", ["", str(run), *sys.path])
    if kind == "block" and command == "imagine":  # a package without __init__.py
        (run / module).mkdir()
        (run / f"{module}.py").rename(run / module / "inner.py")
        named(run, kind, f"{module}.inner")
    said = refused(capsys, COMMANDS[command](run))
    assert f"'{module}' is not installed but found in {run / module}" in said and "--trust" in said
    assert not [*run.rglob("executed")] and module not in sys.modules
    monkeypatch.delitem(sys.modules, module, raising=False)
    main([*COMMANDS[command](run), "--trust"])
    assert [*run.rglob("executed")]


def test_a_process_in_the_folder_of_a_run_executes_none_of_its_files(run: Path) -> None:
    named(run, "environment", "hostile")
    # The working directory comes first in Python's search; torch looks for dill, and for plugins.
    for name in ("hostile", "tyro", "popgym", "numpy", "dill", "plugin"):
        (run / f"{name}.py").write_text(textwrap.dedent(HOSTILE))
    (run / "plugin-1.0.dist-info").mkdir()
    (run / "plugin-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (run / "plugin-1.0.dist-info" / "entry_points.txt").write_text("[torch.backends]\nplugin = plugin:make\n")
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    command = [sys.executable, "-m", "worldmodel", *COMMANDS["evaluate"](Path("."))]
    ended = subprocess.run(command, cwd=run, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert ended.returncode == 1 and "'hostile' is not installed" in ended.stderr, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1 and not (run / "executed").exists()


@pytest.mark.parametrize(
    "name",
    [
        "os:getcwd",
        "this",
        "pip.__main__:main",
        ".hostile:make",
        "../hostile:make",
        "a b:c",
        "subprocess:Popen",
        "a:b:c",
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "resume"])
def test_names_of_what_is_no_environment_and_no_block_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    changed(run, lambda config: config["train"].update(env=name))
    refused(capsys, COMMANDS[command](run))
    block = {"kind": "custom", "block": name, "options": {}}
    changed(run, lambda config: config["train"].update(env=ECHO))
    changed(run, lambda config: config["train"]["model"]["memory"].update(blocks=[block]))
    refused(capsys, COMMANDS[command](run))


@pytest.mark.parametrize("kind", ["environment", "block"])
def test_a_run_below_an_entry_of_the_path_is_no_package(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    named(run, kind, "run.hostile")
    (run / "hostile.py").write_text(textwrap.dedent(HOSTILE))
    monkeypatch.setattr(sys, "path", [str(run.parent), *sys.path])
    said = refused(capsys, COMMANDS["evaluate"](run))
    assert f"'run.hostile:{'make' if kind == 'environment' else 'Block'}', which is in the run's folder" in said
    assert not (run / "executed").exists()


def test_an_environments_arguments_have_any_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("name", "num_envs", "id", "self"):
        changed(run, lambda config, name=name: config["train"].update(env_args={name: "x"}))  # type: ignore[misc]
        for command in ("evaluate", "resume", "imagine"):
            assert "cannot be made: TypeError" in refused(capsys, COMMANDS[command](run))


def test_what_the_user_asks_for_is_imported_from_the_working_directory(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_own_module.py").write_text(textwrap.dedent(HOSTILE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert main([*COMMANDS["evaluate"](run), "--env", "my_own_module:make"]) == 0
    options = ["--run", "new", *FEW, *tiny_options(), "--steps", "20"]
    assert main(["train", "--env", "my_own_module:make", *options]) == 0
    assert "worldmodel evaluate new --trust" in capsys.readouterr().err  # what another process needs


# Links


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("imagine", "imagined.png"),
        ("imagine", "imagined.gif"),
        ("imagine", "imagined.PID.partial.png"),
        ("resume", "config.json"),
        ("resume", "config.PID.partial.json"),
        ("resume", "config.json.partial"),
        ("resume", "metrics.jsonl"),
        ("resume", "lock"),
        ("resume", "tensorboard/events"),
    ],
)
def test_a_linked_file_is_neither_followed_nor_written(
    run: Path, outside: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = name.replace("PID", str(os.getpid()))
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "file")
    status = main(COMMANDS[command](run))
    said = capsys.readouterr().err
    if name in ("config.json", "metrics.jsonl", "lock", "tensorboard/events"):  # read, or appended to
        assert status == 1 and f"{run / name} is a symbolic link" in said
    else:
        assert status == 0 and ("partial" in name or not (run / name).is_symlink())


@pytest.mark.parametrize("command", ["evaluate", "resume"])
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/000000000040", "tensorboard", "checkpoints/left.partial"])
def test_a_linked_folder_is_neither_read_nor_cleared(
    run: Path, outside: Path, name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(outside, target_is_directory=True)
    status = main(COMMANDS[command](run))
    if name == "checkpoints/left.partial" or (name, command) == ("tensorboard", "evaluate"):
        assert status == 0  # not needed, or removed alone
    else:
        assert status == 1 and "is a symbolic link" in capsys.readouterr().err


def test_linked_weights_and_files_that_are_none_are_refused(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Run(run).checkpoints[-1] / "world_model.safetensors"
    weights.rename(outside.parent / "elsewhere")
    weights.symlink_to(outside.parent / "elsewhere")
    assert "is a symbolic link" in refused(capsys, COMMANDS["evaluate"](run))
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")  # would wait for ever
    assert "not a regular file" in refused(capsys, COMMANDS["evaluate"](run))


def test_a_hard_link_is_not_written_through(run: Path, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lock", "metrics.jsonl"):
        (run / name).unlink(missing_ok=True)
        (run / name).hardlink_to(outside / "file")
    assert "lock is a hard link" in refused(capsys, COMMANDS["resume"](run))
    (run / "lock").unlink()
    with pytest.raises(RunError, match=r"metrics\.jsonl is a hard link"):
        Run(run).log({"steps": 1})


def test_saving_waits_for_nothing_that_lies_among_the_parts(run: Path) -> None:
    os.mkfifo(Run(run).checkpoints[-1] / "more.safetensors")
    (Run(run).checkpoints[-1] / "link.safetensors").symlink_to("more.safetensors")
    assert main(COMMANDS["resume"](run)) == 0


@pytest.mark.parametrize("name", ["../outside/part", "/etc/part", "a\nb", "", "a/b", "..", "a" * 200])
def test_the_name_of_a_part_is_no_path(run: Path, outside: Path, name: str) -> None:
    for act in (lambda: Run(run).load(name), lambda: Run(run).save(50, {name: 1})):
        with pytest.raises(RunError, match="cannot name a part"):
            act()


@pytest.mark.parametrize("name", ["../eye", "a/../b", "/eye", "\x1b[2J", "a\nb", "", "e" * 300, "\ud800"])
def test_the_name_of_an_observations_part_is_no_path(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def change(config: dict[str, Any]) -> None:
        modalities = config["spaces"]["observation"]["modalities"]
        modalities[name] = modalities.pop("observation")

    changed(run, change)
    said = refused(capsys, COMMANDS["evaluate"](run))
    assert "a part is named" in said or "control characters" in said


# Sizes


def test_ten_million_layers_are_refused_before_anything_is_allocated(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(run, lambda config: config["train"]["model"].update(memory={"kind": "gru", "width": 64, "layers": 10**12}))
    assert "blocks has 257 entries, expected at least 1 and at most 256" in refused(capsys, COMMANDS["evaluate"](run))


def test_weights_beyond_memory_and_beyond_the_checkpoint_are_refused_before_they_are_allocated(run: Path) -> None:
    specs, config = saved_specs(Run(run)), saved_config(Run(run))
    expected = outline(*specs, config.model, copies=2)
    assert (
        all(weight.is_meta for weight in expected.parameters())
        and expected.state_dict().keys() == Agent.load(run).world_model.state_dict().keys()
    )
    changed(run, lambda config: config["train"]["model"]["perception"].update(hidden=2**16, layers=256))
    with pytest.raises(ValueError, match=r"2 copies of its weights need [0-9,.]+ GiB, more than this machine's"):
        Agent.load(run)
    changed(run, lambda config: config["train"]["model"]["perception"].update(hidden=2**13, layers=2))
    with pytest.raises(RunError, match="holds the weights of another configuration"):
        Agent.load(run)


def test_the_machines_memory_is_the_least_of_its_limits(tmp_path: Path) -> None:
    groups = tmp_path / "sys" / "fs" / "cgroup"
    (groups / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/outer/inner\n")
    assert machine_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (groups / "outer" / "memory.max").write_text("4096\n")
    (groups / "outer" / "inner" / "memory.max").write_text("max\n")
    assert machine_memory(tmp_path) == 4096


def test_a_large_file_is_refused_before_it_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(Run(run).checkpoints[-1] / "world_model.safetensors", 2**43)  # of which the disk holds little
    assert "more than this machine's memory" in refused(capsys, COMMANDS["evaluate"](run))
    os.truncate(run / "config.json", 2**40)
    assert "bytes, expected at most" in refused(capsys, COMMANDS["evaluate"](run))


# JSON


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2]",
        b"null",
        b"{" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"format": 2, "train": ' + b'{"a": ' * 900 + b"1" + b"}" * 901,
        b'{"format": NaN}',
        b'{"format": 1e999}',
        b'{"format": true}',
        b'{"format": "2"}',
        b'{"format": 2' + b"0" * 10_000 + b"}",
        b'{"format": 2, "format": 2}',
        b'{"format": 2}',
        b'{"format": 2, "train": []}',
        b'{"format": 2, "train": {"model": {"perception": {"latent": 5, "variables": 3}}}}',
        b'{"format": 1, "train": {"model": {"memory": {"kind": [], "layers": "many"}}}, "spaces": 3}',
        b'{"format": 2, "\xff": 1}',
        b'{"format": 2, "train": "\\u001b[2J"}',
        b'{"format": 2, "train": "\\ud800"}',
        "{}".encode("utf-16"),
    ],
)
def test_json_of_any_kind_is_refused_in_a_line(run: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_bytes(content)
    for command in ("evaluate", "resume", "init-from"):
        refused(capsys, COMMANDS[command](run))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


BAD = (
    None,
    True,
    -1,
    0,
    10**30,
    2**16,
    1.5,
    -1e308,
    "",
    "../x",
    "a" * 70_000,
    [],
    [[]],
    {},
    {"kind": "scan"},
    [1] * 99,
)


def test_every_field_of_a_configuration_is_checked(run: Path, outside: Path) -> None:
    """Any value of any field is right, or refused in a line by an error of this package."""
    config = (run / "config.json").read_text()
    fields = [path for path in leaves(json.loads(config)) if path]
    assert len(fields) > 100
    accepted = 0
    for index, field in enumerate(fields):
        for number in range(3):
            whole = inner = json.loads(config)
            for key in field[:-1]:
                inner = inner[key]
            if number == 2:
                del inner[field[-1]]
            else:  # all values, over the fields
                inner[field[-1]] = BAD[(index * 2 + number) % len(BAD)]
            (run / "config.json").write_text(json.dumps(whole))
            try:
                Agent.load(run)
                accepted += 1
            except ValueError as error:
                assert type(error).__module__.startswith("worldmodel"), (field, number, error)
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 1500, (field, number, error)
    assert accepted < 1.5 * len(fields)


# Weights


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    storage.save(path, change(storage.load(path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {**w, "entry.weight": w["entry.weight"] * torch.nan},
            "has NaN or infinity in world_model, tensor entry.weight",
        ),
        (lambda w: {**w, "entry.bias": w["entry.bias"] / 0}, "has NaN or infinity in world_model, tensor entry.bias"),
        (lambda w: {**w, "entry.bias": w["entry.bias"][:3]}, r"entry.bias has shape \(3,\), expected"),
        (lambda w: {**w, "entry.bias": w["entry.bias"].double()}, "entry.bias has dtype torch.float64, expected"),
        (lambda w: {name: w[name] for name in w if name != "entry.bias"}, "entry.bias is missing"),
        (lambda w: {**w, "\x1b[2J../more": w["entry.bias"]}, r"\?\[2J../more is not known here"),
        (lambda w: list(w.values()), "has no dict of tensors"),
        (lambda w: {**w, "entry.bias": 3}, "has no dict of tensors"),
    ],
)
def test_weights_that_are_not_those_of_the_settings_are_named(
    run: Path, change: Callable[[Any], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(Run(run).checkpoints[-1] / "world_model.safetensors", change)
    for command in ("evaluate", "resume"):
        with pytest.raises(RunError, match=message):
            raise RunError(refused(capsys, COMMANDS[command](run)))
    if "NaN" in message:
        assert message in refused(capsys, COMMANDS["init-from"](run)) and not Path(f"{run}-new").exists()


OUTLINES = ("{}", "[]", '{"dict": 3}', '{"dict": [[[], 1]]}', '{"tensor": []}', '{"a": 1, "b": 2}', "[" * 50_000, "{")


@pytest.mark.parametrize("outline_text", OUTLINES)
def test_an_outline_of_any_kind_is_refused_in_a_line(
    run: Path, outline_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Run(run).checkpoints[-1] / "world_model.safetensors"
    tensors = {"world_model.entry.bias": torch.ones(3)}
    metadata = {"format": storage.FORMAT, "version": str(storage.VERSION), "outline": outline_text}
    metadata["schema"] = json.dumps({"tensors": dict.fromkeys(tensors)})
    metadata["checksum"] = storage._checksum(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)
    refused(capsys, COMMANDS["evaluate"](run))


BAD_STATES = (None, "x", -1, {"a": [1]}, torch.full((2, 3), torch.nan), [torch.zeros(5, dtype=torch.int64)])


def replaced(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    inside = replaced(state[path[0]], path[1:], value)
    if isinstance(state, dict):
        return {**state, path[0]: inside}
    return type(state)(inside if index == path[0] else inner for index, inner in enumerate(state))


def savable(state: Any) -> Any:
    """A replay's sequences as it saves them, where they are still some."""
    loaded = state.get("sequences") if isinstance(state, dict) else None
    if not isinstance(loaded, dict) or not all(isinstance(arrays, dict) for arrays in loaded.values()):
        return state
    arrays = {key: {name: np.asarray(array) for name, array in found.items()} for key, found in loaded.items()}
    sequences = Sequences(list(arrays), [], arrays.__getitem__)
    try:
        sequences.inline()
    except (ValueError, TypeError):
        return state
    return {**state, "sequences": sequences}


@pytest.mark.parametrize("part", ["trainer", "learner", "replay", "collector"])
def test_every_value_of_a_checkpoint_is_checked_on_resume(run: Path, part: str) -> None:
    """Training goes on with any value, or it is refused in a line."""
    path, state = Run(run).checkpoints[-1] / f"{part}.safetensors", Run(run).load(part)
    honest = path.read_bytes()
    trainer = Trainer(saved_config(Run(run)))
    accepted = 0
    fields = [*leaves(state)]
    fields = fields[:: math.ceil(len(fields) / 30)]
    for index, field in enumerate(fields):
        storage.save(path, savable(replaced(state, field, BAD_STATES[index % len(BAD_STATES)])))
        try:
            trainer.load(Run(run))
            trainer.iterate()
            trainer.update()
            accepted += 1
        except (RunError, TrainingFailed, EnvironmentFailed) as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1500, (field, error)
    assert accepted <= len(fields) / 2
    path.write_bytes(honest)
    trainer.load(Run(run))


def test_sequences_that_decompress_beyond_memory_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldmodel.runs.sequences.machine_memory", lambda: 0)
    monkeypatch.setattr("worldmodel.runs.sequences.zlib.decompressobj", None)  # before it is tried
    with pytest.raises(RunError, match="bytes once decompressed, which is beyond this machine's memory"):
        Run(run).load("replay")


# One writer


def test_a_second_writer_is_told_who_the_first_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Run.open_to_write(run)
    said = refused(capsys, COMMANDS["resume"](run))
    assert f"is being written by process {os.getpid()} on " in said and "begin another run" in said
    assert main(COMMANDS["evaluate"](run)) == 0  # reading needs no lock
    first.close()
    assert main(COMMANDS["resume"](run)) == 0 and (run / "lock").read_bytes() == b""


def test_the_lock_ends_with_its_process_however_that_ends_and_whatever_it_forked(run: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from worldmodel.runs.lock import Lock
held = Lock(Path({str(run)!r}))
if os.fork() == 0:
    print(flush=True)  # it has forgotten the lock
    time.sleep(60)
sys.stdin.readline()
print(os.getpid(), flush=True)
time.sleep(60)
"""
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as first:
        assert first.stdin is not None and first.stdout is not None and first.stdout.readline() == b"\n"
        first.stdin.write(b"\n")
        first.stdin.flush()
        assert int(first.stdout.readline()) == first.pid
        with pytest.raises(RunError, match=f"process {first.pid} on .* since 20"):
            Run.open_to_write(run)
        first.kill()
        first.wait()
        Run.open_to_write(run).close()  # while the forked child lives
        os.killpg(first.pid, 9)


def test_hostile_text_in_a_lock_is_not_said(run: Path) -> None:
    first = Run.open_to_write(run)
    for content in ("", "[" * 9999, '{"pid": "\\u001b[2J", "host": 1, "since": 2}', "x" * 10_000):
        (run / "lock").write_text(content)
        with pytest.raises(RunError, match="is being written by another process, and a run has one writer"):
            Run.open_to_write(run)
    first.close()


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-120000")
    names = []
    for seed in range(3):
        assert main(["train", "--env", ECHO, *FEW, *tiny_options(), "--steps", "20", "--seed", str(seed)]) == 0
        names.append(capsys.readouterr().out.strip())
        assert saved_config(Run(names[-1])).seed == seed
    assert len({*names}) == 3 and names[2] == f"{names[0]}-3"


def test_a_folder_in_which_a_run_begins_is_not_begun_in_twice(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    first = Run.create(tmp_path / "empty", {})
    (tmp_path / "empty" / "config.json").unlink()  # as before the first has written it
    with pytest.raises(RunError, match="is being written by process"):
        Run.create(tmp_path / "empty", {})
    first.close()


def test_a_file_that_is_replaced_is_whole_or_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "text") as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    files.write_text(tmp_path / "text", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]
