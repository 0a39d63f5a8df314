"""Layouts of two rooms and moves in them, batched and differentiable.

Positions are (x, y) in pixels of a picture of ``SIDE`` x ``SIDE``, x to the right and y downwards. The walls around
both rooms are ``BORDER`` pixels from the picture's edge; an inner wall of ``2 * HALF_WALL + 1`` columns has a door of
``2 * HALF_DOOR + 1`` rows. The numbers are those of PLDM (arXiv 2502.14819) and EB-JEPA (arXiv 2602.03604). There, a
dot that meets a wall is set back by random noise; here it stops ``MARGIN`` before the wall.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

SIDE = 65
BORDER = 5
HALF_WALL = 1
HALF_DOOR = 4
MARGIN = 0.3
LOW, HIGH = BORDER - 1 + MARGIN, SIDE - BORDER - MARGIN  # of both coordinates
WALL_PADDING, DOOR_PADDING = 20, 10  # of random layouts
FIXED_WALL, FIXED_DOOR = 32, 10
_TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class Layouts:
    """Walls and doors of a batch of rooms.

    Attributes:
        wall: x of the inner wall's middle, pixels: float32 (...).
        door: y of the door's middle, pixels: float32 (...).

    Example:
        >>> layouts = Layouts.fixed(2)
        >>> move(torch.tensor([[28.0, 40.0], [28.0, 10.0]]), torch.tensor([[9.0, 0.0], [9.0, 0.0]]), layouts)
        tensor([[30.7000, 40.0000],
                [37.0000, 10.0000]])
    """

    wall: Tensor
    door: Tensor

    @classmethod
    def fixed(cls, count: int) -> "Layouts":
        """The published layout with one wall and one door, ``count`` times."""
        return cls(torch.full((count,), float(FIXED_WALL)), torch.full((count,), float(FIXED_DOOR)))

    @classmethod
    def sampled(cls, random: np.random.Generator, count: int) -> "Layouts":
        """Vertical walls at least ``WALL_PADDING``, and doors ``DOOR_PADDING``, from the picture's edges."""
        walls = random.integers(WALL_PADDING, SIDE - WALL_PADDING, count)
        doors = random.integers(DOOR_PADDING, SIDE - DOOR_PADDING, count)
        return cls(torch.from_numpy(walls).float(), torch.from_numpy(doors).float())

    def __getitem__(self, index: "slice | Tensor | tuple[slice | None, ...] | int") -> "Layouts":
        return Layouts(self.wall[index], self.door[index])

    @property
    def edges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Left and right edge of the inner wall, upper and lower edge of the door, grown by ``MARGIN``: (...)."""
        across, along = HALF_WALL + MARGIN, HALF_DOOR - MARGIN
        return self.wall - across, self.wall + across, self.door - along, self.door + along

    def repeat_interleave(self, count: int) -> "Layouts":
        return Layouts(self.wall.repeat_interleave(count), self.door.repeat_interleave(count))


def shortened(commands: Tensor, longest: float) -> Tensor:
    """``commands`` (..., 2), those longer than ``longest`` scaled to that length."""
    return commands * (longest / commands.norm(dim=-1, keepdim=True).clamp_min(longest))


def move(positions: Tensor, moves: Tensor, layouts: Layouts) -> Tensor:
    """Positions after straight moves, each of which ends ``MARGIN`` before the first wall on its way.

    The collision is swept: no move passes a wall, however long it is. Wall and door act as if grown by ``MARGIN``.

    Args:
        positions: (..., 2), in free space.
        moves: (..., 2), pixels.
        layouts: (...).

    Returns:
        (..., 2), differentiable in positions and moves almost everywhere.
    """
    left, right, top, bottom = layouts.edges
    divisor = torch.where(moves.abs() < _TINY, _TINY, moves)
    # Share of the move until it meets the walls around both rooms.
    share = torch.where(divisor > 0, HIGH - positions, LOW - positions) / divisor
    share = share.amin(-1, keepdim=True).clamp(0, 1)
    ends = (positions + share * moves).clamp(LOW, HIGH)
    (x, y), (end_x, end_y), (dx, dy) = positions.unbind(-1), ends.unbind(-1), divisor.unbind(-1)
    # Into the inner wall's columns from either side, beside the door.
    from_left = (x <= left) & (end_x > left)
    from_right = (x >= right) & (end_x < right)
    face = torch.where(from_left, left, right)
    y_at_face = y + (face - x) / dx * dy
    stopped_at_face = (from_left | from_right) & ((y_at_face < top) | (y_at_face > bottom))
    # Out of the door's rows within the inner wall's columns.
    upwards, downwards = (y >= top) & (end_y < top), (y <= bottom) & (end_y > bottom)
    sill = torch.where(upwards, top, bottom)
    x_at_sill = x + (sill - y) / dy * dx
    stopped_at_sill = (upwards | downwards) & (x_at_sill > left) & (x_at_sill < right)
    end_x = torch.where(stopped_at_face, face, torch.where(stopped_at_sill, x_at_sill, end_x))
    end_y = torch.where(stopped_at_face, y_at_face, torch.where(stopped_at_sill, sill, end_y))
    return torch.stack([end_x, end_y], -1)


def travel(positions: Tensor, moves: Tensor, layouts: Layouts) -> Tensor:
    """Positions before and after each of several moves.

    Args:
        positions: (..., 2).
        moves: (..., time, 2).
        layouts: (...).

    Returns:
        (..., time + 1, 2).
    """
    path = [positions]
    for step in moves.unbind(-2):
        path.append(move(path[-1], step, layouts))
    return torch.stack(path, -2)


def is_free(positions: Tensor, layouts: Layouts) -> Tensor:
    """Whether positions (..., 2) are in no wall, grown by ``MARGIN``: bool (...)."""
    x, y = positions.unbind(-1)
    inside = ((positions >= LOW) & (positions <= HIGH)).all(-1)
    left, right, top, bottom = layouts.edges
    return inside & ~((x > left) & (x < right) & ((y < top) | (y > bottom)))


def turned(commands: Tensor, angles: Tensor) -> Tensor:
    """``commands`` (..., 2) turned by ``angles`` (...), radians, from x to y."""
    cosine, sine = angles.cos(), angles.sin()
    x, y = commands.unbind(-1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)
