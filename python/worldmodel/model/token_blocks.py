"""Memory blocks over the tokens of a step, and over blocks of steps."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

from torch import nn

from wmkernels.nn import BlockScan, LocalAttention, Mamba, MemoryAttention, RotaryMamba
from worldmodel.model.block import Block, check_inner
from worldmodel.runs.fields import Bounds, ConfigurationError, Size

Grid = tuple[Size, Size]


@dataclasses.dataclass(frozen=True)
class BlockScanBlock(Block):
    """A scan along each block of the token grid.

    Attributes:
        grid: rows and columns of the tokens; None for a square.
        block: rows and columns of a block.
        scan: the memory, a Mamba or RotaryMamba block.
        d_state: states per inner channel, even for rotary_scan.
        groups: sets of B and C.
        d_conv: convolution taps; 1 disables it.
        expand: inner channels per feature.
    """

    kind: ClassVar[str] = "block_scan"
    grid: Grid | None = None
    block: Grid = (1, 1)
    scan: Literal["scan", "rotary_scan"] = "rotary_scan"
    d_state: Size = 16
    groups: Size = 4
    d_conv: Annotated[int, Bounds(1, 4096)] = 4
    expand: Annotated[float, Bounds(0, 64, above=True)] = 2

    def check(self, width: int, tokens: int = 1) -> None:
        grid_of(self, self.grid, tokens)
        check_inner(self, width, self.expand, self.groups)
        if self.scan == "rotary_scan" and self.d_state % 2:
            raise ConfigurationError(f"BlockScanBlock: d_state is {self.d_state}, expected an even number")

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        kind = Mamba if self.scan == "scan" else RotaryMamba
        memory = kind(width, self.d_state, d_conv=self.d_conv, expand=self.expand, groups=self.groups)
        return BlockScan(memory, self.block, grid_of(self, self.grid, tokens))


@dataclasses.dataclass(frozen=True)
class LocalAttentionBlock(Block):
    """Attention to the tokens of the last frames; with one token, a sliding window.

    Attributes:
        grid: rows and columns of the tokens; None for a square.
        frames: that a token sees, its own among them.
        heads: of equal, even width.
        time_positions: whether attention depends on how many frames ago a token was; without, on content and place
            alone.
    """

    kind: ClassVar[str] = "local_attention"
    grid: Grid | None = None
    frames: Annotated[int, Bounds(1, 65536)] = 2
    heads: Size = 4
    time_positions: bool = True

    def check(self, width: int, tokens: int = 1) -> None:
        grid_of(self, self.grid, tokens)
        _check_heads(self, self.heads, width)

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        grid = grid_of(self, self.grid, tokens)
        return LocalAttention(width, self.frames, self.heads, grid, time_positions=self.time_positions)


@dataclasses.dataclass(frozen=True)
class MemoryAttentionBlock(Block):
    """Memory tokens that attend together with a block of steps and are replaced by what they read.

    Attributes:
        memory_tokens: of the memory.
        block: steps between updates of the memory.
        heads: of equal, even width.
    """

    kind: ClassVar[str] = "memory_attention"
    memory_tokens: Annotated[int, Bounds(1, 4096)] = 16
    block: Annotated[int, Bounds(1, 65536)] = 16
    heads: Size = 4

    def check(self, width: int, tokens: int = 1) -> None:
        _check_heads(self, self.heads, width)

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return MemoryAttention(width, self.memory_tokens, self.block, self.heads)


def grid_of(block: Block, grid: Grid | None, tokens: int) -> Grid:
    """``grid``, by default a square. Raises ConfigurationError unless it has ``tokens``."""
    side = math.isqrt(tokens)
    rows, columns = grid or (side, side)
    if rows * columns != tokens:
        shown = "None, a square," if grid is None else f"{grid}"
        raise ConfigurationError(
            f"{type(block).__name__}: grid is {shown} and tokens {tokens}, expected rows * columns to be the tokens"
        )
    return rows, columns


def _check_heads(block: Block, heads: int, width: int) -> None:
    if width % (2 * heads):
        raise ConfigurationError(
            f"{type(block).__name__}: heads is {heads} and width {width}, expected a multiple of 2 * heads"
        )
