"""Observations of two rooms, and drawings of them."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worldmodel.environments.two_rooms.moves import BORDER, HALF_DOOR, HALF_WALL, SIDE, Layouts
from worldmodel.runs.optional_dependencies import require

DOT_STD = 1.3  # pixels
SCALE = 4  # of drawings
_FLOOR, _WALL, _DOT, _GOAL = (
    np.array(colour) for colour in ((250, 250, 247), (70, 74, 84), (36, 99, 235), (22, 163, 74))
)


def dots(positions: Tensor) -> Tensor:
    """Gaussian dots of standard deviation ``DOT_STD`` and height 1: (..., 2) -> (..., SIDE, SIDE), rows first."""
    pixels = torch.arange(SIDE, dtype=positions.dtype, device=positions.device)
    profile = (-((pixels - positions[..., None]) ** 2) / (2 * DOT_STD**2)).exp()  # (..., 2, SIDE)
    return profile[..., 1, :, None] * profile[..., 0, None, :]


def walls(layouts: Layouts) -> Tensor:
    """1 where there is a wall: float32 (..., SIDE, SIDE), rows first."""
    pixels = torch.arange(SIDE, dtype=torch.float32)
    columns = (pixels - layouts.wall[..., None]).abs() <= HALF_WALL
    rows = (pixels - layouts.door[..., None]).abs() > HALF_DOOR
    picture = (rows[..., :, None] & columns[..., None, :]).float()
    for edge in (BORDER - 1, SIDE - BORDER):
        picture[..., edge, :] = picture[..., edge] = 1
    return picture


def pictures(positions: Tensor, layouts: Layouts) -> Tensor:
    """Observations: dots (..., 2) and walls of layouts (...) as float32 (..., 2, SIDE, SIDE), 0 to 1."""
    return torch.stack([dots(positions), walls(layouts)], -3)


def pixels(positions: Tensor, layouts: Layouts) -> np.ndarray:
    """``pictures`` as ``TwoRooms`` gives them, uint8 (..., SIDE, SIDE, 2)."""
    shown = torch.stack(torch.broadcast_tensors(dots(positions), walls(layouts)), -1)
    return (shown * 255).to(torch.uint8).numpy()


def places(positions: Tensor) -> Tensor:
    """Positions (..., 2) as ``TwoRooms`` gives them with ``observes="place"``: from the middle, in picture sides."""
    return positions / SIDE - 0.5


def observation(position: Tensor, wall_picture: Tensor, goal: Tensor | None = None) -> np.ndarray:
    """One observation, uint8 (SIDE, SIDE, channels): the dot, the walls, and the goal's dot if it is given."""
    channels = [dots(position), wall_picture] + ([] if goal is None else [dots(goal)])
    return (torch.stack(channels, -1) * 255).to(torch.uint8).numpy()


@functools.lru_cache(maxsize=16)
def _wall_mask(wall: float, door: float) -> np.ndarray:
    return walls(Layouts(torch.tensor(wall), torch.tensor(door))).numpy().repeat(SCALE, 0).repeat(SCALE, 1)[..., None]


def drawing(position: Tensor, goal: Tensor, radius: float, layout: Layouts) -> np.ndarray:
    """The rooms with the dot, and the goal as a ring of ``radius`` pixels: uint8 (SIDE * SCALE, SIDE * SCALE, 3)."""
    mask = _wall_mask(float(layout.wall), float(layout.door))
    picture = _FLOOR * (1 - mask) + _WALL * mask
    axis = (np.arange(SIDE * SCALE) - (SCALE - 1) / 2) / SCALE
    for place, colour, inner, outer in ((goal, _GOAL, radius - 0.6, radius), (position, _DOT, 0, 2 * DOT_STD)):
        distance = np.hypot(axis - float(place[0]), (axis - float(place[1]))[:, None])
        picture[(distance >= inner) & (distance <= outer)] = colour
    return picture.astype(np.uint8)


def with_paths(picture: np.ndarray, paths: Sequence[tuple[Tensor, tuple[int, int, int]]]) -> np.ndarray:
    """A ``drawing`` with paths of places, pixels (steps, 2), each in its colour. Raises MissingPackage without PIL."""
    image_module, draw_module = (require(f"PIL.{part}", "draw paths") for part in ("Image", "ImageDraw"))
    image = image_module.fromarray(picture)
    lines = draw_module.Draw(image)
    for places, colour in paths:
        lines.line([tuple(point) for point in ((places + 0.5) * SCALE).tolist()], fill=colour, width=2)
    return np.asarray(image)
