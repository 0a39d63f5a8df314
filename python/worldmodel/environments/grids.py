"""What the grid worlds share: moves, windows of cells, colours, and pictures of them."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

MOVES = np.array([[-1, 0], [0, 1], [1, 0], [0, -1], [0, 0]])  # north, east, south, west, stay: (rows, columns)
STAY = 4

# Distinct on a light and on a dark page, the last one for walls.
PALETTE = np.array(
    [
        [230, 159, 0],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [0, 114, 178],
        [213, 94, 0],
        [204, 121, 167],
        [240, 240, 240],
        [120, 94, 240],
        [170, 255, 195],
        [128, 128, 0],
        [255, 215, 180],
        [70, 240, 240],
        [150, 75, 0],
        [255, 105, 180],
        [188, 246, 12],
        [60, 60, 66],
    ],
    np.uint8,
)
MOST_COLOURS = len(PALETTE) - 1


def palette(colours: int) -> np.ndarray:
    """uint8 (colours + 1, 3): the colours, then the walls' grey."""
    return np.concatenate([PALETTE[:colours], PALETTE[-1:]])


def window(view: int) -> np.ndarray:
    """Offsets of the cells of a ``view`` x ``view`` window from its middle, row by row: int64 (view * view, 2)."""
    side = np.arange(view) - view // 2
    return np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)


def turned(offsets: np.ndarray) -> np.ndarray:
    """World offsets of an agent's own ``offsets``, for the headings north, east, south, west: (4, *offsets.shape).

    Example:
        >>> turned(np.array([[-1, 0]])).tolist()  # the cell ahead
        [[[-1, 0]], [[0, 1]], [[1, 0]], [[0, -1]]]
    """
    headings = [offsets]
    for _ in range(3):
        rows, columns = headings[-1][..., 0], headings[-1][..., 1]
        headings.append(np.stack([columns, -rows], -1))  # a quarter turn clockwise
    return np.stack(headings)


def paint(
    tokens: np.ndarray, colours: np.ndarray, pixels: int, noise: float = 0, generator: torch.Generator | None = None
) -> np.ndarray:
    """Square grids of class indices as pictures, ``pixels`` x ``pixels`` per cell.

    Args:
        tokens: (..., side * side).
        colours: uint8 (classes, 3).
        pixels: per side of a cell.
        noise: largest change of a value, uniform, as a share of 255.
        generator: of the noise.

    Returns:
        uint8 (..., side * pixels, side * pixels, 3).
    """
    side = math.isqrt(tokens.shape[-1])
    grid = tokens.reshape(*tokens.shape[:-1], side, side)
    picture = colours[grid].repeat(pixels, -3).repeat(pixels, -2)
    if not noise:
        return picture
    shift = (torch.rand(picture.shape, generator=generator).numpy() * 2 - 1) * (255 * noise)
    return np.clip(np.rint(picture + shift), 0, 255).astype(np.uint8)


def batch_first(rows: Mapping[str, np.ndarray], batch: int, agents: int) -> dict[str, Tensor]:
    """(time, batch * agents, ...) -> (batch, time, ...), with several agents (batch, agents, time, ...)."""
    moved = {}
    for name, array in rows.items():
        array = np.moveaxis(array.reshape(len(array), batch, agents, *array.shape[2:]), 0, 2)
        moved[name] = torch.from_numpy(np.ascontiguousarray(array[:, 0] if agents == 1 else array))
    return moved
