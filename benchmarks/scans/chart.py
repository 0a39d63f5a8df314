"""Chart: time by sequence length beside the baselines, and a training step."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

INK = "#7d8590"
OURS = "#e8590c"
COLOURS = {
    "best loop": "#3b82f6",
    "plain loop": "#6d9eeb",
    "mambapy": "#10a37f",
    "materialising loop": "#a855f7",
    "compiled loop": "#6366f1",
    "mamba_ssm": "#10a37f",
    "causal attention": "#c08a00",
}
STAMP = "Description"  # PNG text chunk of the fingerprint


def fingerprint(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def draw(result: dict[str, Any], path: Path) -> str:
    """Writes the PNG; returns an error or an empty string."""

    def panels(figure: Any) -> list[Any]:
        rows = _most_compared(result)
        if len(rows) < 2:
            axes = figure.subplots()
            _growth(axes, result)
            return [axes]
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _growth(left, result)
        _bars(right, rows)
        return [left, right]

    return save(result, path, panels)


def save(
    result: dict[str, Any],
    path: Path,
    panels: Callable[[Any], list[Any]],
    size: tuple[float, float] = (11, 4.4),
) -> str:
    """Writes the figure that ``panels`` draws; ``size`` in inches. Returns as ``draw``."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed (pip install -e '.[bench]')"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: Any = {"font.size": 11, **dict.fromkeys(inked, INK)}
    with plt.rc_context(style):
        figure = plt.figure(figsize=size, layout="constrained")
        for axes in panels(figure):
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, transparent=True, metadata={STAMP: fingerprint(result)})
        plt.close(figure)
    return ""


def _number(value: float, position: int) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _colour(row: dict[str, Any]) -> str:
    return OURS if row["backend"] is not None else COLOURS.get(row["implementation"], INK)


def _growth(axes: Any, result: dict[str, Any]) -> None:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in _sweep(result, "forward"):
        lines.setdefault(row["implementation"], []).append(row)
    for index, (name, rows) in enumerate(lines.items()):
        rows.sort(key=lambda row: row["time"])
        times, values = [row["time"] for row in rows], [row["milliseconds"] for row in rows]
        first = rows[0]["backend"] is not None
        dashes = ":" if first and index else "-"
        axes.plot(times, values, dashes, marker="o", ms=4, lw=2.6 if first else 1.6, color=_colour(rows[0]), label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_number)
    ticks = sorted({row["time"] for rows in lines.values() for row in rows})
    axes.set_xticks(ticks, [f"{time:,}" for time in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color=INK, alpha=0.25, lw=0.6)
    axes.set_xlabel("steps")
    axes.set_ylabel("milliseconds")
    sample = next(iter(lines.values()), [None])[0]
    size = f"batch {sample['batch']}, {sample['channels']} channels, {sample['dtype']}" if sample else ""
    axes.set_title(f"forward: {size}", loc="left")
    axes.legend(frameon=False, fontsize=9.5)


def _most_compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Training rows (GPU: backward) that most implementations ran, slowest first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in _sweep(result, "training" if result["device"] == "cpu" else "backward"):
        groups.setdefault(row["group"], []).append(row)
    return sorted(max(groups.values(), key=len, default=[]), key=lambda row: row["ns_per_element"], reverse=True)


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    values = [row["ns_per_element"] for row in rows]
    axes.barh([row["implementation"] for row in rows], values, color=[_colour(row) for row in rows], height=0.6)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 8)
    axes.xaxis.set_major_formatter(_number)
    for index, value in enumerate(values):
        text = f"{value:,.0f} ns" if value >= 10 else f"{value:.2g} ns"
        axes.text(value * 1.12, index, text, va="center", fontsize=9.5)
    axes.minorticks_off()
    axes.set_xlabel("ns/element")
    kind = "training step" if rows[0]["measure"] == "training" else "backward"
    axes.set_title(f"{kind}: {rows[0]['time']:,} steps", loc="left")


def _sweep(result: dict[str, Any], measure: str) -> list[dict[str, Any]]:
    """By length, without variants."""
    kept = []
    for row in result["rows"]:
        compared = row["op"] in ("selective_scan", "attention") and row["measure"] == measure
        varied = "variants" in row["group"] or "short and long" in row["group"]
        other = result["device"] == "cuda" and measure == "forward" and (row["batch"], row["channels"]) != (1, 1536)
        if compared and "milliseconds" in row and not (varied or other):
            kept.append(row)
    return kept
