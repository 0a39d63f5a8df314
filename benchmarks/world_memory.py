"""The world model on hidden state: a cue in a maze, and a ball behind a curtain.

    python benchmarks/world_memory.py                                     # everything
    python benchmarks/world_memory.py --tasks cue --memories scan --seeds 0
    python benchmarks/world_memory.py --list                              # finished and missing runs
    python benchmarks/world_memory.py --report                            # tables and chart

A run is evaluated on held-out episodes and merged into one JSON file. Finished runs are not repeated.
"""

import argparse
import sys
from pathlib import Path

from harness import environment, tables
from world import memory_chart, memory_report, session
from world.memory_runs import TASKS, Plan, execute

BENCHMARK = "world_memory"
RESULTS = Path(__file__).resolve().parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    memories = list(dict.fromkeys(memory for task in TASKS.values() for memory in task.memories))
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--tasks", default=list(TASKS), help=f"of {', '.join(TASKS)}; all", **names)
    parser.add_argument("--memories", default=memories, help=f"of {', '.join(memories)}; all that a task has", **names)
    parser.add_argument("--steps", type=int, help="to collect; default: the task's own")
    parser.add_argument("--episodes", type=int, help="held-out episodes; default: the task's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "world_memory_cpu.json", help="the result")
    session.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    for option, given, known in (("--tasks", chosen.tasks, TASKS), ("--memories", chosen.memories, memories)):
        for name in given:
            if name not in known:
                parser.error(f"{option}: there is no {name!r}, only {', '.join(known)}")
    return chosen


def plans(chosen: argparse.Namespace) -> list[Plan]:
    """Seeds outermost: an interrupted benchmark has every row."""
    return [
        Plan(task, memory, seed, chosen.steps, chosen.episodes, chosen.threads, tuple(chosen.train.split()))
        for seed in chosen.seeds
        for task in chosen.tasks
        for memory in TASKS[task].memories
        if memory in chosen.memories
    ]


def main() -> int:
    chosen = parse_arguments()
    failed = session.execute_all(chosen, plans(chosen), execute, lambda plan: plan.key, BENCHMARK)
    if chosen.list:
        return 0
    result = session.load(chosen.json, BENCHMARK)
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
