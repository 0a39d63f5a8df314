"""Returns of the world model on POPGym's RepeatPrevious and in control, beside ablations.

    python benchmarks/world_model.py                                      # everything: many hours
    python benchmarks/world_model.py --tasks RepeatPreviousEasy --seeds 0 --variants scan
    python benchmarks/world_model.py --list                               # finished and missing runs
    python benchmarks/world_model.py --report                             # tables and chart

A run is evaluated on 100 episodes and merged into one JSON file; several processes may share the runs. Finished runs
are not repeated.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import environment, tables
from world import chart, report, session
from world.runs import Plan, execute
from world.tasks import SUITES, Task

RESULTS = Path(__file__).resolve().parent / "results"


def parse_arguments(arguments: list[str] | None = None, suite: str = "world_model") -> argparse.Namespace:
    parser, tasks = argparse.ArgumentParser(description=__doc__.splitlines()[0]), SUITES[suite]
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--tasks", default=list(tasks), help=f"comma-separated, of {', '.join(tasks)}; all", **names)
    known = list(dict.fromkeys(name for task in tasks.values() for name in task.variants))
    parser.add_argument("--variants", "--memories", help=f"of {', '.join(known)}; all that a task has", **names)
    parser.add_argument("--minutes", type=float, help="of training; by task, 5 to 60")
    parser.add_argument("--steps", type=int, help="of the environments, at most; by task")
    parser.add_argument("--episodes", type=int, default=100, help="of evaluation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help=f"benchmarks/results/{suite}_cpu.json, or the device's")
    session.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    for variant in chosen.variants or []:
        if variant not in known:
            parser.error(f"--variants: there is no {variant!r}, only {', '.join(known)}")
    for task in chosen.tasks:
        if task not in tasks:
            parser.error(f"--tasks: there is no {task!r}, only {', '.join(tasks)}")
    if chosen.json is None:
        chosen.json = RESULTS / f"{suite}_{chosen.device.partition(':')[0]}.json"
    return chosen


def plans(chosen: argparse.Namespace, tasks: Mapping[str, Task]) -> list[Plan]:
    """Seeds outermost: an interrupted benchmark has every row."""
    return [
        Plan(
            task=tasks[name],
            variant=variant,
            seed=seed,
            minutes=chosen.minutes or tasks[name].minutes,
            steps=chosen.steps or tasks[name].steps,
            episodes=chosen.episodes,
            threads=chosen.threads,
            device=chosen.device,
            extra=tuple(chosen.train.split()),
        )
        for seed in chosen.seeds
        for name in chosen.tasks
        for variant in tasks[name].variants
        if chosen.variants is None or variant in chosen.variants
    ]


def describe(plan: Plan) -> str:
    return f"{plan.key}, {plan.minutes:g} minutes"


def execute_and_print(plan: Plan, folder: Path) -> dict[str, Any]:
    entry = execute(plan, folder)
    print(f"{plan.key}: {entry['evaluation']['mean']:.3f} after {entry['steps']:,} steps", file=sys.stderr)
    return entry


def main(suite: str = "world_model") -> int:
    chosen = parse_arguments(suite=suite)
    planned = plans(chosen, SUITES[suite])
    failed = session.execute_all(chosen, planned, execute_and_print, describe, suite, chosen.device)
    if chosen.list:
        return 0
    result = session.load(chosen.json, suite)
    if not result["runs"]:
        print("there is no run to report")
        return 1
    print(environment.summary(result["environment"]))
    for title, header, cells in report.return_tables(result):
        tables.show(title, header, cells)
    tables.show("Time per update", report.TIME_HEADER, report.time_cells(result))
    for line in report.target_lines(result):
        print(line)
    plot = chosen.plot or chosen.json.with_suffix(".png")
    reason = chart.draw(result, plot)
    print(f"no chart: {reason}" if reason else f"wrote {plot}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
