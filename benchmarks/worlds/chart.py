"""Chart: accuracy by steps out of view, for all memories."""

from pathlib import Path
from typing import Any

import numpy as np

from scans.chart import INK, OURS, save
from worldmodel.environments.returning import BUCKETS
from worlds.report import accuracy, groups
from worlds.rows import ROWS

CHANCE = 100 / 8
_COLOURS = ("#3b82f6", "#10a37f", "#c08a00", "#a855f7", "#ef4444", "#0ea5e9", "#84cc16", "#ec4899", "#64748b")


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; returns an error or an empty string."""
    return save(result, path, lambda figure: [_curves(figure.subplots(), result)], (9.5, 4.8))


def _curves(axes: Any, result: dict[str, Any]) -> Any:
    """A line per memory, of its longest training; dots: seeds."""
    longest = {runs[0]["row"]: runs for runs in groups(result).values() if ROWS[runs[0]["row"]].env == "rooms"}
    colours = iter(_COLOURS * 3)
    for row, runs in longest.items():
        test = next(iter(runs[0]["tests"]))
        each = [accuracy(runs, test, bucket) for bucket in BUCKETS]
        ours = row.startswith("place, mo")
        style = {"color": OURS, "lw": 2.6, "zorder": 3} if ours else {"color": next(colours), "lw": 1.6}
        style["ls"] = "--" if row == "place, moves learned" else "-"
        means = [100 * np.mean(values) if values else np.nan for values in each]
        axes.plot(means, label=f"{row}, {runs[0]['minutes']:g} min", **style)
        for column, values in enumerate(each):
            axes.plot([column] * len(values), 100 * np.array(values), ".", color=style["color"], ms=5)
    axes.axhline(CHANCE, color=INK, ls=":", lw=1.2)
    axes.text(0.99, CHANCE + 1, "chance", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
    axes.set_xticks(range(len(BUCKETS)), BUCKETS)
    axes.set_ylim(0, 103)
    axes.set_xlabel("steps since a cell was last in view")
    axes.set_ylabel("cells back in view, foreseen, %")
    axes.set_title("Rooms: what a memory knows of a cell that comes back", loc="left")
    axes.grid(axis="y", color=INK, alpha=0.25, lw=0.6)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes
