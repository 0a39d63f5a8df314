"""The picture of ``demo radar``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.runs.optional_dependencies import require

INK = "#7d8590"
COLOURS = {"attention": "#e8590c", "GRU": "#3b82f6", "no memory": "#10a37f", "random": INK}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What is drawn.

    Attributes:
        spectrogram: dB over the noise, (channels × frequencies, time).
        channels: of the game.
        sent: channels of the radar, (intervals,).
        jammed: channels of the jammer, (intervals,).
        hits: share of games by interval, by policy.
        maps: range-Doppler maps, dB over the noise, by title.
        target: Doppler row and range cell of the target in all maps.
        pulses: ambiguity functions (Doppler, lags), 0 to 1, by title.
    """

    spectrogram: np.ndarray
    channels: int
    sent: np.ndarray
    jammed: np.ndarray
    hits: Mapping[str, list[float]]
    maps: Mapping[str, np.ndarray]
    target: tuple[int, int]
    pulses: Mapping[str, np.ndarray]


def draw(drawn: Drawn, path: Path) -> None:
    """Writes the PNG; raises MissingPackage if matplotlib is not installed."""
    require("matplotlib", "draw the picture").use("Agg")
    plt = require("matplotlib.pyplot", "draw the picture")
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with plt.rc_context({"font.size": 11, **dict.fromkeys(inked, INK)}):
        figure = plt.figure(figsize=(12.5, 7.4), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        left, right = top.subplots(1, 2, width_ratios=(1.6, 1))
        _spectrogram(left, drawn)
        _hits(right, drawn.hits)
        panes = bottom.subplots(1, len(drawn.maps) + len(drawn.pulses))
        highest = max(float(found.max()) for found in drawn.maps.values())
        for axes, (title, found) in zip(panes, drawn.maps.items(), strict=False):
            axes.imshow(found, origin="lower", aspect="auto", interpolation="nearest", vmin=-5, vmax=highest)
            axes.set(xlabel="range cell", ylabel="Doppler row")
            axes.plot(*reversed(drawn.target), "o", color="#ffffff", ms=13, mfc="none", mew=1.2)
            axes.set_title(title, loc="left", fontsize=11)
        for axes, (title, found) in zip(panes[len(drawn.maps) :], drawn.pulses.items(), strict=True):
            _ambiguity(axes, title, found)
        figure.savefig(path, dpi=160, transparent=True)
        plt.close(figure)


def _spectrogram(axes: Any, drawn: Drawn) -> None:
    channels, intervals = drawn.channels, len(drawn.sent)
    extent = (0, intervals, -0.5, channels - 0.5)
    axes.imshow(
        drawn.spectrogram, origin="lower", aspect="auto", extent=extent, vmin=-3, vmax=22, interpolation="nearest"
    )
    time = np.arange(intervals) + 0.5
    axes.plot(time, drawn.jammed, "x", color="#ff8787", ms=7, mew=1.8, label="jammer")
    axes.plot(time, drawn.sent, "o", color="#ffffff", ms=7, mfc="none", mew=1.4, label="radar")
    axes.set(xlabel="interval", ylabel="channel", yticks=range(channels))
    axes.set_title("a game, as a receiver hears it: the jammer looks back 8 intervals", loc="left", fontsize=11)
    box = {"facecolor": "#222222", "framealpha": 1, "edgecolor": "none", "labelcolor": "#ffffff"}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, fontsize=9, **box)


def _hits(axes: Any, hits: Mapping[str, list[float]]) -> None:
    for name, shares in hits.items():
        smooth = np.convolve(np.pad(shares, 1, mode="edge"), np.ones(3) / 3, "valid")
        style = {"lw": 2.6, "zorder": 3} if name == "attention" else {"lw": 1.6}
        axes.plot(100 * smooth, color=COLOURS[name], label=name, **style)
    axes.set_ylim(0, 125 * max(max(shares) for shares in hits.values()))  # room for the legend
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="interval of the game", ylabel="games in which the radar is hit, %")
    axes.set_title("L hidden in 1 to 8", loc="left", fontsize=11)
    axes.legend(loc="upper center", ncols=len(hits), columnspacing=1, handlelength=1.2, frameon=False, fontsize=9)


def _ambiguity(axes: Any, title: str, surface: np.ndarray) -> None:
    decibels = 20 * np.log10(np.maximum(surface, 1e-4))
    samples = (surface.shape[1] + 1) // 2
    axes.imshow(
        decibels, origin="lower", aspect="auto", vmin=-50, vmax=0, extent=(-1, 1, -4, 4), interpolation="nearest"
    )
    axes.set(xlabel=f"delay / duration ({samples} samples)", ylabel="Doppler × duration")
    axes.set_title(title, loc="left", fontsize=11)
