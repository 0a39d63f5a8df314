"""The number of CPU threads: fast on a quiet and on a busy machine, and the same on resume."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import small_model, tiny_options

from worldmodel.commands.options import preset_config, train_options
from worldmodel.commands.train import train
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.learning import threads, trainer
from worldmodel.learning.presets import PRESETS
from worldmodel.learning.settings import saved_config
from worldmodel.learning.trainer import Trainer
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.run import Run

ECHO = "worldmodel_environments:wmtest/Echo-v0"
FEW = ("--num-envs", "2", "--prefill", "20", "--train-ratio", "8", "--open-loop-minutes", "0")
WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.mark.parametrize("given", [None, *WAIT])
def test_the_command_makes_waiting_threads_sleep_before_torch_is_there_unless_told_otherwise(given: str | None) -> None:
    """OpenMP reads the variables when torch loads it."""
    program = "import os, sys, worldmodel.__main__ as command; before = 'torch' in sys.modules; "
    program += f"command.let_waiting_threads_sleep(); print(before, *[os.environ.get(name) for name in {WAIT}])"
    environ = {name: value for name, value in os.environ.items() if name not in WAIT}
    environ |= {given: "7"} if given else {}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60)
    expected = ["7" if name == given else "None" for name in WAIT] if given else ["passive", "1000", "None"]
    assert done.stdout.split() == ["False", *expected], done.stderr


def model(side: int = 0, **changes: int) -> WorldModel:
    import numpy as np

    seen = spaces.Box(0, 255, (side, side, 3), np.uint8) if side else spaces.Box(-1, 1, (4,))
    config = preset_config("control").model
    config = dataclasses.replace(config, perception=dataclasses.replace(config.perception, **changes))
    return WorldModel(ObservationSpec.from_space(seen), ActionSpec.from_space(spaces.Discrete(2)), config)


def test_threads_are_as_many_as_the_widest_array_keeps_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAIT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(threads, "usable_cores", lambda: 12)
    sizes = {name: PRESETS[name]().replay for name in ("popgym", "control", "continuous", "wander", "moving")}
    vectors, pixels, wide = model(), model(side=64), model(hidden=2048)
    for sleeping in (False, True):
        if sleeping:
            monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        assert threads.waiting_threads_sleep() == sleeping
        # Updates of these presets are hundreds of small loops.
        assert {threads.threads_for(vectors, size.batch_size * size.window) for size in sizes.values()} == {1}
        assert threads.threads_for(pixels, 16) == 1  # acting
        assert threads.threads_for(pixels, 256) == (12 if sleeping else 3)
        assert threads.threads_for(wide, 1) == (12 if sleeping else 4)
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinity")
    assert not threads.waiting_threads_sleep()
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    assert threads.threads_for(pixels, 256) == 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/host\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_the_quota_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.usable_cores(tmp_path) == (cores or 64)


def test_a_run_keeps_the_threads_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = Trainer.iterate

    def iterate(self: Trainer) -> None:
        used.append(torch.get_num_threads())
        real(self)

    monkeypatch.setattr(Trainer, "iterate", iterate)
    monkeypatch.setattr(trainer, "threads_for", lambda model, steps: 3)
    config = train_options(["--env", ECHO, "--steps", "20", *FEW, *tiny_options()])[0]
    assert config.threads is None
    torch.set_num_threads(2)
    run = train(config, tmp_path / "run", quiet=True)
    assert saved_config(run).threads == 3 and set(used) == {3} and torch.get_num_threads() == 2
    monkeypatch.setattr(trainer, "threads_for", lambda model, steps: 1)
    used.clear()
    again = train_options(["--resume", str(tmp_path / "run"), "--steps", "40"])[0]
    train(again, tmp_path / "run", resume=True, quiet=True)
    assert set(used) == {3} and saved_config(Run(tmp_path / "run")).threads == 3
    # A run of an earlier release was computed with PyTorch's own number.
    run.configure({**run.config, "train": {**run.config["train"], "threads": None}})
    used.clear()
    train(dataclasses.replace(again, threads=None, steps=60), tmp_path / "run", resume=True, quiet=True)
    assert set(used) == {2} and saved_config(Run(tmp_path / "run")).threads is None
    assert threads.threads_for(small_model(), 16) == 1
