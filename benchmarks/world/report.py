"""The result as tables: returns beside what is to be reached, and where the time of an update goes."""

import statistics
from typing import Any

from harness.tables import figure
from world.runs import MEMORIES, MINUTES

# Published figures are the best and the GRU's mean return of the POPGym benchmark (Morad et al. 2023), 15M steps.
TARGETS = {
    "RepeatPreviousEasy": {"at_least": 0.97, "aim": None, "published": 1.0, "published_gru": 1.0},
    "RepeatPreviousMedium": {"at_least": 0.9, "aim": 0.98, "published": 0.789, "published_gru": -0.315},
    "RepeatPreviousHard": {"at_least": 0.5, "aim": 0.9, "published": 0.191, "published_gru": -0.428},
}
RETURN_HEADER = ("task", "memory", "mean return", "each seed", "minutes", "steps", "published best", "GRU")
TIME_HEADER = ("task", "memory", "collect ms", "observe ms", "imagine ms", "share of imagine", "cores used")


def groups(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Runs by task and memory, tasks and memories in their own order, seeds rising."""
    runs = sorted(result["runs"].values(), key=lambda run: run["seed"])
    found = {}
    for task in [*MINUTES, *sorted({run["task"] for run in runs} - set(MINUTES))]:
        for memory in MEMORIES:
            several = [run for run in runs if (run["task"], run["memory"]) == (task, memory)]
            if several:
                found[task, memory] = several
    return found


def mean_return(runs: list[dict[str, Any]]) -> float:
    """Over seeds."""
    return statistics.mean(run["evaluation"]["mean"] for run in runs)


def return_cells(result: dict[str, Any]) -> list[list[str]]:
    """A row for each task and memory."""
    rows = []
    for (task, memory), runs in groups(result).items():
        target = TARGETS.get(task, {})
        rows.append(
            [
                task,
                memory,
                f"{mean_return(runs):.3f}",
                " ".join(f"{run['evaluation']['mean']:.3f}" for run in runs),
                figure(statistics.mean(run["seconds"] for run in runs) / 60),
                f"{statistics.mean(run['steps'] for run in runs):,.0f}",
                _signed(target.get("published")),
                _signed(target.get("published_gru")),
            ]
        )
    return rows


def time_cells(result: dict[str, Any]) -> list[list[str]]:
    """Milliseconds of an update, for each task and memory."""
    rows = []
    for (task, memory), runs in groups(result).items():
        timed = [run["milliseconds_an_update"] for run in runs if run["milliseconds_an_update"]]
        if timed:
            names = ("collect", "observe", "imagine")
            milliseconds = [figure(statistics.median(times[name] for times in timed)) for name in names]
            share = statistics.median(times["share_of_imagine"] for times in timed)
            cores = statistics.median(run["cores_used"] for run in runs)
            rows.append([task, memory, *milliseconds, f"{share:.0%}", f"{cores:.1f}"])
    return rows


def target_lines(result: dict[str, Any]) -> list[str]:
    """What was to be reached by the scan, and whether it was."""
    lines = []
    for (task, memory), runs in groups(result).items():
        target = TARGETS.get(task)
        if memory != "scan" or target is None:
            continue
        value = mean_return(runs)
        wanted = f"at least {target['at_least']}" + (f", aim {target['aim']}" if target["aim"] else "")
        reached = "aim reached" if target["aim"] and value >= target["aim"] else "reached"
        if value < target["at_least"]:
            reached = "missed"
        budget = [run["minutes"] for run in runs]
        over = f"; minutes given {max(budget):g} of {MINUTES[task]:g}" if max(budget) != MINUTES[task] else ""
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        lines.append(f"{task}: {value:.3f} over {seeds}, {wanted}: {reached}{over}")
    return lines


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
