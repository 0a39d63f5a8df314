"""Metrics of runs over their steps, updates or minutes, as a PNG."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.pictures.page import plain_style
from worldmodel.runs.optional_dependencies import require

_INCHES, _DPI = (8.0, 4.5), 120
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe & Ito 2008
_POINTS = 200  # of a mean over several runs


@dataclasses.dataclass
class Curve:
    """A metric of one run.

    Attributes:
        label: runs with the same label are drawn in one colour, with their mean.
        x: (n,), rising.
        y: (n,).
        low: (n,), lower end of the confidence interval of ``y``; None without.
        high: (n,), upper end.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def draw_curves(curves: Sequence[Curve], path: Path, x_label: str, y_label: str) -> None:
    """Draws one line per run, thick where there is only one of its label; of several also their mean, thick.

    The mean ends where the shortest of them does. A single run has its confidence interval as a band. Raises
    MissingPackage without matplotlib or imageio.
    """
    with plain_style():
        figure = require("matplotlib.figure", "draw curves").Figure(_INCHES, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        labels = list(dict.fromkeys(curve.label for curve in curves))
        for number, label in enumerate(labels):
            colour = _COLOURS[number % len(_COLOURS)]
            style = ("-", "--", ":")[number // len(_COLOURS) % 3]
            _draw_group(axes, [curve for curve in curves if curve.label == label], label, colour, style)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_formatter(require("matplotlib.ticker", "draw curves").StrMethodFormatter("{x:,g}"))
        axes.legend(frameon=False, fontsize="small")
        canvas = require("matplotlib.backends.backend_agg", "draw curves").FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        require("imageio.v3", "write pictures").imwrite(path, pixels, extension=".png")


def _draw_group(axes: Any, curves: Sequence[Curve], label: str, colour: str, style: str) -> None:
    if len(curves) == 1:
        (curve,) = curves
        axes.plot(curve.x, curve.y, style, color=colour, label=label, marker="o" if len(curve.x) == 1 else None)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        return
    for curve in curves:
        axes.plot(curve.x, curve.y, style, color=colour, alpha=0.35, linewidth=0.8)
    x, y = mean_of(curves)
    axes.plot(x, y, style, color=colour, linewidth=2, label=f"{label} (mean of {len(curves)} runs)")


def mean_of(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over runs, between their points by straight lines, where all of them have begun and none has ended.

    Example:
        >>> x, y = mean_of([Curve("a", np.array([0, 2]), np.array([0, 2])), Curve("a", np.array([1, 3]), np.zeros(2))])
        >>> x[[0, -1]].tolist(), y[[0, -1]].tolist()
        ([1.0, 2.0], [0.5, 1.0])
    """
    start, stop = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if start > stop:
        return np.zeros(0), np.zeros(0)
    x = np.linspace(start, stop, _POINTS if stop > start else 1)
    return x, np.mean([np.interp(x, curve.x, curve.y) for curve in curves], 0)
