"""Tables of the runs: means over seeds, and the worst one."""

from typing import Any

from world.memory_report import Table
from worldmodel.environments.returning import BUCKETS

Runs = list[dict[str, Any]]
FEWEST = 100  # cells that a share is given of
_MORE = ("returning", "returning, edited", "unseen for 5-64", "unseen for 65-256")


def groups(result: dict[str, Any]) -> dict[str, Runs]:
    """Runs by row and minutes, in the benchmark's order; seeds ascending."""
    from worlds.rows import ROWS

    order = list(ROWS)
    runs = sorted(
        result["runs"].values(),
        key=lambda run: (order.index(run["row"]) if run["row"] in order else len(order), run["minutes"], run["seed"]),
    )
    found: dict[str, Runs] = {}
    for run in runs:
        found.setdefault(f"{run['row']}, {run['minutes']:g} min", []).append(run)
    return found


def accuracy(runs: Runs, test: str, kind: str) -> list[float]:
    """Of each seed that has ``FEWEST`` cells of this kind."""
    tests = [run["tests"][test] for run in runs if test in run["tests"]]
    return [found[kind]["accuracy"] for found in tests if kind in found and found[kind]["cells"] >= FEWEST]


def tables(result: dict[str, Any]) -> list[Table]:
    found = groups(result)
    header = ("memory, CPU minutes", "test", *BUCKETS, *_MORE, "worst seed", "seeds", "parameters", "updates")
    rows = [_row(name, runs, test) for name, runs in found.items() for test in runs[0]["tests"]]
    made = [Table("Cells back in view, foreseen, %, by steps out of view", header, rows)]
    imagined = [[name, *_imagined(runs)] for name, runs in found.items() if "imagined" in runs[0]]
    if imagined:
        header = (
            "memory, CPU minutes",
            "steps",
            "cells back in view",
            "changed",
            "edits read back",
            "changed elsewhere",
            "seen on arrival",
            "old in the other fork",
            "entered bit-equal",
            "ms per step",
        )
        made.append(Table("Worlds that the model imagines, all seeds", header, imagined))
    return made


def _row(name: str, runs: Runs, test: str) -> list[str]:
    values = [accuracy(runs, test, kind) for kind in (*BUCKETS, *_MORE)]
    total = accuracy(runs, test, "returning")
    updates = sum(run["updates"] for run in runs) // len(runs)
    return [
        name,
        test,
        *(f"{100 * sum(each) / len(each):.3f}" if each else "" for each in values),
        f"{100 * min(total):.3f}" if total else "",
        str(len(runs)),
        f"{runs[0]['parameters']:,}",
        f"{updates:,}",
    ]


def _imagined(runs: Runs) -> list[str]:
    each = [run["imagined"] for run in runs]

    def total(name: str) -> int:
        return sum(one[name] for one in each)

    return [
        f"{each[0]['steps']:,}",
        f"{total('returning'):,}",
        f"{total('changed'):,}",
        f"{total('edits_read_back')} of {total('edits')}",
        f"{total('cells_changed_elsewhere')}",
        f"{total('edit_seen_on_arrival')} of {total('arrivals')}",
        f"{total('old_seen_in_other_fork')} of {total('arrivals')}",
        "yes" if all(one["entered_bit_equal"] for one in each) else "no",
        f"{sum(one['ms_per_step'] for one in each) / len(each):.2f}",
    ]
