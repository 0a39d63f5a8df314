"""Picture and film of ``demo arm``."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.acting.video import video_file, writer
from worldmodel.demo.world_picture import INK
from worldmodel.runs.optional_dependencies import require

COLOURS = {"imitated": "#2463eb", "mean command": "#c08a00", "random": "#10a37f"}
_FRAMES = 6  # of an episode, in the picture
_GAP = 8  # pixels between arms of the film
_FRAMES_PER_SECOND, _STAY = 15, 10  # frames at the end


@dataclasses.dataclass(frozen=True)
class Shown:
    """An episode of one task.

    Attributes:
        observed: its first picture, as the policy gets it, uint8 (32, 32, 3).
        reconstructed: the same, decoded from its latent.
        frames: of every step, and the end, uint8 (side, side, 3).
        success: whether the task was done.
    """

    observed: np.ndarray
    reconstructed: np.ndarray
    frames: Sequence[np.ndarray]
    success: bool


def draw(shown: Mapping[str, Shown], success: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Writes the PNG: shares of success by actor and task, and an episode of each task.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    require("matplotlib", "draw the picture").use("Agg")
    plt = require("matplotlib.pyplot", "draw the picture")
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with plt.rc_context({"font.size": 11, **dict.fromkeys(inked, INK)}):
        figure = plt.figure(figsize=(13, 6.6), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 3.4))
        _bars(left.subplots(), success)
        panes = right.subplots(len(shown), 2 + _FRAMES, squeeze=False)
        for row, (task, episode) in zip(panes, shown.items(), strict=True):
            index = np.linspace(0, len(episode.frames) - 1, _FRAMES).round().astype(int)
            for axes, picture in zip(
                row, [episode.observed, episode.reconstructed, *(episode.frames[i] for i in index)], strict=True
            ):
                axes.imshow(picture, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            row[0].set_ylabel(task)
            row[-1].set_xlabel(f"step {index[-1]}" + ("" if episode.success else ": not done"), fontsize=9)
        for axes, title in zip(panes[0], ("observed", "decoded", "the arm, from start to end"), strict=False):
            axes.set_title(title, loc="left", fontsize=11).set_in_layout(False)
        figure.savefig(path, dpi=130, transparent=True)
        plt.close(figure)


def _bars(axes: Any, success: Mapping[str, Mapping[str, float]]) -> None:
    height = 0.8 / len(success)
    for index, (name, shares) in enumerate(success.items()):
        places = np.arange(len(shares)) + index * height
        axes.barh(places, [100 * share for share in shares.values()], 0.9 * height, color=COLOURS[name], label=name)
        axes.set_yticks(np.arange(len(shares)) + 0.4 - height / 2, list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("episodes with success, %")
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))


def film(shown: Mapping[str, Shown], path: Path) -> Path:
    """Writes the film of all tasks side by side; returns its path, that of a GIF without imageio-ffmpeg."""
    path, _ = video_file(path)
    last = max(len(episode.frames) for episode in shown.values()) - 1
    with writer(path, _FRAMES_PER_SECOND) as frames:
        for step in [*range(last), *[last] * _STAY]:
            arms = [episode.frames[min(step, len(episode.frames) - 1)] for episode in shown.values()]
            gap = np.full((len(arms[0]), _GAP, 3), 255, np.uint8)
            joined = [part for arm in arms for part in (arm, gap)][:-1]
            frames.append_data(np.concatenate(joined, 1))
    return path
