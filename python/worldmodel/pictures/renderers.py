"""Renderers of observations."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from worldmodel.data.spaces import Modality

TILE = 24  # pixels
WRONG = (230, 30, 60)
_MARKED = "red frame: a cell that is not as observed"
_UNSEEN = (52, 58, 66)
# Dark for class 0, often empty.
_PALETTE = np.array(
    [
        (46, 52, 64),
        *((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)),
        *((227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207), (174, 199, 232), (255, 187, 120)),
        *((152, 223, 138), (255, 152, 150), (197, 176, 213), (196, 156, 148), (247, 182, 210), (199, 199, 199)),
        *((219, 219, 141), (158, 218, 229)),
    ],
    np.uint8,
)


def class_colours(classes: np.ndarray) -> np.ndarray:
    """int (...) -> uint8 (..., 3)."""
    return _PALETTE[np.asarray(classes, np.int64) % len(_PALETTE)]


class Renderer:
    """Draws one modality."""

    def render(self, array: np.ndarray, observed: np.ndarray | None = None) -> np.ndarray:
        """Encoded ``array`` as uint8 (height, width, 3), with deviations from ``observed`` marked."""
        raise NotImplementedError

    def legend(self, arrays: Iterable[np.ndarray]) -> list[tuple[np.ndarray, str]]:
        """Samples, uint8 (side, side, 3), and labels, of ``arrays``."""
        raise NotImplementedError

    @property
    def note(self) -> str:
        return ""


class ImageRenderer(Renderer):
    """Pixels: grey, coloured, or the newest of stacked frames."""

    def render(self, array: np.ndarray, observed: np.ndarray | None = None) -> np.ndarray:
        channels = array.shape[-1]
        if channels != 3:
            newest = array[..., -3:] if channels % 3 == 0 else array[..., -1:]
            array = np.broadcast_to(newest, (*array.shape[:-1], 3))
        return np.ascontiguousarray(array, np.uint8)

    def legend(self, arrays: Iterable[np.ndarray]) -> list[tuple[np.ndarray, str]]:
        return []


class GridRenderer(Renderer):
    """Cells as nested squares, one per channel, the first outermost."""

    def __init__(self, channels: int, names: Sequence[str] = ()) -> None:
        self.channels = channels
        self.names = tuple(names)

    def render(self, array: np.ndarray, observed: np.ndarray | None = None) -> np.ndarray:
        rows = [np.concatenate([self.tile(cell) for cell in row], 1) for row in self._upright(array)]
        picture = np.concatenate(rows, 0)
        if observed is not None:
            for y, x in np.argwhere((self._upright(array) != self._upright(observed)).any(-1)):
                _frame(picture[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE], WRONG, 2)
        return picture

    def tile(self, cell: np.ndarray) -> np.ndarray:
        """Uint8 (``TILE``, ``TILE``, 3)."""
        picture = np.empty((TILE, TILE, 3), np.uint8)
        for channel, colour in enumerate(class_colours(cell)):
            inset = channel * TILE // (2 * self.channels)
            picture[inset : TILE - inset, inset : TILE - inset] = colour
        edge = 0.75 * picture[0, 0] + 0.25 * 255
        _frame(picture, (int(edge[0]), int(edge[1]), int(edge[2])), 1)
        return picture

    def legend(self, arrays: Iterable[np.ndarray]) -> list[tuple[np.ndarray, str]]:
        classes = np.unique(np.concatenate([np.unique(array) for array in arrays]))
        names = dict(enumerate(self.names))
        return [(self._swatch(value), names.get(value, str(value))) for value in classes.tolist()]

    @property
    def note(self) -> str:
        nested = f"; {self.channels} channels, the first outside, the last in the middle" if self.channels > 1 else ""
        return f"{_MARKED}{nested}"

    def _swatch(self, value: int) -> np.ndarray:
        return np.tile(class_colours(np.array(value)), (TILE, TILE, 1))

    def _upright(self, array: np.ndarray) -> np.ndarray:
        """Transposes to (row, column, channel)."""
        return array


class MiniGridRenderer(GridRenderer):
    """MiniGrid's own tiles; x is the first index."""

    def __init__(self) -> None:
        super().__init__(3)
        from minigrid.core import constants, grid, world_object

        self._objects: dict[int, str] = constants.IDX_TO_OBJECT
        self._colours: dict[int, str] = constants.IDX_TO_COLOR
        self._states = {index: name for name, index in constants.STATE_TO_IDX.items()}
        self._draw: Any = grid.Grid.render_tile
        self._decode: Any = world_object.WorldObj.decode

    def tile(self, cell: np.ndarray) -> np.ndarray:
        kind, colour, state = (int(value) for value in cell)
        name = self._objects.get(kind, "")
        picture = np.empty((TILE, TILE, 3), np.uint8)
        if not name or colour not in self._colours:
            picture[:] = 255, 0, 255
        elif name == "unseen":
            picture[:] = _UNSEEN
        else:
            # Visible cells are lighter, as in MiniGrid's own view.
            turned = state % 4 if name == "agent" else None
            picture[:] = self._draw(self._decode(kind, colour, state), turned, True, tile_size=TILE)
        return picture

    def legend(self, arrays: Iterable[np.ndarray]) -> list[tuple[np.ndarray, str]]:
        cells = np.concatenate([array.reshape(-1, 3) for array in arrays])
        found, counts = np.unique(cells, axis=0, return_counts=True)
        named: dict[str, np.ndarray] = {}
        for index in np.argsort(-counts, kind="stable"):
            named.setdefault(self.name(found[index]), found[index])
        return [(self.tile(cell), name) for name, cell in named.items()]

    def name(self, cell: np.ndarray) -> str:
        """Such as "red key" or "locked blue door"."""
        kind, colour, state = (int(value) for value in cell)
        name = self._objects.get(kind, "")
        if not name or colour not in self._colours:
            return "nothing MiniGrid has"
        if name in ("unseen", "empty", "agent", "goal", "lava") or (name, self._colours[colour]) == ("wall", "grey"):
            return name
        opened = self._states.get(state, "") if name == "door" else ""
        return f"{opened} {self._colours[colour]} {name}".strip()

    @property
    def note(self) -> str:
        return f"{_MARKED}; in a view of the agent's own, it stands in the middle of the lowest row and looks up"

    def _upright(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(0, 1)


def renderer(modality: Modality, environment: Any = None) -> Renderer | None:
    """None for vectors and classes; ``environment.metadata`` may list class names under "cells"."""
    if modality.kind == "image":
        return ImageRenderer()
    if modality.kind != "grid":
        return None
    minigrid = sys.modules.get("minigrid.minigrid_env")
    if (
        minigrid
        and isinstance(getattr(environment, "unwrapped", None), minigrid.MiniGridEnv)
        and modality.shape[2] == 3
    ):
        return MiniGridRenderer()
    metadata = getattr(environment, "metadata", None) or {}
    return GridRenderer(modality.shape[2], metadata.get("cells", ()))


def _frame(picture: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
    picture[:width] = picture[-width:] = colour
    picture[:, :width] = picture[:, -width:] = colour
