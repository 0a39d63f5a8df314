"""Layouts of two rooms and moves in them, batched and differentiable.

Positions are (x, y) in pixels of a picture of ``SIDE`` x ``SIDE``, x to the right and y downwards. The walls around
both rooms are ``BORDER`` pixels from the picture's edge; an inner wall of ``2 * HALF_WALL + 1`` columns has a door of
``2 * HALF_DOOR + 1`` rows. The numbers are those of PLDM (arXiv 2502.14819) and EB-JEPA (arXiv 2602.03604). There, a
dot that meets a wall is set back from it by normal noise, .4 pixels in mean; here by ``MARGIN``.
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
_LOW, _HIGH = BORDER - 1.0, SIDE - BORDER + 0.0  # walls around both rooms
LOW, HIGH = _LOW + MARGIN, _HIGH - MARGIN
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
        """Left and right edge of the inner wall, upper and lower edge of the door: (...)."""
        return self.wall - HALF_WALL, self.wall + HALF_WALL, self.door - HALF_DOOR, self.door + HALF_DOOR

    def repeat_interleave(self, count: int) -> "Layouts":
        return Layouts(self.wall.repeat_interleave(count), self.door.repeat_interleave(count))


def shortened(commands: Tensor, longest: float) -> Tensor:
    """``commands`` (..., 2), those longer than ``longest`` scaled to that length."""
    return commands * (longest / commands.norm(dim=-1, keepdim=True).clamp_min(longest))


def move(positions: Tensor, moves: Tensor, layouts: Layouts) -> Tensor:
    """Positions after straight moves, each of which ends where it first meets a wall, set back by ``MARGIN``.

    The collision is swept: no move passes a wall, however long it is.

    Args:
        positions: (..., 2), in free space.
        moves: (..., 2), pixels.
        layouts: (...).

    Returns:
        (..., 2), differentiable in positions and moves almost everywhere.
    """
    (x, y), (dx, dy) = positions.unbind(-1), moves.unbind(-1)
    return torch.stack(_move(x, y, dx, dy, layouts.edges), -1)


def travel(positions: Tensor, moves: Tensor, layouts: Layouts) -> Tensor:
    """Positions before and after each of several moves.

    Args:
        positions: (..., 2).
        moves: (..., time, 2).
        layouts: (...).

    Returns:
        (..., time + 1, 2).
    """
    x, y = positions.expand(*moves.shape[:-2], 2).unbind(-1)
    edges, xs, ys = layouts.edges, [x], [y]
    for dx, dy in zip(moves[..., 0].unbind(-1), moves[..., 1].unbind(-1), strict=True):
        x, y = _move(x, y, dx, dy, edges)
        xs.append(x)
        ys.append(y)
    return torch.stack([torch.stack(xs, -1), torch.stack(ys, -1)], -1)


def _move(
    x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, edges: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    left, right, top, bottom = edges
    by_x, by_y = (torch.where(d.abs() < _TINY, _TINY, d) for d in (dx, dy))  # divisors
    # Shares of the move until it meets the walls around both rooms.
    share_x = torch.where(by_x > 0, _HIGH - x, _LOW - x) / by_x
    share_y = torch.where(by_y > 0, _HIGH - y, _LOW - y) / by_y
    share = torch.minimum(share_x, share_y).clamp(0, 1)
    end_x, end_y = x + share * dx, y + share * dy
    outside_x, outside_y = (share_x <= share) & (share < 1), (share_y <= share) & (share < 1)
    # Into the inner wall's columns from either side, beside the door.
    from_left = (x <= left) & (end_x > left)
    from_right = (x >= right) & (end_x < right)
    face = torch.where(from_left, left, right)
    y_at_face = y + (face - x) / by_x * dy
    at_face = (from_left | from_right) & ((y_at_face < top) | (y_at_face > bottom))
    # Out of the door's rows within the inner wall's columns.
    upwards, downwards = (y >= top) & (end_y < top), (y <= bottom) & (end_y > bottom)
    sill = torch.where(upwards, top, bottom)
    x_at_sill = x + (sill - y) / by_y * dx
    at_sill = (upwards | downwards) & (x_at_sill > left) & (x_at_sill < right)
    end_x = torch.where(outside_x, end_x.clamp(LOW, HIGH), end_x)
    end_y = torch.where(outside_y, end_y.clamp(LOW, HIGH), end_y)
    end_x = torch.where(at_sill, x_at_sill, end_x)
    end_y = torch.where(at_sill, torch.where(upwards, top + MARGIN, bottom - MARGIN), end_y)
    end_x = torch.where(at_face, torch.where(from_left, left - MARGIN, right + MARGIN), end_x)
    return end_x, torch.where(at_face, y_at_face, end_y)


def is_free(positions: Tensor, layouts: Layouts) -> Tensor:
    """Whether positions (..., 2) are in no wall: bool (...)."""
    x, y = positions.unbind(-1)
    inside = ((positions >= _LOW) & (positions <= _HIGH)).all(-1)
    left, right, top, bottom = layouts.edges
    return inside & ~((x > left) & (x < right) & ((y < top) | (y > bottom)))


def turned(commands: Tensor, angles: Tensor) -> Tensor:
    """``commands`` (..., 2) turned by ``angles`` (...), radians, from x to y."""
    cosine, sine = angles.cos(), angles.sin()
    x, y = commands.unbind(-1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)
