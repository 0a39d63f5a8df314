"""The picture of ``demo memory``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.demo.repeat_previous import DECK, LAG, SUITS
from worldmodel.runs.optional_dependencies import require

INK = "#7d8590"
COLOURS = {"scan": "#e8590c", "GRU": "#3b82f6", "no memory": "#10a37f"}
LABEL = 0.06  # height of a label, in shares of right answers
SUIT_COLOURS = ("#3b82f6", "#e8590c", "#10a37f", "#c08a00")


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Writes the PNG; raises MissingPackage if matplotlib is not installed."""
    matplotlib = require("matplotlib", "draw the picture")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot", "draw the picture")
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with plt.rc_context({"font.size": 11, **dict.fromkeys(inked, INK)}):
        figure = plt.figure(figsize=(11, 6.4), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(2.7, 1))
        left, right = top.subplots(1, 2, width_ratios=(1.75, 1))
        results = {result["memory"]: result for result in summary["memories"]}
        _accuracy(left, results)
        _sensitivity(right, results["scan"], matplotlib)
        _swap(bottom.subplots(), results["scan"], matplotlib)
        figure.savefig(path, dpi=160, transparent=True)
        plt.close(figure)


def spread(values: list[float], gap: float) -> list[float]:
    """Heights of labels: each at its value, or higher where the one below is nearer than ``gap``.

    Example:
        >>> spread([1.0, 0.25, 0.27], 0.1)
        [1.0, 0.25, 0.35]
    """
    heights, lowest = list(values), -math.inf
    for index in sorted(range(len(values)), key=values.__getitem__):
        heights[index] = lowest = max(values[index], lowest + gap)
    return heights


def _accuracy(axes: Any, results: Mapping[str, Any]) -> None:
    steps = max(result["steps"] for result in results.values())
    curves = {
        name: [(np.sqrt(low * high), accuracy) for low, high, accuracy in result["accuracy_by_time"]]
        for name, result in results.items()
    }
    heights = dict(zip(curves, spread([points[-1][1] for points in curves.values()], LABEL), strict=True))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), color=COLOURS[name], lw=2.6 if name == "scan" else 1.8)
        axes.annotate(
            f"{name}: {results[name]['accuracy_beyond']:.3f}",
            (steps, heights[name]),
            xytext=(-4, 7),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=COLOURS[name],
            weight="bold",
        )
    axes.axvspan(LAG, DECK, color=INK, alpha=0.16, lw=0)
    axes.text(np.sqrt(LAG * DECK), 0.6, "length\nof the\ntraining", ha="center", fontsize=9.5)
    axes.axvline(DECK, color=INK, ls="--", lw=1.2)
    axes.text(DECK * 1.2, 0.6, "state saved,\nprocess ended,\nanother goes on", fontsize=9.5)
    axes.text(DECK * 1.2, 0.14, "chance: one in four", va="top", fontsize=9.5)
    axes.axhline(1 / SUITS, color=INK, ls=":", lw=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(LAG, steps)
    axes.set_ylim(0, 1.08)
    ticks = [2**power for power in range(5, int(np.log2(steps)) + 1, 3)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("step since the last reset")
    axes.set_ylabel("share of right answers")
    scan = results["scan"]
    axes.set_title(
        f"{scan['training_seconds']:.0f} s of training on 103-step episodes, then {steps:,} steps", loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)


def _sensitivity(axes: Any, result: Mapping[str, Any], matplotlib: Any) -> None:
    """|∂Q_t/∂o_s| as opacity, which reads on any background."""
    values = np.array(result["sensitivity"])
    shade = np.clip(values / np.quantile(values[LAG:].max(-1), 0.5), 0, 1)
    image = np.empty((*values.shape, 4))
    image[..., :3] = matplotlib.colors.to_rgb(COLOURS["scan"])
    image[..., 3] = shade
    axes.imshow(image, origin="lower", interpolation="nearest", aspect="equal")
    middle = DECK // 2
    axes.annotate(
        f"s = t − {LAG},\nthe lag that\nthe task needs",
        (middle + 12 - LAG, middle + 12),
        xytext=(3, DECK - 6),
        va="top",
        fontsize=9.5,
        arrowprops={"arrowstyle": "->", "color": INK},
    )
    axes.set_xlabel("s, step of the card")
    axes.set_ylabel("t, step of the answer")
    axes.set_title("|∂Q_t / ∂o_s|", loc="left")


def _swap(axes: Any, result: Mapping[str, Any], matplotlib: Any) -> None:
    swap = result["swap"]
    rows = [
        ("cards that stream 1 saw", swap["past"][0]),
        ("answers of stream 2, with the state of stream 1", swap["answers"][1]),
        ("cards that stream 2 saw", swap["past"][1]),
        ("answers of stream 1, with the state of stream 2", swap["answers"][0]),
    ]
    heights = (3.3, 2.4, 0.9, 0.0)
    for (label, suits), y in zip(rows, heights, strict=True):
        for x, suit in enumerate(suits):
            axes.add_patch(matplotlib.patches.Rectangle((x, y), 0.88, 0.8, color=SUIT_COLOURS[suit], lw=0))
        axes.text(-0.6, y + 0.4, label, ha="right", va="center", fontsize=9.5)
    axes.set_xlim(-14.5, LAG)
    axes.set_ylim(-0.1, 4.2)
    axes.set_axis_off()
    share = f"{swap['as_the_state_says']:.0%} of the answers follow the state"
    axes.set_title(f"two saved states exchanged: {share}", loc="left")
