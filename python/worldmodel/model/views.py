"""Views: the places of a token grid around the agent, and what moves and turns do to them."""

import math

import torch
from torch import Tensor, nn

HEADINGS = 4


def view_offsets(grid: tuple[int, int]) -> Tensor:
    """Places of a view, row by row, relative to the agent in its middle: int64 (places, 2).

    Example:
        >>> view_offsets((1, 3)).tolist()
        [[0, -1], [0, 0], [0, 1]]
    """
    sides = [torch.arange(side) - side // 2 for side in grid]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)


def turned(offsets: Tensor, heading: Tensor | int) -> Tensor:
    """Offsets of an agent's own frame in the frame of heading 0, after ``heading`` quarter turns clockwise.

    Args:
        offsets: (..., 2), rows and columns.
        heading: int64, broadcast to (...).

    Example:
        >>> turned(torch.tensor([-1, 0]), 1).tolist()  # ahead, for an agent that has turned right
        [0, 1]
    """
    rows, columns = offsets.unbind(-1)
    heading = torch.as_tensor(heading, device=offsets.device) % HEADINGS
    cos, sin = ((heading == a).to(offsets.dtype) - (heading == b).to(offsets.dtype) for a, b in ((0, 2), (1, 3)))
    return torch.stack([rows * cos + columns * sin, columns * cos - rows * sin], -1)


def places_of(offsets: Tensor, among: Tensor) -> Tensor:
    """Index of each of ``offsets`` (..., 2) in ``among`` (places, 2), -1 where it is none of them: int64 (...)."""
    same = (offsets[..., None, :] == among).all(-1)  # (..., places)
    return torch.where(same.any(-1), same.int().argmax(-1), -1)


class TurnedView(nn.Module):
    """A view's places in the frame of heading 0, for each heading: a turn permutes the places of a square view.

    For other views the frame has the places of all headings, and those out of view have ``gate`` 0.

    Attributes:
        offsets: int64 (frame places, 2).
        index: int64 (headings, places), the frame's place of each of the view's.
        gate: float32 (headings, frame places).
    """

    offsets: Tensor
    index: Tensor
    gate: Tensor

    def __init__(self, grid: tuple[int, int], turns: bool) -> None:
        super().__init__()
        offsets = view_offsets(grid)
        headings = torch.stack([turned(offsets, heading) for heading in range(HEADINGS if turns else 1)])
        frame = offsets if not turns else headings.flatten(0, 1).unique(dim=0)
        index = places_of(headings, frame)
        gate = torch.zeros(len(index), len(frame)).scatter(1, index, 1)
        for name, value in (("offsets", frame), ("index", index), ("gate", gate)):
            self.register_buffer(name, value, persistent=False)
        self.whole = bool(gate.all())

    def to_frame(self, values: Tensor, heading: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (..., places, channels) of views at ``heading`` (...) in the frame, and the gate of its places."""
        if len(self.index) == 1:
            return values, None
        index = self.index[heading][..., None].expand(values.shape)
        framed = values.new_zeros(*values.shape[:-2], len(self.offsets), values.shape[-1]).scatter(-2, index, values)
        return framed, None if self.whole else self.gate[heading].to(values.dtype)

    def from_frame(self, values: Tensor, heading: Tensor) -> Tensor:
        """The inverse: (..., frame places, channels) -> (..., places, channels)."""
        if len(self.index) == 1:
            return values
        index = self.index[heading][..., None]
        return values.gather(-2, index.expand(*index.shape[:-1], values.shape[-1]))


def lattice_side(frequencies: Tensor) -> int:
    """Side of the square lattice of ``frequencies`` (count, 2), in places."""
    smallest = frequencies.abs()[frequencies.abs() > 0].min()
    return round(2 * math.pi / float(smallest))
