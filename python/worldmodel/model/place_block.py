"""A memory block of places: tokens are written to a map, and read where a learned move leads."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from wmkernels.nn import PlaceMemory, lattice
from worldmodel.data.batch import State
from worldmodel.model.block import Block
from worldmodel.model.token_blocks import Grid, grid_of
from worldmodel.runs.fields import Bounds

STAYS = 4.0  # initial logit of no move, over those of the eight others


@dataclasses.dataclass(frozen=True)
class PlaceBlock(Block):
    """A map of places (``wmkernels.nn.PlaceMemory``), on which the token grid moves by learned steps.

    Attributes:
        grid: rows and columns of the tokens; None for a square.
        period: rows and columns of the map, after which places repeat.
        channels: features per place.
    """

    kind: ClassVar[str] = "place"
    grid: Grid | None = None
    period: Annotated[int, Bounds(1, 64)] = 15
    channels: Annotated[int, Bounds(1, 4096)] = 16

    def check(self, width: int, tokens: int = 1) -> None:
        grid_of(self, self.grid, tokens)

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return TokenPlaces(width, grid_of(self, self.grid, tokens), self.period, self.channels)


class TokenPlaces(nn.Module):
    """``inputs`` (..., tokens, width) to the same shape. Each step writes its tokens, moves and reads."""

    mixes_tokens = True

    def __init__(self, width: int, grid: tuple[int, int], period: int, channels: int) -> None:
        super().__init__()
        offsets = [[row - grid[0] // 2, column - grid[1] // 2] for row in range(grid[0]) for column in range(grid[1])]
        moves = [[row, column] for row in (-1, 0, 1) for column in (-1, 0, 1)]
        self.places = PlaceMemory(channels, offsets, lattice(period), moves=moves)
        self.in_proj = nn.Linear(width, channels, bias=False)
        self.gate_proj = nn.Linear(width, 1)
        self.move_proj = nn.Linear(len(offsets) * width, len(moves))
        self.out_proj = nn.Linear(channels, width, bias=False)
        with torch.no_grad():
            self.move_proj.bias[moves.index([0, 0])] += STAYS

    def init_state(self, batch_size: int) -> State:
        return self.places.init_state(batch_size)

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        gate = self.gate_proj(inputs).sigmoid().squeeze(-1)
        weights = self.move_proj(inputs.flatten(-2)).softmax(-1)
        read, after = self.places(self.in_proj(inputs), None, state, reset, weights=weights, gate=gate)
        return self.out_proj(read), after

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        outputs, after = self(input[:, None], state, None if reset is None else reset[:, None])
        return outputs[:, 0], after
