"""Chart: time relative to ours, forward and training, by problem."""

from pathlib import Path
from typing import Any

from scans.chart import COLOURS, INK, OURS, save

PALETTE = {"loop": "#3b82f6", "loop, channels last": "#10a37f", "compiled loop": "#a855f7", **COLOURS}


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; returns an error or an empty string."""

    def panels(figure: Any) -> list[Any]:
        both = figure.subplots(1, 2)
        for axes, measure in zip(both, ("forward", "training"), strict=True):
            _bars(axes, result, measure)
        return list(both)

    return save(result, path, panels)


def _bars(axes: Any, result: dict[str, Any], measure: str) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["measure"] == measure and "ratio" in row and "recomputed" not in row["implementation"]:
            groups.setdefault(f"{row['hidden']} ch\n{row['size']}×{row['size']}", []).append(row)
    names = list(dict.fromkeys(row["implementation"] for rows in groups.values() for row in rows))
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        values = [next((r["ratio"] for r in rows if r["implementation"] == name), 0.0) for rows in groups.values()]
        positions = [i + (number - (len(names) - 1) / 2) * width for i in range(len(groups))]
        colour = OURS if name.startswith("wmkernels") else PALETTE.get(name, INK)
        axes.bar(positions, values, width * 0.92, color=colour, label=name)
        for position, value in zip(positions, values, strict=True):
            if value:
                axes.text(position, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.axhline(1.0, color=INK, lw=0.8)
    axes.set_ylabel("time over ours")
    axes.set_title("forward" if measure == "forward" else "training step", loc="left")
    axes.legend(frameon=False, fontsize=9)
