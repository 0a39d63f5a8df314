"""Memories on worlds whose cells come back into view, from a room seen through a window.

    python benchmarks/world_rooms.py                                          # everything: hours
    python benchmarks/world_rooms.py --rows "place, moves learned" --seeds 0 --minutes 0.5
    python benchmarks/world_rooms.py --list                                   # finished and missing runs
    python benchmarks/world_rooms.py --report                                 # tables and chart
    python benchmarks/world_rooms.py --tune 1                                 # learning rates, 1 CPU minute each

A run is a row, its CPU minutes of one core and a seed, in one thread. It is tested on new worlds and merged into one
JSON file; several processes may run at once. Finished runs are not repeated.
"""

import argparse
import sys
from pathlib import Path

from harness import environment, tables
from world import session
from worlds import chart, report, targets, tuning
from worlds.rows import ROWS
from worlds.runs import Plan, execute

BENCHMARK = "world_rooms"
RESULTS = Path(__file__).resolve().parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=f"of: {'; '.join(ROWS)}")
    parser.add_argument("--minutes", type=float, help="only runs of so many CPU minutes")
    parser.add_argument("--tune", type=float, metavar="MINUTES", help="choose learning rates of --rows, and stop")
    parser.add_argument("--quick", action="store_true", help="an instant of training and tiny tests: a smoke test")
    parser.add_argument("--json", type=Path, help="the result; default: benchmarks/results/world_rooms_cpu.json")
    session.add_arguments(parser, train=False)
    chosen = parser.parse_args(arguments)
    for row in chosen.rows:
        if row not in ROWS:
            parser.error(f"--rows: there is no {row!r}, only {'; '.join(ROWS)}")
    if chosen.quick and chosen.json is None:
        parser.error("--quick: a smoke test needs a --json of its own")
    chosen.json = chosen.json or RESULTS / "world_rooms_cpu.json"
    return chosen


def plans(chosen: argparse.Namespace) -> list[Plan]:
    """Seeds outermost, then short runs first."""
    if chosen.quick:
        return [Plan(row, 0.005, seed, True) for seed in chosen.seeds for row in chosen.rows]
    found = [
        Plan(row, minutes, seed)
        for seed in chosen.seeds
        for row in chosen.rows
        for minutes in ROWS[row].minutes
        if chosen.minutes in (None, minutes)
    ]
    return sorted(found, key=lambda plan: (plan.seed, plan.minutes))


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    if chosen.tune is not None:
        for row in chosen.rows:
            if ROWS[row].tuned:
                tuning.tune(row, chosen.tune)
        return 0
    failed = session.execute_all(chosen, plans(chosen), execute, lambda plan: plan.key, BENCHMARK)
    if chosen.list:
        return 0
    result = session.load(chosen.json, BENCHMARK)
    if not result["runs"]:
        print("there is no run to report")
        return 1
    print(environment.summary(result["environment"]))
    for table in report.tables(result):
        tables.show(table.title, table.header, table.rows)
    tables.show(targets.TITLE, *targets.table(result))
    plot = chosen.plot or chosen.json.with_suffix(".png")
    reason = chart.draw(result, plot)
    print(f"no chart: {reason}" if reason else f"wrote {plot}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
