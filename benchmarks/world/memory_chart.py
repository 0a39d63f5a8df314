"""The result of benchmarks/world_memory.py as a picture: the cue by gap, the ball by step ahead.

Text and lines keep their contrast on a white and on a black page, and the background is left transparent.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scans.chart import INK, OURS, save
from world.cue import GAPS
from world.memory_report import groups

COLOURS = {
    "scan": OURS,
    "ConvLSTM": "#3b82f6",
    "none": "#10a37f",
    "scan (latent drawn)": "#c08a00",
    "none (latent drawn)": "#a855f7",
}


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; answers why not where it cannot."""
    kinds = {panel: groups(result, task) for task, panel in (("cue", _cue), ("ball", _ball))}
    kinds = {panel: found for panel, found in kinds.items() if found}

    def panels(figure: Any) -> list[Any]:
        places = list(figure.subplots(1, len(kinds), squeeze=False).flat)
        for axes, (panel, found) in zip(places, kinds.items(), strict=True):
            panel(axes, found)
            axes.grid(axis="y", color=INK, alpha=0.25, lw=0.6)
            axes.legend(frameon=False, fontsize=10)
        return places

    return save(result, path, panels, (5.2 * len(kinds) + 0.4, 4.0))


def _cue(axes: Any, found: dict[str, list[dict[str, Any]]]) -> None:
    """Each seed is a dot, their mean a line."""
    for memory, runs in found.items():
        shares = np.array([[run["measured"]["gaps"][name]["key_or_ball"] for name in GAPS] for run in runs])
        axes.plot(100 * shares.mean(0), color=COLOURS[memory], lw=2, label=memory)
        for seed in shares:
            axes.plot(100 * seed, ".", color=COLOURS[memory], ms=6)
    axes.axhline(50, color=INK, ls=":", lw=1.2)
    axes.text(0.99, 45, "chance", transform=axes.get_yaxis_transform(), ha="right", fontsize=9)
    axes.set_xticks(range(len(GAPS)), [*GAPS])
    axes.set_ylim(40, 102)
    axes.set_xlabel("steps since the cue was last seen")
    axes.set_ylabel("key or ball told rightly, %")
    axes.set_title("MemoryS9: the cue seen again", loc="left")


def _ball(axes: Any, found: dict[str, list[dict[str, Any]]]) -> None:
    """Each seed is a thin line, their mean a thick one."""
    for memory, runs in found.items():
        curves = np.array([run["measured"]["wrong_cells"]["model"] for run in runs])
        ahead = np.arange(1, curves.shape[1] + 1)
        axes.plot(ahead, curves.mean(0), color=COLOURS[memory], lw=2, label=memory)
        axes.plot(ahead, curves.T, color=COLOURS[memory], lw=0.7, alpha=0.6)
    copied = next(iter(found.values()))[0]["measured"]["wrong_cells"]["copied"]
    axes.plot(ahead, copied, color=INK, ls="--", lw=1.2, label="last map copied")
    axes.set_ylim(0)
    axes.set_xlabel("steps ahead, nothing seen")
    axes.set_ylabel("wrong cells of the ball")
    axes.set_title("HiddenBall: imagined open-loop", loc="left")
