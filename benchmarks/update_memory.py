"""Memory and time of an update on pictures, each case in a process of its own.

    python benchmarks/update_memory.py            # measures, and writes benchmarks/results/update_memory_cpu.json
    python benchmarks/update_memory.py --report   # the table

The environment's frames are random numbers. ``at once`` lets an update take any memory, so that perception takes all
steps at once.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from harness import environment, tables
from world import update_report
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import Trainer
from worldmodel.runs.memory import keep_freed_memory

RESULT = Path(__file__).resolve().parent / "results" / "update_memory_cpu.json"
FRAMES = {"64×64×3": (64, 64, 3), "4×84×84": (4, 84, 84), "210×160×3": (210, 160, 3)}
WAYS = {
    "popgym, at once": {"preset": "popgym", "update_megabytes": 2.0**20},
    "popgym": {"preset": "popgym"},
    "pixels": {"preset": "pixels"},
}
TOO_LARGE = {("210×160×3", "popgym, at once")}  # the size follows from the measured ones


class Frames(gymnasium.Env[np.ndarray, Any]):
    """Random pixels, episodes of 500 steps."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(4)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps = 0
        return self._frame(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        return self._frame(), float(action), self._steps == 500, False, {}

    def _frame(self) -> np.ndarray:
        return self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)


def measure(frames: str, way: str) -> dict[str, float]:
    """Of this process: resident bytes at most, before and after an update, and CPU seconds of the next one."""
    keep_freed_memory()
    shape = FRAMES[frames]
    trainer = Trainer(TrainConfig(env=lambda: Frames(shape), num_envs=4, prefill=1_300, threads=1, **WAYS[way]))
    trainer.choose_threads()
    torch.set_num_threads(1)
    trainer.bound_memory()
    while trainer.steps < trainer.config.prefill:
        trainer.iterate()
    before = peak()
    trainer.update()
    after = peak()
    begun = time.process_time()
    trainer.update()
    return {
        "before": before,
        "after": after,
        "seconds": time.process_time() - begun,
        "rows": trainer.config.replay.batch_size,
        "window": trainer.config.replay.window,
        "expected": trainer.update_memory.total(trainer.config.replay.batch_size, trainer.config.chunk_steps),
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_all() -> dict[str, Any]:
    rows = []
    for frames in FRAMES:
        for way in WAYS:
            if (frames, way) in TOO_LARGE:
                continue
            command = [sys.executable, __file__, "--one", frames, way]
            print(f"{frames}, {way}", file=sys.stderr, flush=True)
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"frames": frames, "way": way, **json.loads(said.splitlines()[-1])})
    described = environment.describe(torch.device("cpu"))
    return {"benchmark": "update_memory", "device": "cpu", "environment": described, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, default=RESULT, help="the result")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(*chosen.one)))
        return
    if not chosen.report:
        chosen.json.write_text(json.dumps(measure_all(), indent=1) + "\n")
    result = json.loads(chosen.json.read_text())
    print(environment.summary(result["environment"]))
    tables.show("An update's memory and time", update_report.HEADER, update_report.cells(result))


if __name__ == "__main__":
    main()
