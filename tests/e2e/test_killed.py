"""A run killed at random moments and resumed is bit-identical to an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worldmodel_examples import tiny_options

from worldmodel.runs.run import Run

KILLS, STEPS = 5, 300
FEW = ("--num-envs", "2", "--prefill", "40", "--train-ratio", "8", "--threads", "1", "--log-seconds", "0.2")
OFTEN = ("--save-minutes", "0.004", "--open-loop-minutes", "0", "--learner.ema", "20")


class Processes:
    def __init__(self, log: Path) -> None:
        self.log = log
        program = [sys.executable, str(Path(__file__).with_name("worldmodel_killed.py"))]
        with log.open("w") as file:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            self.server = subprocess.Popen(program, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)

    def start(self, *arguments: str) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(arguments), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def status(self) -> int:
        """-9 if the command was killed."""
        assert self.server.stdin is not None and self.server.stdout is not None
        print(file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("killed") / "log")
    yield started
    with started.server as server:
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(60) == 0


def saved_steps(folder: Path) -> int:
    names = [path.name for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return int(max(names, default="-1"))


def killed(processes: Processes, folder: Path, arguments: list[str], going_on: list[str], seed: int) -> list[str]:
    """Starts, kills and resumes repeatedly; returns the moments."""
    random, moments = np.random.default_rng(seed), []
    # Saved steps before a kill; the delay covers a few iterations or a save.
    for steps in np.sort(random.integers(-1, int(0.75 * STEPS), KILLS)).tolist():
        delay = float(random.uniform(0, 0.12))
        begun = (folder / "config.json").exists()
        child = processes.start(*(["train", "--resume", str(folder), *going_on] if begun else arguments))
        while saved_steps(folder) < steps or not (folder / "config.json").exists():
            time.sleep(0.001)
            if saved_steps(folder) == STEPS:
                break
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # valid for an ended child, which is not reaped yet
        status = processes.status()
        moments.append(f"{delay:.3f} s after {steps} steps, {saved_steps(folder)} of them saved: {status}")
        assert status in (0, -signal.SIGKILL), (moments, processes.log.read_text())
    return moments


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def as_read(replay: dict[str, Any]) -> dict[str, Any]:
    """With refreshed memory states in their sequences, which have the state of the checkpoint that wrote them first."""
    sequences = {chunk_id: dict(replay["sequences"][chunk_id]) for chunk_id in replay["sequences"]}
    refreshed = replay["refreshed"]
    for index, chunk_id in enumerate(refreshed["ids"]):
        for name, states in refreshed["state"].items():
            sequences[chunk_id][f"state.{name}"] = states[index][None]
        sequences[chunk_id]["version"] = np.array([refreshed["versions"][index]])
    return {**replay, "sequences": sequences}


@pytest.mark.parametrize(("name", "state"), [("Locked", "replay"), ("Echo", "pickle")])
def test_a_run_killed_five_times_ends_as_the_one_that_was_not(
    tmp_path: Path, processes: Processes, name: str, state: str
) -> None:
    """WMKERNELS_KILL_SEED repeats the kill times of a failure."""
    seed = int(os.environ.get("WMKERNELS_KILL_SEED") or int.from_bytes(os.urandom(4), "little"))
    env = ["--env", f"worldmodel_environments:wmtest/{name}-v0", "--steps", str(STEPS)]
    common = ["train", *env, *FEW, *OFTEN, *tiny_options(), "--environment-state", state, "--run"]
    going_on = ["--unpickle"] if state == "pickle" else []
    processes.start(*common, str(tmp_path / "straight"))
    assert processes.status() == 0, processes.log.read_text()
    for attempt in range(4):
        folder = tmp_path / f"killed{attempt}"
        moments = killed(processes, folder, [*common, str(folder)], going_on, seed + attempt)
        if not any(moment.endswith(": 0") for moment in moments):
            break
    told = f"{name}, {state}, seed {seed + attempt}, killed {'; '.join(moments)}"
    assert len(moments) == KILLS and all(moment.endswith(": -9") for moment in moments), f"too late to kill: {told}"
    processes.start("train", "--resume", str(folder), *going_on)
    assert processes.status() == 0, (told, processes.log.read_text())
    straight, resumed = Run(tmp_path / "straight"), Run(folder)
    assert [run.checkpoints[-1].name for run in (straight, resumed)] == [f"{STEPS:012d}"] * 2, told
    assert straight.load("trainer")["updates"] > 30
    for part in ("world_model", "ema", "learner"):
        assert same(straight.load(part), resumed.load(part)), f"{part} differs: {told}"
    assert same(*(as_read(run.load("replay")) for run in (straight, resumed))), f"replay differs: {told}"
    ends = [run.load("trainer") for run in (straight, resumed)]
    assert same(*({key: value for key, value in end.items() if key != "seconds"} for end in ends)), told
    # Determines the environments' next transitions.
    seen = [run.load("collector")["episodes"] for run in (straight, resumed)]
    assert all(
        same(seen[0][key], seen[1][key]) for key in ("begun", "seeds", "actions", "checksums", "observations")
    ), told
    assert [line["steps"] for line in resumed.metrics] == sorted({line["steps"] for line in resumed.metrics}), told
