"""Chart: accuracy by steps out of view, for all memories."""

from pathlib import Path
from typing import Any

import numpy as np

from scans.chart import INK, OURS, save
from worldmodel.environments.returning import BUCKETS
from worlds.report import Runs, accuracy, groups
from worlds.rows import ROWS

CHANCE = 100 / 8
_COLOURS = ("#3b82f6", "#10a37f", "#c08a00", "#a855f7", "#ef4444", "#0ea5e9", "#84cc16", "#ec4899", "#64748b")
_DASHES = ("-", "--", "-.")  # of rows in the same colour


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; returns an error or an empty string."""
    longest = {runs[0]["row"]: runs for runs in groups(result).values() if ROWS[runs[0]["row"]].env == "rooms"}
    colours, used = iter(_COLOURS * 3), []
    styles: dict[str, dict[str, Any]] = {}
    for row in longest:
        style = {"color": OURS, "lw": 2.6, "zorder": 3} if row.startswith("place, mo") else {"color": next(colours)}
        used.append(style["color"])
        styles[row] = {"lw": 1.6, **style, "ls": _DASHES[(used.count(style["color"]) - 1) % len(_DASHES)]}

    def panels(figure: Any) -> list[Any]:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _by_gap(left, longest, styles)
        _by_minutes(right, longest, styles)
        left.axhline(CHANCE, color=INK, ls=":", lw=1.2)
        for axes in (left, right):
            axes.grid(axis="y", color=INK, alpha=0.25, lw=0.6)
        left.text(0.99, CHANCE + 1, "chance", transform=left.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
        right.legend(
            *left.get_legend_handles_labels(),
            frameon=False,
            fontsize=9,
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            handlelength=3,
        )
        return [left, right]

    return save(result, path, panels, (13, 4.8))


def _by_gap(axes: Any, longest: dict[str, Runs], styles: dict[str, dict[str, Any]]) -> None:
    """A line per memory, of its longest training; dots: seeds."""
    for row, runs in longest.items():
        test = next(iter(runs[0]["tests"]))
        each = [accuracy(runs, test, bucket) for bucket in BUCKETS]
        means = [100 * np.mean(values) if values else np.nan for values in each]
        axes.plot(means, label=f"{row}, {runs[0]['minutes']:g} min", **styles[row])
        for column, values in enumerate(each):
            axes.plot([column] * len(values), 100 * np.array(values), ".", color=styles[row]["color"], ms=5)
    axes.set_xticks(range(len(BUCKETS)), BUCKETS)
    axes.set_ylim(0, 103)
    axes.set_xlabel("steps since a cell was last in view")
    axes.set_ylabel("cells back in view, foreseen, %")
    axes.set_title("Rooms: what a memory knows of a cell that comes back", loc="left")


def _by_minutes(axes: Any, longest: dict[str, Runs], styles: dict[str, dict[str, Any]]) -> None:
    """A line per seed. The border counts too, which is easy."""
    for row, runs in longest.items():
        for run in runs:
            minutes, right = ([point[name] for point in run["curve"]] for name in ("minutes", "returning"))
            axes.plot(minutes, 100 * np.array(right), **styles[row])
    axes.set_xscale("log")
    axes.set_xlabel("CPU minutes of training")
    axes.set_title("While training on 128 steps, border included", loc="left")
