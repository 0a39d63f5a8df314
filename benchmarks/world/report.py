import statistics
from typing import Any

from harness.tables import figure
from world.runs import PASSING_EPISODES
from world.tasks import ALL, COMMON, Task

Groups = dict[tuple[str, str], list[dict[str, Any]]]

RETURN_HEADER = ("task", "memory", "mean return", "each seed", "minutes", "steps", "published best", "GRU")
CONTROL_HEADER = (
    "task",
    "policy gradient",
    "mean return",
    "each seed",
    "minutes",
    "steps",
    "threshold",
    "minutes to threshold",
    "steps to threshold",
    "seeds",
)
SCORE_HEADER = (
    "task",
    "variant",
    "score",
    "each seed",
    "minutes",
    "steps",
    "at least",
    "aim",
    "steps to it",
    "published",
)
SCORE_NOTE = (
    "Score: mean return over 100 held-out episodes of the greedy policy, with the weights that were best in training's "
    "own evaluations; of MemoryLength the share of right answers in the last 200 of 2,000 episodes of training, or a "
    "few more. Minutes: wall time on one thread. Steps to it: until an evaluation of training's own, ten episodes, "
    "reached the target; the mean over the seeds that did, with their number. Published: figures of others, with their "
    "steps."
)
CONTROL_NOTE = (
    "Minutes and steps to the threshold: of the first checkpoint, one every half minute, whose greedy policy has at "
    f"least this mean return over {PASSING_EPISODES} held-out episodes; means over the seeds that reach it. Minutes "
    "are wall time of training, collection included. Seeds: how many reach the threshold."
)
TIME_HEADER = ("task", "variant", "collect ms", "observe ms", "imagine ms", "imagine, % of time", "cores used")


def variant_of(run: dict[str, Any]) -> str:
    """Older entries name the memory instead."""
    return str(run["variant"] if "variant" in run else run["memory"])


def groups(result: dict[str, Any]) -> Groups:
    """In the order of ``ALL``; seeds ascending."""
    runs = sorted(result["runs"].values(), key=lambda run: run["seed"])
    found = {}
    for task in [*ALL, *sorted({run["task"] for run in runs} - set(ALL))]:
        there = [variant_of(run) for run in runs if run["task"] == task]
        known = ALL[task].variants if task in ALL else ()
        for variant in [*known, *sorted(set(there) - set(known))]:
            several = [run for run in runs if (run["task"], variant_of(run)) == (task, variant)]
            if several:
                found[task, variant] = several
    return found


def is_control(task: str) -> bool:
    """Whether the time to a threshold is measured."""
    return task in ALL and ALL[task].checkpoint_minutes is not None


def return_tables(result: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Title, header and rows of each non-empty table."""
    tables = [
        ("Return per episode", RETURN_HEADER, return_cells(result)),
        ("Control: return per episode", CONTROL_HEADER, control_cells(result)),
        ("Tasks in common", SCORE_HEADER, score_cells(result)),
    ]
    return [table for table in tables if table[2]]


def return_cells(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for (task, variant), runs in groups(result).items():
        if not is_control(task) and task not in COMMON:
            published = ALL[task].published if task in ALL else None
            rows.append([*_reached(task, variant, runs, 3), *(f"{x:.3f}" for x in published or ())])
            rows[-1] += [""] * (len(RETURN_HEADER) - len(rows[-1]))
    return rows


def control_cells(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for (task, variant), runs in groups(result).items():
        if is_control(task):
            passed = [point for run in runs if (point := threshold_point(run, ALL[task]))]
            minutes = figure(statistics.mean(seconds for seconds, _ in passed) / 60) if passed else "–"
            steps = f"{statistics.mean(steps for _, steps in passed):,.0f}" if passed else "–"
            threshold = f"{ALL[task].at_least:g}"
            rows.append([*_reached(task, variant, runs, 1), threshold, minutes, steps, f"{len(passed)} of {len(runs)}"])
    return rows


def score(run: dict[str, Any]) -> float:
    """As ``Task.score``."""
    return float(run["evaluation"]["mean"] if run.get("share_right") is None else run["share_right"]["share"])


def mean_score(runs: list[dict[str, Any]]) -> float:
    return statistics.mean(score(run) for run in runs)


def score_cells(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for (task, variant), runs in groups(result).items():
        if task in COMMON:
            known = COMMON[task]
            passed = [point[1] for run in runs if (point := threshold_point(run, known))]
            steps = f"{statistics.mean(passed):,.0f} ({len(passed)} of {len(runs)})" if passed else "–"
            told = "; ".join(f"{other.method}: {other.value:g} at {other.steps:,}" for other in known.others)
            aim = "" if known.aim is None else f"{known.aim:g}"
            rows.append([*_reached(task, variant, runs, _digits(task)), f"{known.at_least:g}", aim, steps, told])
    return rows


def threshold_point(run: dict[str, Any], task: Task) -> tuple[float, float] | None:
    """Seconds and steps to the threshold."""
    return next(((seconds, steps) for seconds, steps, mean in run["evaluations"] if mean >= task.at_least), None)


def time_cells(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for (task, variant), runs in groups(result).items():
        timed = [run["milliseconds_per_update"] for run in runs if run["milliseconds_per_update"]]
        if timed:
            names = ("collect", "observe", "imagine")
            milliseconds = [figure(statistics.median(times[name] for times in timed)) for name in names]
            fraction = statistics.median(times["imagine_fraction"] for times in timed)
            cores = statistics.median(run["cores_used"] for run in runs)
            rows.append([task, variant, *milliseconds, f"{fraction:.0%}", f"{cores:.1f}"])
    return rows


def target_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for (task, variant), runs in groups(result).items():
        target = ALL.get(task)
        if target is None or variant != target.ours:
            continue
        value = mean_score(runs)
        wanted = f"at least {target.at_least:g}" + (f", aim {target.aim:g}" if target.aim is not None else "")
        reached = "aim reached" if target.aim is not None and value >= target.aim else "reached"
        if value < target.at_least:
            reached = "missed"
        budget = max(run["minutes"] for run in runs)
        over = f"; trained for {budget:g} of {target.minutes:g} minutes" if budget != target.minutes else ""
        if target.steps is not None:
            over += f"; steps {max(run['steps'] for run in runs):,} of {target.steps:,}"
        if target.aim_minutes is not None:
            over += f"; {_aim_minutes(runs, target)}"
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        lines.append(f"{task}: {value:.{_digits(task)}f} over {seeds}, {wanted}: {reached}{over}")
    return lines


def _aim_minutes(runs: list[dict[str, Any]], target: Task) -> str:
    assert target.aim_minutes is not None
    points = [threshold_point(run, target) for run in runs]
    in_time = sum(point is not None and point[0] <= 60 * target.aim_minutes for point in points)
    return f"{in_time} of {len(runs)} reached it within {target.aim_minutes:g} minutes, the aim"


def _reached(task: str, variant: str, runs: list[dict[str, Any]], digits: int) -> list[str]:
    return [
        task,
        variant,
        f"{mean_score(runs):.{digits}f}",
        " ".join(f"{score(run):.{digits}f}" for run in runs),
        figure(statistics.mean(run["seconds"] for run in runs) / 60),
        f"{statistics.mean(run['steps'] for run in runs):,.0f}",
    ]


def _digits(task: str) -> int:
    return 1 if is_control(task) or (task in COMMON and abs(COMMON[task].at_least) >= 10) else 3
