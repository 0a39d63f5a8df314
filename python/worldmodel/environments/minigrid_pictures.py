"""MiniGrid's tasks (Chevalier-Boisvert et al. 2023, arXiv 2306.13831) seen as pictures alone.

python -m worldmodel train --env worldmodel/MiniGridPictures-v0 --env-args task=MiniGrid-FourRooms-v0
"""

import difflib
from typing import Any

from worldmodel.environments.ids import register
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.optional_dependencies import missing, require

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

VIEWS = ("full", "partial")


def make(
    task: str = "MiniGrid-Empty-8x8-v0", view: str = "full", tile: int = 8, **options: Any
) -> "gymnasium.Env[Any, Any]":
    """A task whose observation is a picture, uint8 (height, width, 3).

    Args:
        task: id of one of MiniGrid's.
        view: the whole grid, or what the agent sees of it: "full" or "partial".
        tile: pixels per side of a cell.
        options: of the task.

    Raises:
        MissingPackage: minigrid is not installed.
        ConfigurationError: no such task or view, or no pixel.

    Example:
        >>> make().reset(seed=0)[0].shape, make(view="partial", tile=4).reset(seed=0)[0].shape
        ((64, 64, 3), (28, 28, 3))
    """
    wrappers = require("minigrid.wrappers", "run MiniGrid's tasks", "pip install minigrid")
    known = [name for name in gymnasium.registry if name.startswith("MiniGrid-")]
    if task not in known:
        near = ", ".join(difflib.get_close_matches(task, known)) or "MiniGrid-Empty-8x8-v0"
        raise ConfigurationError(f"MiniGridPictures: task is {task!r}, expected one of MiniGrid's, such as {near}")
    if view not in VIEWS:
        raise ConfigurationError(f"MiniGridPictures: view is {view!r}, expected {' or '.join(VIEWS)}")
    if type(tile) is not int or tile < 1:
        raise ConfigurationError(f"MiniGridPictures: tile is {tile!r}, expected an integer of at least 1")
    wrapper = wrappers.RGBImgObsWrapper if view == "full" else wrappers.RGBImgPartialObsWrapper
    return wrappers.ImgObsWrapper(wrapper(gymnasium.make(task, **options), tile_size=tile))


register(gymnasium, "worldmodel.environments.minigrid_pictures:make")
