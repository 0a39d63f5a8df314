"""Chart: the cue by gap, the ball by step ahead."""

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
    "scan (latent sampled)": "#c08a00",
    "scan (latent sampled for half of memory)": "#ef4444",
    "scan (latent sampled for memory)": "#0ea5e9",
    "none (latent sampled)": "#a855f7",
}


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; returns an error or an empty string."""
    kinds = {panel: groups(result, task) for task, panel in (("cue", _cue), ("ball", _ball))}
    kinds = {panel: found for panel, found in kinds.items() if found}

    def panels(figure: Any) -> list[Any]:
        panes = list(figure.subplots(1, len(kinds), squeeze=False).flat)
        for axes, (panel, found) in zip(panes, kinds.items(), strict=True):
            panel(axes, found)
            axes.grid(axis="y", color=INK, alpha=0.25, lw=0.6)
            axes.legend(frameon=False, fontsize=9.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        return panes

    return save(result, path, panels, (5.2 * len(kinds) + 0.4, 4.5))


def _cue(axes: Any, found: dict[str, list[dict[str, Any]]]) -> None:
    """Dots: seeds; line: mean."""
    for memory, runs in found.items():
        accuracies = np.array([[run["measured"]["gaps"][name]["key_or_ball"] for name in GAPS] for run in runs])
        axes.plot(100 * accuracies.mean(0), color=COLOURS[memory], lw=2, label=memory)
        for seed in accuracies:
            axes.plot(100 * seed, ".", color=COLOURS[memory], ms=6)
    axes.axhline(50, color=INK, ls=":", lw=1.2)
    axes.text(0.99, 51.5, "chance", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
    axes.set_xticks(range(len(GAPS)), [*GAPS])
    axes.set_ylim(40, 102)
    axes.set_xlabel("steps since the cue was last in view")
    axes.set_ylabel("accuracy, key or ball, %")
    axes.set_title("MemoryS9: cue back in view", loc="left")


def _ball(axes: Any, found: dict[str, list[dict[str, Any]]]) -> None:
    """Thin lines: seeds; thick: mean."""
    for memory, runs in found.items():
        curves = np.array([run["measured"]["wrong_cells"]["model"] for run in runs])
        ahead = np.arange(1, curves.shape[1] + 1)
        axes.plot(ahead, curves.mean(0), color=COLOURS[memory], lw=2, label=memory)
        axes.plot(ahead, curves.T, color=COLOURS[memory], lw=0.7, alpha=0.6)
    persistence = next(iter(found.values()))[0]["measured"]["wrong_cells"]["persistence"]
    axes.plot(ahead, persistence, color=INK, ls="--", lw=1.2, label="persistence baseline")
    axes.set_ylim(0)
    axes.set_xlabel("steps ahead, open-loop")
    axes.set_ylabel("wrong cells of the ball")
    axes.set_title("HiddenBall: open-loop prediction", loc="left")
