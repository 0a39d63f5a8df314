"""Picture and film of ``demo plan``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.acting.room_episodes import Driven
from worldmodel.acting.video import video_file, writer
from worldmodel.demo.world_picture import INK
from worldmodel.environments.two_rooms.moves import Layouts
from worldmodel.environments.two_rooms.pictures import drawing, with_paths
from worldmodel.runs.optional_dependencies import require

COLOURS = {"planned": "#2463eb", "straight line": "#c08a00", "random walk": "#10a37f"}
_FORESEEN, _TAKEN = (234, 120, 20), (36, 99, 235)
_GAP = 8  # pixels between rooms of the film
_FRAMES_PER_SECOND, _STEPS_PER_FRAME = 10, 4
_STAY = 6  # frames at the end


def draw(
    driven: Mapping[str, Driven], foreseen: Tensor, goal: Tensor, layouts: Layouts, radius: float, path: Path
) -> None:
    """Writes the PNG.

    Args:
        driven: episodes by controller, "planned" among them.
        foreseen: places of the first plans of four rooms, (4, actions + 1, 2).
        goal: (rows, 2).
        layouts: (rows,).
        radius: of a success, pixels.
        path: of the picture.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    require("matplotlib", "draw the picture").use("Agg")
    plt = require("matplotlib.pyplot", "draw the picture")
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with plt.rc_context({"font.size": 11, **dict.fromkeys(inked, INK)}):
        figure = plt.figure(figsize=(12, 3.2), layout="constrained")
        left, *panes = figure.subplots(1, 5, width_ratios=(1.4, 1, 1, 1, 1))
        _reached(left, driven)
        planned = driven["planned"]
        for row, axes in enumerate(panes):
            taken = planned.path[row, : int(planned.first[row]) + 1]
            picture = drawing(planned.path[row, 0], goal[row], radius, layouts[row])
            axes.imshow(with_paths(picture, [(foreseen[row], _FORESEEN), (taken, _TAKEN)]))
            axes.set_axis_off()
        said = "orange: foreseen at the start; blue: taken; ring: the goal"
        panes[0].set_title(said, loc="left", fontsize=11).set_in_layout(False)  # it is wider than its pane
        figure.savefig(path, dpi=160, transparent=True)
        plt.close(figure)


def _reached(axes: Any, driven: Mapping[str, Driven]) -> None:
    for name, found in driven.items():
        steps = torch.arange(found.path.shape[1])
        share = (found.first[:, None] <= steps).double().mean(0)
        style = {"lw": 2.6, "zorder": 3} if name == "planned" else {"lw": 1.6, "ls": "--"}
        axes.plot(steps, 100 * share, color=COLOURS[name], label=name, **style)
    axes.set_ylim(0, 104)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("moves")
    axes.set_ylabel("goals reached, %")
    axes.legend(frameon=False, fontsize=9, loc="center right")


def film(
    driven: Driven,
    foreseen: Sequence[Tensor],
    action_steps: int,
    goal: Tensor,
    layouts: Layouts,
    radius: float,
    path: Path,
) -> Path:
    """Writes the film of four rooms; returns its path, that of a GIF without imageio-ffmpeg.

    Args:
        driven: episodes.
        foreseen: places of the plan at every action, (4, at least 1, 2) each.
        action_steps: moves per action.
        goal: (rows, 2).
        layouts: (rows,).
        radius: of a success, pixels.
        path: of the film.
    """
    path, _ = video_file(path)
    last = min(int(driven.first[:4].max()), driven.path.shape[1] - 1)
    steps = [*range(0, last, _STEPS_PER_FRAME), *[last] * _STAY]
    with writer(path, _FRAMES_PER_SECOND) as frames:
        for step in steps:
            plan = foreseen[min(step // action_steps, len(foreseen) - 1)]
            frames.append_data(_frame(driven.path[:4, : step + 1], plan, goal, layouts, radius))
    return path


def _frame(taken: Tensor, plan: Tensor, goal: Tensor, layouts: Layouts, radius: float) -> np.ndarray:
    rooms = []
    for row in range(4):
        picture = drawing(taken[row, -1], goal[row], radius, layouts[row])
        picture = with_paths(picture, [(plan[row], _FORESEEN), (taken[row], _TAKEN)])
        rooms.append(np.pad(picture, ((0, 0), (0, _GAP * (row < 3)), (0, 0)), constant_values=255))
    return np.concatenate(rooms, 1)
