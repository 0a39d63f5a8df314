"""``demo memory``: trains memories on 103 steps of POPGym's RepeatPreviousMedium, and runs them to step 2²⁰.

New processes continue from the saved states.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

from worldmodel.demo.repeat_previous import DECK
from worldmodel.demo.worker import MEMORIES, file_name
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Positive, Seed, check_writable


class DemoFailed(RuntimeError):
    """A process of the demonstration failed."""


@dataclasses.dataclass
class MemoryDemoOptions(Checked):
    """Trains three memories on 103-step episodes, continues from their saved states, and draws one picture."""

    folder: Path = Path("demo-memory")
    """Folder for weights, states, results and the picture."""
    steps: Annotated[int, Bounds(2 * DECK, 2**26)] = 2**20
    """Last step after training."""
    seconds: Positive = 45
    """Most seconds of training per memory."""
    seed: Seed = 0
    """Seed of weights and cards."""
    processes: Annotated[int, Bounds(1, 1024)] | None = None
    """Memories in parallel, one thread each; the number of cores if not given."""


def main(arguments: Sequence[str], parse: Callable[..., Any]) -> int:
    """``python -m worldmodel demo NAME``; raises ConfigurationError for an unknown name."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m worldmodel demo memory|worlds|radar|plan|arm [options]\n")
        print("`demo NAME --help` explains the options.")
        return 0 if arguments else 2
    if arguments[0] == "memory":
        print(run_memory(parse(MemoryDemoOptions, arguments[1:], "demo memory")))
    elif arguments[0] == "worlds":
        from worldmodel.demo.worlds import WorldsDemoOptions, run_worlds

        print(run_worlds(parse(WorldsDemoOptions, arguments[1:], "demo worlds")))
    elif arguments[0] == "radar":
        from worldmodel.demo.radar import RadarDemoOptions, run_radar

        print(run_radar(parse(RadarDemoOptions, arguments[1:], "demo radar")))
    elif arguments[0] == "plan":
        from worldmodel.demo.plan import PlanDemoOptions, run_plan

        print(run_plan(parse(PlanDemoOptions, arguments[1:], "demo plan")))
    elif arguments[0] == "arm":
        from worldmodel.demo.arm import ArmDemoOptions, run_arm

        print(run_arm(parse(ArmDemoOptions, arguments[1:], "demo arm")))
    else:
        expected = "memory, worlds, radar, plan or arm"
        raise ConfigurationError(f"there is no demonstration {arguments[0]!r}, expected {expected}")
    return 0


def run_memory(options: MemoryDemoOptions) -> Path:
    """Returns the picture's path; raises ConfigurationError for the folder, or DemoFailed."""
    from worldmodel.demo.picture import draw

    start = time.perf_counter()
    check_writable("--folder", options.folder / "memory.json", parents=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    for phase in ("train", "continue"):
        _run_all(phase, options)
    results = [json.loads((options.folder / f"{file_name(name)}.json").read_text()) for name in MEMORIES]
    summary = {"memories": results, "seconds": time.perf_counter() - start, "torch": torch.__version__}
    (options.folder / "memory.json").write_text(json.dumps(summary) + "\n")
    picture = options.folder / "memory.png"
    draw(summary, picture)
    print(f"{time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    return picture


def _run_all(phase: str, options: MemoryDemoOptions) -> None:
    limit = options.processes or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    waiting = list(MEMORIES)
    running: dict[str, subprocess.Popen[bytes]] = {}
    tail = [str(options.seed), str(options.seconds), str(options.steps)]
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                name = waiting.pop(0)
                command = [sys.executable, "-m", "worldmodel.demo.worker", phase, str(options.folder), name, *tail]
                # Ctrl-C reaches this process alone, which ends the others.
                running[name] = subprocess.Popen(command, start_new_session=True)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    raise DemoFailed(f"{phase} of {name!r} ended with exit status {process.returncode}")
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
