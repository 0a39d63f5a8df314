"""Byte-level language models: memories by the length of their context, and recall.

    python benchmarks/byte_model.py                                           # everything
    python benchmarks/byte_model.py --tune                                    # settings, logged in the JSON
    python benchmarks/byte_model.py --tasks text --memories scan --seeds 0 --minutes 20
    python benchmarks/byte_model.py --list                                    # finished and missing runs
    python benchmarks/byte_model.py --report                                  # tables and chart

A run has one thread, and minutes of its CPU time for training. Settings are the best of the tuning log, of runs of a
quarter of the minutes on files of their own. Runs are merged into one JSON file, finished ones are not repeated, and
several processes may run at once.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from harness import environment, tables
from text import report
from text.models import MEMORIES
from text.runs import SEED_OF_TUNING, TASKS, Plan, execute, grid, tuned
from world import session

BENCHMARK = "byte_model"
RESULTS = Path(__file__).resolve().parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--tasks", default=list(TASKS), help=f"of {', '.join(TASKS)}; all", **names)
    parser.add_argument("--memories", default=list(MEMORIES), help=f"of {', '.join(MEMORIES)}; all a task has", **names)
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--minutes", type=float, help="of CPU time for training; default: the task's own")
    parser.add_argument("--tune", action="store_true", help="try the settings, each for a quarter of the minutes")
    parser.add_argument("--again", action="store_true", help="repeat finished runs")
    parser.add_argument("--list", action="store_true", help="list finished and missing runs, and stop")
    parser.add_argument("--report", action="store_true", help="no run: tables and chart of finished runs")
    parser.add_argument("--json", type=Path, default=RESULTS / "byte_model_cpu.json", help="the result")
    parser.add_argument("--plot", type=Path, help="chart (PNG); default: beside the JSON")
    chosen = parser.parse_args(arguments)
    for option, given, known in (("--tasks", chosen.tasks, TASKS), ("--memories", chosen.memories, MEMORIES)):
        for name in given:
            if name not in known:
                parser.error(f"{option}: there is no {name!r}, only {', '.join(known)}")
    chosen.runs = chosen.json.parent  # nothing is kept of a run but its entry
    return chosen


def plans(chosen: argparse.Namespace) -> list[Plan]:
    """Seeds outermost: an interrupted benchmark has every row."""
    log = session.load(chosen.json, BENCHMARK).get("tuning", {})
    pairs = [(task, memory) for task in chosen.tasks for memory in TASKS[task].memories if memory in chosen.memories]

    def minutes(task: str) -> float:
        return chosen.minutes or TASKS[task].minutes

    if chosen.tune:
        return [
            Plan(task, memory, SEED_OF_TUNING, minutes(task) / 4, settings, tuning=True)
            for task, memory in pairs
            for settings in grid(task, memory, log)
        ]
    return [
        Plan(task, memory, seed, minutes(task), tuned(task, memory, log))
        for seed in chosen.seeds
        for task, memory in pairs
    ]


def rank(item: tuple[str, dict[str, Any]]) -> tuple[list[str], float]:
    key, entry = item
    return key.split("/")[:2], math.inf if entry["loss"] is None else entry["loss"]


def main() -> int:
    chosen = parse_arguments()
    section = "tuning" if chosen.tune else "runs"
    todo: list[Plan] = []
    failed: list[str] = []
    while not failed and (new := [plan for plan in plans(chosen) if plan not in todo]):
        failed = session.execute_all(chosen, new, execute, lambda plan: plan.key, BENCHMARK, section=section)
        todo += new  # after tuning there may be more: rates beyond the best
    if chosen.list:
        return 0
    result = session.load(chosen.json, BENCHMARK)
    for key, entry in sorted(result.get("tuning", {}).items(), key=rank):
        print(f"{'diverged' if entry['loss'] is None else format(entry['loss'], '8.4f')}  {key}")
    if not result["runs"]:
        print("there is no run to report")
        return 1 if failed or not chosen.tune else 0
    print(environment.summary(result["environment"]))
    for table in report.tables(result):
        tables.show(*table)
    for line in report.target_lines(result):
        print(line)
    plot = chosen.plot or chosen.json.with_suffix(".png")
    reason = report.draw(result, plot)
    print(f"no chart: {reason}" if reason else f"wrote {plot}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
