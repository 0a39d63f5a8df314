import dataclasses
import statistics
from typing import Any

from harness.tables import figure
from world.cue import GAPS
from world.inputs import GIVEN
from world.memory_runs import TASKS
from world.moving import AHEAD

STEPS_AHEAD = (1, 2, 4, 8, 16, AHEAD)
BEYOND = ("9-16", "over 16")
AT_LEAST, AIM = 0.95, 0.99
COST_HEADER = ("CPU minutes", "minutes", "steps", "updates", "parameters of memory")


@dataclasses.dataclass
class Table:
    title: str
    header: tuple[str, ...]
    rows: list[list[str]]


def groups(result: dict[str, Any], task: str) -> dict[str, list[dict[str, Any]]]:
    """By memory, in the task's order; seeds ascending."""
    runs = sorted((run for run in result["runs"].values() if run["task"] == task), key=lambda run: run["seed"])
    found = {memory: [run for run in runs if run["memory"] == memory] for memory in TASKS[task].memories}
    return {memory: several for memory, several in found.items() if several}


def tables(result: dict[str, Any]) -> list[Table]:
    cue = [_cue_row(memory, runs) for memory, runs in groups(result, "cue").items()]
    ball = groups(result, "ball")
    found = []
    if cue:
        header = ("memory", *(f"{name} steps" for name in GAPS), "beyond 8 steps, each seed", *COST_HEADER)
        found.append(Table("MemoryS9, cue back in view: accuracy of key or ball, by steps out of view", header, cue))
    by_input = [_input_row(memory, runs) for memory, runs in groups(result, "cue").items()]
    if any(by_input):
        header = ("memory", *(f"{name}, {given}" for name in ("KL", "reward loss", "value") for given in GIVEN))
        found.append(Table("MemoryS9, by what memory is given", header, [row for row in by_input if row]))
    if ball:
        header = ("memory", *(f"+{step}" for step in STEPS_AHEAD), "mean", "each seed", *COST_HEADER)
        found.append(Table("HiddenBall, wrong cells of the ball by step ahead", header, _ball_rows(ball)))
    return found


def _input_row(memory: str, runs: list[dict[str, Any]]) -> list[str]:
    """Empty without a run that measured it."""
    measured = [run["measured"]["by_input"] for run in runs if "by_input" in run["measured"]]
    means = [
        statistics.mean(entry[given][name] for entry in measured)
        for name in ("dynamics", "reward", "value")
        for given in GIVEN
        if measured
    ]
    return [memory, *(f"{mean:.4f}" for mean in means)] if means else []


def beyond(run: dict[str, Any]) -> float:
    """Accuracy on cues out of view for more than 8 steps."""
    gaps = [run["measured"]["gaps"][name] for name in BEYOND]
    return sum(gap["count"] * gap["key_or_ball"] for gap in gaps) / max(1, sum(gap["count"] for gap in gaps))


def target_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    found = groups(result, "cue")
    if "scan" in found:
        values = [beyond(run) for run in found["scan"]]
        value = statistics.mean(values)
        reached = "aim reached" if value >= AIM else "reached" if value >= AT_LEAST else "missed"
        seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
        wanted = f"at least {AT_LEAST:.0%}, aim {AIM:.0%}"
        lines.append(f"accuracy beyond 8 steps: {value:.1%} over {seeds}, {wanted}: {reached}")
    if "none" in found:
        value = statistics.mean(beyond(run) for run in found["none"])
        lines.append(f"without memory: {value:.1%}, chance 50%")
    if found:
        lines.append(f"cues per run: {cue_counts(result)}")
    return lines


def cue_counts(result: dict[str, Any]) -> str:
    """Cues by gap; all runs share the episodes."""
    run = next(run for runs in groups(result, "cue").values() for run in runs)
    gaps = run["measured"]["gaps"]
    return ", ".join(f"{name} steps {gap['count']:,}" for name, gap in gaps.items())


def _cue_row(memory: str, runs: list[dict[str, Any]]) -> list[str]:
    accuracies = [statistics.mean(run["measured"]["gaps"][name]["key_or_ball"] for run in runs) for name in GAPS]
    each = " ".join(f"{beyond(run):.1%}" for run in runs)
    return [memory, *(f"{accuracy:.1%}" for accuracy in accuracies), each, *_cost(runs)]


def _ball_rows(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for memory, runs in found.items():
        curves = [run["measured"]["wrong_cells"]["model"] for run in runs]
        rows.append([memory, *_ahead(curves), " ".join(f"{statistics.mean(c):.2f}" for c in curves), *_cost(runs)])
    persistence = next(iter(found.values()))[0]["measured"]["wrong_cells"]["persistence"]
    return [*rows, ["persistence baseline", *_ahead([persistence]), "", *[""] * len(COST_HEADER)]]


def _ahead(curves: list[list[float]]) -> list[str]:
    by_step = [statistics.mean(curve[step - 1] for curve in curves) for step in STEPS_AHEAD]
    return [*(f"{value:.2f}" for value in by_step), f"{statistics.mean(map(statistics.mean, curves)):.2f}"]


def _cost(runs: list[dict[str, Any]]) -> list[str]:
    def mean(name: str) -> float:
        return statistics.mean(run[name] for run in runs)

    minutes = [figure(mean(name) / 60) for name in ("cpu_seconds", "seconds")]
    return [*minutes, *(f"{mean(name):,.0f}" for name in ("steps", "updates", "parameters"))]
