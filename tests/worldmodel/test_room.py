"""Memory and disk are said at the start, and refused where they are not there."""

import re
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from worldmodel_examples import tiny_options

from worldmodel.__main__ import main
from worldmodel.data.replay import Replay, ReplayConfig
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.learning import room


def replay_of(num_envs: int, config: ReplayConfig, shape: tuple[int, ...] = (210, 160, 3)) -> Replay:
    space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
    actions = ActionSpec.from_space(gymnasium.spaces.Discrete(6))
    return Replay(ObservationSpec.from_space(space), actions, num_envs, config)


def test_a_replay_of_frames_holds_as_many_steps_as_it_says() -> None:
    replay = replay_of(4, ReplayConfig(window=16, burn_in=2, max_megabytes=10), (64, 64, 3))
    steps, nbytes = replay.capacity
    assert 0 <= 10 * 2**20 - nbytes < 64 * 64 * 3 and 680 < steps < nbytes / (64 * 64 * 3)
    rows, zeros = np.arange(4), np.zeros(4, bool)
    frames = {"observation": np.zeros((4, 64, 64, 3), np.uint8)}
    replay.begin(rows, frames)
    held = []
    for _ in range(400):
        replay.add(rows, rows, np.ones(4, np.float32), zeros, zeros, frames)
        assert replay.nbytes <= min(nbytes, replay.most_bytes(replay.added))
        held.append(replay.transitions + sum(each.length - each.burn_in for each in replay._writer.running.values()))
    # Of the unfinished windows, room that no step has taken yet, and a chunk that did not fit.
    assert steps - 5 * 16 <= max(held) <= steps and min(held[300:]) >= steps - 5 * 16


def test_the_memory_of_a_new_run_with_large_frames_is_that_of_its_first_steps() -> None:
    frame = 210 * 160 * 3
    replay = replay_of(32, ReplayConfig(batch_size=8, window=312, burn_in=32))
    assert replay.nbytes == 0  # nothing for windows that are not there
    replay.begin(np.arange(32), {"observation": np.zeros((32, 210, 160, 3), np.uint8)})
    assert 32 * frame < replay.nbytes < 8.1 * 32 * frame
    steps, nbytes = replay.capacity
    assert steps > 18_000 and 0 <= 2**31 - nbytes < 2 * frame
    assert replay.most_bytes(None) == nbytes and replay.most_bytes(64) < nbytes
    assert replay_of(32, ReplayConfig(window=312, burn_in=32, max_megabytes=100)).most_bytes() > 33 * 312 * frame
    with pytest.raises(ValueError, match="max_megabytes is 50, expected at least 60"):
        replay_of(32, ReplayConfig(window=312, burn_in=32, max_megabytes=50))


def start(folder: Path, *arguments: str) -> int:
    env = ("--env", "worldmodel_environments:wmtest/Echo-v0", "--num-envs", "2", "--steps", "20", "--prefill", "50")
    return main(["train", *env, *tiny_options(), "--threads", "1", "--run", str(folder), *arguments])


def test_a_batch_the_replay_and_a_checkpoint_are_said_before_anything_is_collected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "run") == 0
    lines = capsys.readouterr().err.splitlines()
    (at,) = (index for index, line in enumerate(lines) if line.startswith("one batch "))
    said = re.fullmatch(
        r"one batch 0\.\d kB; replay holds 400 steps \(\d+\.\d kB\); a checkpoint up to (\d+\.\d) kB", lines[at]
    )
    assert said
    assert at < next(index for index, line in enumerate(lines) if line.startswith("collecting"))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    files = [*checkpoint.iterdir(), *(tmp_path / "run" / "replay").iterdir()]
    assert (
        sum(path.stat().st_size for path in files) < 1e3 * float(said[1]) + 100_000
    )  # names, settings of the optimisers


def test_an_imagination_that_no_memory_holds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--learner.objective.horizon", "65536", "--learner.objective.imagination-starts", "65536"]
    options += ["--replay.batch-size", "65536"]
    assert start(tmp_path / "run", *options) == 1
    said = capsys.readouterr().err
    assert re.search(r"imagination takes at least [\d.]+ GB, and .* lower --learner\.objective\.horizon", said)
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_machine_that_is_too_small_is_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    if what == "memory":
        monkeypatch.setattr(room, "machine_memory", lambda: 10_000)
        words = "and this machine's memory is 10.0 kB: lower --replay.max-megabytes"
    else:
        usage: Any = shutil._ntuple_diskusage(10**9, 10**9 - 9000, 9000)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        words = f"and the disk of {tmp_path / 'run'} has 9.0 kB left: lower --replay.max-megabytes"
    assert start(tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
