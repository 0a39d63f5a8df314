"""Learning curves: return against minutes, a panel a task, a colour a memory.

Text and lines keep their contrast on a white and on a black page, and the background is left transparent.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scans.chart import INK, OURS, STAMP, fingerprint
from world.report import TARGETS, groups

COLOURS = {
    "scan": OURS,
    "convolution and scan off": "#10a37f",
    "scan off": "#c08a00",
    "unrotated": "#a855f7",
    "GRU": "#3b82f6",
}


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; answers why not where it cannot."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed (pip install -e '.[bench]')"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = groups(result)
    tasks = list(dict.fromkeys(task for task, _ in found))
    if not tasks:
        return "there is no run to draw"
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: Any = {"font.size": 11, **dict.fromkeys(inked, INK)}
    with plt.rc_context(style):
        size = (4.2 * len(tasks) + 0.6, 4.0)
        figure, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes, task in zip(panels[0], tasks, strict=True):
            _panel(axes, task, {memory: runs for (name, memory), runs in found.items() if name == task})
        panels[0][0].set_ylabel("return of an episode, while training")
        handles = {memory: plt.Line2D([], [], color=COLOURS[memory], lw=2) for _, memory in found}
        figure.legend(
            [*handles.values()], [*handles], frameon=False, ncols=len(handles), loc="outside lower center", fontsize=10
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, transparent=True, metadata={STAMP: fingerprint(result)})
        plt.close(figure)
    return ""


def _panel(axes: Any, task: str, memories: dict[str, list[dict[str, Any]]]) -> None:
    for memory, runs in memories.items():
        for run in runs:
            curve = np.array(run["curve"])
            if len(curve):
                smooth = _smooth(curve[:, 2])
                axes.plot(curve[:, 0] / 60, smooth, color=COLOURS[memory], lw=1.8 if memory == "scan" else 1.2)
    published = TARGETS.get(task, {}).get("published")
    if published is not None:
        axes.axhline(published, color=INK, ls=":", lw=1.2)
        axes.text(
            0.99, published + 0.02, "best published", transform=axes.get_yaxis_transform(), ha="right", fontsize=9
        )
    axes.set_ylim(-1.05, 1.1)
    axes.set_title(task, loc="left")
    axes.set_xlabel("minutes")
    axes.grid(axis="y", color=INK, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours, fewer at the ends."""
    width = min(5, len(values))
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
