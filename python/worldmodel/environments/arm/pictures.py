"""Pictures of arms, smooth at any size: each shape covers a pixel by its distance to the pixel's middle."""

import numpy as np

from worldmodel.environments.arm.body import FINGER, fingers_of, joints_of
from worldmodel.environments.arm.worlds import CELL, HALF, PUSH, RADIUS, ArmWorlds

_BACKGROUND, _TABLE, _ARM, _DISC = (245, 245, 242), (150, 132, 112), (52, 58, 70), (168, 172, 182)
_RED, _BLUE, _MARK, _DIRT = (214, 58, 50), (46, 98, 214), (38, 160, 82), (92, 54, 18)
_DIRT_HEIGHT = 0.03
_FLOOR = -0.06  # y of the picture's lower edge


def pictures(worlds: ArmWorlds, side: int) -> np.ndarray:
    """The tables, uint8 (batch, side, side, 3)."""
    axis = (np.arange(side) + 0.5) / side
    x, y = axis[None, None, :], (1 + _FLOOR - axis)[None, :, None]
    canvas = np.empty((3, worlds.batch, side, side), np.float32)
    canvas[:] = np.reshape(_BACKGROUND, (3, 1, 1, 1))

    def paint(distance: np.ndarray, colour: tuple[int, int, int]) -> None:
        """``distance`` to a shape's edge, negative within, (batch, side, side)."""
        share = (0.5 - distance * side).clip(0, 1).astype(np.float32)
        rows, lines = (np.flatnonzero(share.any(axes)) for axes in ((1, 2), (0, 2)))
        if not len(rows):
            return
        within = (slice(rows[0], rows[-1] + 1), slice(lines[0], lines[-1] + 1))  # most of a picture stays as it is
        for plane, value in zip(canvas, colour, strict=True):
            plane[within] += share[within] * (value - plane[within])

    def box(middle: np.ndarray, half: "np.ndarray | tuple[float, float]") -> np.ndarray:
        return np.maximum(np.abs(x - _at(middle[..., 0])) - half[0], np.abs(y - _at(middle[..., 1])) - half[1])

    paint(np.broadcast_to(y, (worlds.batch, side, side)), _TABLE)
    mark = np.stack([np.where(worlds.task == PUSH, worlds.mark, -9), np.full(worlds.batch, -0.03)], -1)
    paint(box(mark, (HALF, 0.03)), _MARK)
    if worlds.dirt.any():
        places = np.where(worlds.dirt, worlds.cells, -9)  # (batch, cells)
        across = np.abs(x[:, 0, None] - places[..., None]).min(1)[:, None] - CELL / 2  # (batch, 1, side)
        paint(np.maximum(across, np.abs(y - _DIRT_HEIGHT / 2) - _DIRT_HEIGHT / 2), _DIRT)
    disc = worlds.obstacle
    paint(_distance(x - _at(disc[:, 0]), y - _at(disc[:, 1])) - RADIUS, _DISC)
    for block, colour in enumerate((_RED, _BLUE)):
        paint(box(worlds.blocks[:, block], (HALF, HALF)), colour)
    joints = joints_of(worlds.angles)
    for link in range(3):
        paint(_to_segment(x, y, joints[:, link], joints[:, link + 1]) - 0.02 * (1 - 0.3 * link), _ARM)
    fingers = fingers_of(worlds.hands, worlds.opening)
    palm = worlds.hands + np.array([0.0, FINGER[1]])
    paint(np.maximum(np.abs(x - _at(palm[:, 0])) - _at(worlds.opening), np.abs(y - _at(palm[:, 1])) - 0.012), _ARM)
    for finger in range(2):
        paint(box(fingers[:, finger], (FINGER[0], FINGER[1])), _ARM)
    return np.ascontiguousarray(np.moveaxis(canvas.round().astype(np.uint8), 0, -1))


def _at(values: np.ndarray) -> np.ndarray:
    return values[:, None, None]


def _to_segment(x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distances to segments from start (batch, 2) to end."""
    way = end - start
    along = (x - _at(start[:, 0])) * _at(way[:, 0]) + (y - _at(start[:, 1])) * _at(way[:, 1])
    share = (along / _at((way**2).sum(1))).clip(0, 1)
    return _distance(x - _at(start[:, 0]) - share * _at(way[:, 0]), y - _at(start[:, 1]) - share * _at(way[:, 1]))


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Faster than ``np.hypot``, which also serves numbers whose squares overflow."""
    return np.sqrt(x * x + y * y)
