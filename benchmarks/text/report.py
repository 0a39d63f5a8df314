"""Tables and chart of the byte-level language models."""

import statistics
from pathlib import Path
from typing import Any

from harness.tables import Cells
from scans.chart import INK, OURS, save
from text.models import CONTINUED, MEMORIES
from text.runs import LENGTH, MULTIPLES, TASKS

PLAIN = [memory for memory in MEMORIES if memory not in CONTINUED]
COLOURS = dict(zip(PLAIN, ("#c08a00", OURS, "#d1495b", "#3b82f6", "#10a37f"), strict=True))


def style(memory: str) -> dict[str, Any]:
    """The colour of a memory, dashed if its states are continued."""
    return {"color": COLOURS[CONTINUED.get(memory, memory)], "ls": "--" if memory in CONTINUED else "-"}


def groups(result: dict[str, Any], task: str) -> dict[str, list[dict[str, Any]]]:
    """Finished runs by memory."""
    runs = [run for run in result["runs"].values() if run["task"] == task]
    found = {memory: [run for run in runs if run["memory"] == memory] for memory in TASKS[task].memories}
    return {memory: runs for memory, runs in found.items() if runs}


def mean(runs: list[dict[str, Any]], *path: Any) -> float:
    """Of what ``path`` leads to, over seeds."""

    def value(run: Any) -> float:
        for name in path:
            run = run[name]
        return float(run)

    return statistics.mean(map(value, runs))


def tables(result: dict[str, Any]) -> list[tuple[str, Cells, list[Cells]]]:
    """Title, header and rows."""
    found: list[tuple[str, Cells, list[Cells]]] = []
    text = groups(result, "text")
    if text:
        header = ["memory", "parameters", "minutes", "updates", *(f"{n}×" for n in MULTIPLES), "16× to 1×", "seeds"]
        for name, title in (
            ("last", f"Text, bits per byte in the last {LENGTH} bytes of a context of n × {LENGTH}"),
            ("whole", f"Text, bits per byte in a whole context of n × {LENGTH}"),
        ):
            rows = []
            for memory, runs in text.items():
                bits = [mean(runs, "measured", name, index) for index in range(len(MULTIPLES))]
                sizes = [
                    f"{mean(runs, 'parameters'):,.0f}",
                    f"{mean(runs, 'minutes'):g}",
                    f"{mean(runs, 'updates'):,.0f}",
                ]
                change = f"{100 * (bits[-1] / bits[0] - 1):+.1f}%"
                rows.append([memory, *sizes, *(f"{x:.3f}" for x in bits), change, str(len(runs))])
            found.append((title, header, rows))
    recalled = groups(result, "recall")
    if recalled:
        rows = [
            [
                memory,
                f"{mean(runs, 'parameters'):,.0f}",
                f"{mean(runs, 'minutes'):g}",
                *(f"{100 * mean(runs, 'measured', name):.1f}" for name in ("near", "far", "accuracy")),
                str(len(runs)),
            ]
            for memory, runs in recalled.items()
        ]
        header = ["memory", "parameters", "minutes", "within the window", "beyond it", "mean", "seeds"]
        found.append(("Recall of a key's newest value, % right", header, rows))
    return found


def target_lines(result: dict[str, Any]) -> list[str]:
    """What the numbers say of the claims, in sentences."""
    lines = []
    text, recalled = groups(result, "text"), groups(result, "recall")
    for memory in text:
        if CONTINUED.get(memory, memory) in ("memory attention", "scan", "rotary attention"):
            first, last = (mean(text[memory], "measured", "last", index) for index in (0, -1))
            lines.append(
                f"{memory}, 16 × the training length: {last:.3f} bits, {100 * (last / first - 1):+.1f}% of 1 ×"
            )
    parts = ("scan", "windowed attention")
    if all(name in text for name in (*parts, "hybrid")):
        values = {name: mean(text[name], "measured", "last", -1) for name in (*parts, "hybrid")}
        said = "below" if values["hybrid"] < min(values[name] for name in parts) else "not below"
        lines.append(f"hybrid, text at 16 ×: {said} its parts: " + _listed(values, 3))
    if all(name in recalled for name in (*parts, "hybrid")):
        values = {name: 100 * mean(recalled[name], "measured", "accuracy") for name in (*parts, "hybrid")}
        said = "above" if values["hybrid"] > max(values[name] for name in parts) else "not above"
        lines.append(f"hybrid, recall: {said} its parts: " + _listed(values, 1))
    return lines


def _listed(values: dict[str, float], digits: int) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items())


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; returns an error or an empty string. Dots: seeds; lines: means."""
    shown = {task: found for task in TASKS if (found := groups(result, task))}

    def panels(figure: Any) -> list[Any]:
        panes = list(figure.subplots(1, len(shown), squeeze=False).flat)
        for axes, (task, found) in zip(panes, shown.items(), strict=True):
            (_text if task == "text" else _recall)(axes, found)
            axes.grid(axis="y", color=INK, alpha=0.25, lw=0.6)
        return panes

    return save(result, path, panels, (5.4 * len(shown) + 0.4, 4.6))


def _text(axes: Any, found: dict[str, list[dict[str, Any]]]) -> None:
    for memory, runs in found.items():
        bits = [mean(runs, "measured", "last", index) for index in range(len(MULTIPLES))]
        axes.plot(range(len(MULTIPLES)), bits, lw=2, label=memory, **style(memory))
        for run in runs:
            axes.plot(range(len(MULTIPLES)), run["measured"]["last"], ".", color=style(memory)["color"], ms=5)
    axes.set_xticks(range(len(MULTIPLES)), [f"{n}×" for n in MULTIPLES])
    steady = [
        bit
        for memory, runs in found.items()
        if memory != "rotary attention"
        for r in runs
        for bit in r["measured"]["last"]
    ]
    if steady:
        low, high = min(steady), max(steady)
        axes.set_ylim(low - 0.1 * (high - low) - 0.02, high + 0.6 * (high - low) + 0.05)
    axes.set_xlabel(f"context, in training lengths of {LENGTH} bytes")
    axes.set_ylabel(f"bits per byte, last {LENGTH} bytes")
    axes.set_title("Python's sources, by the byte", loc="left")
    axes.legend(frameon=False, fontsize=9.5)


def _recall(axes: Any, found: dict[str, list[dict[str, Any]]]) -> None:
    names = {"near": "within the window", "far": "beyond it", "accuracy": "mean"}
    width = 0.8 / len(found)
    for index, (memory, runs) in enumerate(found.items()):
        places = [at + (index - (len(found) - 1) / 2) * width for at in range(len(names))]
        axes.bar(
            places,
            [100 * mean(runs, "measured", name) for name in names],
            width * 0.9,
            color=COLOURS[memory],
            label=memory,
        )
        for run in runs:
            axes.plot(places, [100 * run["measured"][name] for name in names], ".", color=INK, ms=4)
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set_ylim(0, 118)
    axes.set_ylabel("% right")
    axes.set_title("Newest value of a key", loc="left")
    axes.legend(frameon=False, fontsize=9.5, ncols=len(found), loc="upper center")
