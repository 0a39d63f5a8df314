"""Learning curves: return by minutes, a panel per task, a colour per variant.

Returns of evaluated checkpoints if any, else of collected episodes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scans.chart import INK, OURS, save
from world.report import groups, is_control
from world.tasks import ALL, COMMON

COLOURS = {
    "scan": OURS,
    "convolution and scan off": "#10a37f",
    "scan off": "#c08a00",
    "unrotated": "#a855f7",
    "GRU": "#3b82f6",
    "reinforce": "#ec4899",
    "all_action": "#9a6b3f",
    "pathwise": "#06b6d4",
}
COLUMNS = 3


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; returns an error or an empty string."""
    found = groups(result)
    tasks = list(dict.fromkeys(task for task, _ in found))
    if not tasks:
        return "there is no run to draw"
    rows, columns = -(-len(tasks) // COLUMNS), min(len(tasks), COLUMNS)

    def panels(figure: Any) -> list[Any]:
        from matplotlib.lines import Line2D

        panes = figure.subplots(rows, columns, squeeze=False).flat
        for axes in panes[len(tasks) :]:
            axes.set_axis_off()
        for axes, task in zip(panes, tasks, strict=False):
            _panel(axes, task, {variant: runs for (name, variant), runs in found.items() if name == task})
        handles = {variant: Line2D([], [], color=_colour(variant), lw=2) for _, variant in found}
        figure.legend(
            [*handles.values()], [*handles], frameon=False, ncols=len(handles), loc="outside lower center", fontsize=10
        )
        return list(panes[: len(tasks)])

    return save(result, path, panels, (4.2 * columns + 0.6, 3.6 * rows + 0.4))


def _colour(variant: str) -> str:
    return COLOURS.get(variant, INK)


def _panel(axes: Any, task: str, variants: dict[str, list[dict[str, Any]]]) -> None:
    known, evaluated = ALL.get(task), is_control(task) or task in COMMON
    for variant, runs in variants.items():
        ours = known is not None and variant == known.ours
        for run in runs:
            points = np.array(run["evaluations" if evaluated else "curve"])
            if len(points):
                x = points[:, 1] / 1000 if task in COMMON else points[:, 0] / 60
                heights = points[:, 2] if evaluated else _smooth(points[:, 2])
                axes.plot(x, heights, color=_colour(variant), lw=1.8 if ours else 1.2)
    if known is not None:
        axes.set_ylim(known.floor, known.ceiling)
        if known.published is not None:
            _line(axes, known.published[0], "best published", "bottom")
        elif evaluated and known.score == "return":
            _line(axes, known.at_least, "threshold" if is_control(task) else "at least", "top")
    axes.set_title(task, loc="left")
    axes.set_xlabel("thousands of steps" if task in COMMON else "minutes")
    axes.set_xlim(left=0)
    axes.set_ylabel("return of a checkpoint" if evaluated else "return per episode, while training")
    axes.grid(axis="y", color=INK, alpha=0.25, lw=0.6)


def _line(axes: Any, height: float, text: str, side: str) -> None:
    """A dotted line, labelled at ``side``; curves rise from the lower left."""
    low, high = axes.get_ylim()
    axes.axhline(height, color=INK, ls=":", lw=1.2)
    gap = 0.01 * (high - low) * (1 if side == "bottom" else -1)
    x, align = (0.01, "left") if side == "bottom" and height > low + 0.7 * (high - low) else (0.99, "right")
    axes.text(x, height + gap, text, transform=axes.get_yaxis_transform(), ha=align, va=side, fontsize=9)


def _smooth(values: np.ndarray) -> np.ndarray:
    width = min(5, len(values))
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
