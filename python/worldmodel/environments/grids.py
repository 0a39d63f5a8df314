"""What the grid worlds share: many at once, moves, windows of cells, and pictures of them."""

import abc
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOVES = np.array([[-1, 0], [0, 1], [1, 0], [0, -1], [0, 0]])  # north, east, south, west, stay: (rows, columns)
STAY = 4
NEVER = np.iinfo(np.int64).max  # when something was last seen

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
NAMES = (
    *("orange", "sky", "green", "yellow", "blue", "vermilion", "purple", "white"),
    *("violet", "mint", "olive", "apricot", "cyan", "brown", "pink", "lime"),
)
MOST_COLOURS = len(NAMES)


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


class Worlds(abc.ABC):
    """``batch`` worlds of one configuration, sampled and walked through by ``generator``.

    Attributes:
        batch: worlds.
        config: has ``places`` and ``classes`` of a view, their ``names``, the number of ``actions``, ``pixels`` per
            side of a cell or 0, and their ``noise``.
        side: cells per side of ``map``.
        agents: in each world.
    """

    batch: int
    config: Any
    generator: torch.Generator | None
    side: int
    agents: int = 1
    _colours: np.ndarray

    @property
    @abc.abstractmethod
    def map(self) -> Tensor:
        """Classes of all cells: int64 (batch, side, side)."""

    @property
    @abc.abstractmethod
    def positions(self) -> Tensor:
        """Row and column of each agent in ``map``: int64 (batch, agents, 2)."""

    @property
    @abc.abstractmethod
    def headings(self) -> Tensor:
        """North, east, south or west, or the last direction where views are not turned: int64 (batch, agents)."""

    @abc.abstractmethod
    def choose(self) -> Tensor:
        """Actions of the exploring policy: int64 (batch, agents)."""

    @abc.abstractmethod
    def rollout(self, steps: int, actions: Tensor | None = None) -> dict[str, Tensor]:
        """The next ``steps`` steps, by the exploring policy or ``actions``."""

    @abc.abstractmethod
    def rewards(self, rollout: Mapping[str, Tensor]) -> Tensor:
        """Of the steps of a ``rollout``: float64 (batch, time), with several agents (batch, agents, time)."""

    @abc.abstractmethod
    def cells(self) -> Tensor:
        """Rows and columns in ``map`` of the cells in view: int64 (batch, agents, places, 2)."""

    @property
    def tokens(self) -> Tensor:
        """The present views: int64 (batch, agents, places)."""
        rows, columns = self.cells().unbind(-1)
        return self.map[torch.arange(self.batch)[:, None, None], rows, columns]

    @property
    def pictures(self) -> Tensor | None:
        """The present views in pixels: uint8 (batch, agents, height, width, 3); None without ``pixels``."""
        return None if self._picture is None else torch.from_numpy(self._picture.copy()).unflatten(0, (self.batch, -1))

    @property
    def colours(self) -> np.ndarray:
        """Of the classes, uint8 (classes, 3)."""
        return self._colours

    def _begin_pictures(self) -> None:
        self._noise = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
        self._picture = self._paint(self.tokens.flatten(0, 1).numpy()) if self.config.pixels else None

    def _pictures_of(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """``pixels`` and ``next_pixels`` of tokens (time + 1, batch * agents, places); none without pictures."""
        if self._picture is None:
            return {}
        pictures = np.concatenate([self._picture[None], self._paint(tokens[1:])])
        self._picture = pictures[-1]
        return {"pixels": pictures[:-1], "next_pixels": pictures[1:]}

    def _paint(self, tokens: np.ndarray) -> np.ndarray:
        return paint(tokens, self._colours, self.config.pixels, self.config.noise, self._noise)

    def _given(self, actions: Tensor | None, steps: int) -> np.ndarray | None:
        """Checked ``actions``, (time, batch * agents)."""
        if actions is None:
            return None
        shape = (self.batch, steps) if self.agents == 1 else (self.batch, self.agents, steps)
        most, name = self.config.actions - 1, type(self).__name__
        if tuple(actions.shape) != shape:
            raise ValueError(f"{name}: actions have shape {tuple(actions.shape)}, expected {shape}")
        if actions.dtype.is_floating_point or actions.dtype.is_complex or actions.dtype == torch.bool:
            raise ValueError(f"{name}: actions are {actions.dtype}, expected torch.int64")
        array = actions.cpu().numpy().reshape(-1, steps).T
        if array.size and (array.min() < 0 or array.max() > most):
            raise ValueError(f"{name}: actions from {array.min()} to {array.max()}, expected 0 to {most}")
        return array


def batch_first(rows: Mapping[str, np.ndarray], batch: int, agents: int = 1) -> dict[str, Tensor]:
    """(time, batch * agents, ...) -> (batch, time, ...), with several agents (batch, agents, time, ...)."""
    moved = {}
    for name, array in rows.items():
        array = np.moveaxis(array.reshape(len(array), batch, agents, *array.shape[2:]), 0, 2)
        moved[name] = torch.from_numpy(np.ascontiguousarray(array[:, 0] if agents == 1 else array))
    return moved
