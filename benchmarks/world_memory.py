"""What the world model knows of what it does not see: a cue in a maze, and a ball behind a curtain.

    python benchmarks/world_memory.py                                     # everything
    python benchmarks/world_memory.py --tasks cue --memories scan --seeds 0
    python benchmarks/world_memory.py --list                              # what is there, what is missing
    python benchmarks/world_memory.py --report                            # tables and chart of what is there

Every run is a training of its own under random actions, judged on episodes that it has not seen and merged into one
JSON file as soon as it ends. A run that is there is not made again.
"""

import argparse
import sys
import time
from pathlib import Path

from harness import environment, tables
from world import memory_chart, memory_report
from world.memory_runs import TASKS, Plan, execute, load, merge

RESULTS = Path(__file__).resolve().parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    memories = list(dict.fromkeys(memory for task in TASKS.values() for memory in task.memories))
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--tasks", default=list(TASKS), help=f"of {', '.join(TASKS)}; all", **names)
    parser.add_argument("--memories", default=memories, help=f"of {', '.join(memories)}; all that a task has", **names)
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--steps", type=int, help="to collect; the task's own")
    parser.add_argument("--episodes", type=int, help="to judge on; the task's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also make runs that are there")
    parser.add_argument("--list", action="store_true", help="say which runs are there and which are missing, and stop")
    parser.add_argument("--report", action="store_true", help="make no run: tables and chart of what is there")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="where run folders go")
    parser.add_argument("--json", type=Path, default=RESULTS / "world_memory_cpu.json", help="the result")
    parser.add_argument("--plot", type=Path, help="a chart (PNG); beside the JSON")
    parser.add_argument("--train", default="", help="further options of `python -m worldmodel train`, in one string")
    chosen = parser.parse_args(arguments)
    for option, given, known in (("--tasks", chosen.tasks, TASKS), ("--memories", chosen.memories, memories)):
        for name in given:
            if name not in known:
                parser.error(f"{option}: there is no {name!r}, only {', '.join(known)}")
    return chosen


def plans(chosen: argparse.Namespace) -> list[Plan]:
    """Seeds on the outside: a table cut short has every row."""
    return [
        Plan(task, memory, seed, chosen.steps, chosen.episodes, chosen.threads, tuple(chosen.train.split()))
        for seed in chosen.seeds
        for task in chosen.tasks
        for memory in TASKS[task].memories
        if memory in chosen.memories
    ]


def main() -> int:
    chosen = parse_arguments()
    failed = []
    for plan in [] if chosen.report else plans(chosen):
        there = plan.key in load(chosen.json)["runs"]
        if chosen.list:
            print(f"{'there' if there else 'missing':8} {plan.key}")
            continue
        if there and not chosen.again:
            continue
        print(plan.key, file=sys.stderr, flush=True)
        folder = chosen.runs / f"{plan.key.replace('/', '-').replace(' ', '_')}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            merge(chosen.json, plan, execute(plan, folder))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed.append(plan.key)
    if chosen.list:
        return 0
    result = load(chosen.json)
    if not result["runs"]:
        print("there is no run to report")
        return 1
    print(environment.summary(result["environment"]))
    for table in memory_report.tables(result):
        tables.show(table.title, table.header, table.rows)
    for line in memory_report.target_lines(result):
        print(line)
    plot = chosen.plot or chosen.json.with_suffix(".png")
    reason = memory_chart.draw(result, plot)
    print(f"no chart: {reason}" if reason else f"wrote {plot}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
