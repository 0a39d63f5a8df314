"""The picture of ``demo worlds``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.runs.optional_dependencies import require

INK = "#7d8590"
UNSEEN = np.array([125, 133, 144, 40], np.uint8)  # red, green, blue, opacity
COLOURS = {"map of places": "#e8590c", "cell map": "#c08a00", "persistence": "#3b82f6", "chance": "#10a37f"}


def draw(
    scores: Mapping[str, Mapping[str, float]],
    worlds: Mapping[str, np.ndarray],
    colours: np.ndarray,
    summary: Mapping[str, Any],
    path: Path,
) -> None:
    """Writes the PNG.

    Args:
        scores: accuracy by bucket of steps out of view, by predictor.
        worlds: classes of all places, -1 where none was seen, by title.
        colours: uint8 (classes, 3).
        summary: of the demonstration.
        path: of the picture.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    require("matplotlib", "draw the picture").use("Agg")
    plt = require("matplotlib.pyplot", "draw the picture")
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with plt.rc_context({"font.size": 11, **dict.fromkeys(inked, INK)}):
        figure = plt.figure(figsize=(12, 3.8), layout="constrained")
        left, *panes = figure.subplots(1, 1 + len(worlds), width_ratios=(1.5, *[1] * len(worlds)))
        _accuracy(left, scores, summary)
        for axes, (title, classes) in zip(panes, worlds.items(), strict=True):
            show(axes, title, classes, colours)
        figure.savefig(path, dpi=160, transparent=True)
        plt.close(figure)


def show(axes: Any, title: str, classes: np.ndarray, colours: np.ndarray) -> None:
    """Draws places: classes (rows, columns), -1 for what was not seen, in ``colours``, uint8 (classes, 3)."""
    opaque = np.concatenate([colours, np.full((len(colours), 1), 255, np.uint8)], -1)
    axes.imshow(np.where(classes[..., None] < 0, UNSEEN, opaque[classes.clip(0)]), interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(INK)


def _accuracy(axes: Any, scores: Mapping[str, Mapping[str, float]], summary: Mapping[str, Any]) -> None:
    for name, colour in COLOURS.items():
        buckets = {bucket: value for bucket, value in scores[name].items() if not math.isnan(value)}
        style = {"lw": 2.6, "zorder": 3} if name == "map of places" else {"lw": 1.6, "ls": "--"}
        axes.plot(list(buckets), [100 * value for value in buckets.values()], color=colour, label=name, **style)
    axes.set_ylim(0, 104)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("steps since a cell was last in view")
    axes.set_ylabel("cells back in view, foreseen, %")
    axes.set_title(f"rooms, {summary['parameters']:,} parameters", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="center right")
