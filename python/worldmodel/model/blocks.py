"""The kinds of memory blocks, one dataclass each.

A block maps (batch, time, width) to the same shape; its state is a flat dict of tensors, batch first.
"""

import dataclasses
import math
from typing import Annotated, ClassVar

from torch import nn

from wmkernels.nn import GatedDeltaNet, Mamba, Mamba2, Mamba3, RotaryMamba
from worldmodel.model.block import Block, check_heads, check_inner
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.place_block import PlaceBlock
from worldmodel.model.recurrent import GRU, LSTM, GatedConv, MapLSTM, TokenAttention
from worldmodel.model.token_blocks import BlockScanBlock, LocalAttentionBlock, MemoryAttentionBlock
from worldmodel.runs.fields import Bounds, ConfigurationError, Size

Taps = Annotated[int, Bounds(1, 4096)]
Expansion = Annotated[float, Bounds(0, 64, above=True)]


@dataclasses.dataclass(frozen=True)
class RotaryScanBlock(Block):
    """A Mamba block with rotating states, which distinguish lags.

    Attributes:
        d_state: real states per inner channel, even.
        groups: sets of B, C and angles.
        d_conv: convolution taps; 1 disables it.
        expand: inner channels per feature.
        selective_angle: whether the angle depends on the input.
        selective_speed: whether the input may slow the angles down and turn them back.
        decay: initial -A.
    """

    kind: ClassVar[str] = "rotary_scan"
    d_state: Size = 16
    groups: Size = 4
    d_conv: Taps = 4
    expand: Expansion = 2
    selective_angle: bool = False
    selective_speed: bool = False
    decay: Annotated[float, Bounds(0, 1000, above=True)] = 0.5

    def check(self, width: int, tokens: int = 1) -> None:
        if self.d_state % 2:
            raise ConfigurationError(f"RotaryScanBlock: d_state is {self.d_state}, expected an even number")
        check_inner(self, width, self.expand, self.groups)

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return RotaryMamba(
            width,
            self.d_state,
            d_conv=self.d_conv,
            expand=self.expand,
            groups=self.groups,
            selective_angle=self.selective_angle,
            selective_speed=self.selective_speed,
            decay=self.decay,
        )


@dataclasses.dataclass(frozen=True)
class ScanBlock(Block):
    """A Mamba block.

    Attributes:
        d_state: states per inner channel.
        groups: sets of B and C.
        d_conv: convolution taps; 1 disables it.
        expand: inner channels per feature.
    """

    kind: ClassVar[str] = "scan"
    d_state: Size = 16
    groups: Size = 4
    d_conv: Taps = 4
    expand: Expansion = 2

    def check(self, width: int, tokens: int = 1) -> None:
        check_inner(self, width, self.expand, self.groups)

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return Mamba(width, self.d_state, self.d_conv, self.expand, groups=self.groups)


@dataclasses.dataclass(frozen=True)
class Mamba2Block(Block):
    """A Mamba-2 block: one decay per head, and more states per channel than a Mamba block has.

    Attributes:
        d_state: states per inner channel.
        headdim: inner channels of a head.
        groups: sets of B and C.
        d_conv: convolution taps; 1 disables it.
        expand: inner channels per feature.
    """

    kind: ClassVar[str] = "mamba2"
    d_state: Size = 64
    headdim: Size = 16
    groups: Size = 1
    d_conv: Taps = 4
    expand: Expansion = 2

    def check(self, width: int, tokens: int = 1) -> None:
        check_heads(self, width, self.expand, self.headdim, self.groups)

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return Mamba2(width, self.d_state, self.d_conv, expand=self.expand, headdim=self.headdim, ngroups=self.groups)


@dataclasses.dataclass(frozen=True)
class Mamba3Block(Block):
    """A Mamba-3 block: Mamba-2's scan with states that turn, the trapezoidal rule and no convolution.

    Attributes:
        d_state: states per inner channel.
        headdim: inner channels of a head.
        groups: sets of B and C.
        expand: inner channels per feature.
        rope_fraction: of the states that turn, 0.5 or 1.
    """

    kind: ClassVar[str] = "mamba3"
    d_state: Size = 64
    headdim: Size = 16
    groups: Size = 1
    expand: Expansion = 2
    rope_fraction: Annotated[float, Bounds(0.5, 1)] = 0.5

    def check(self, width: int, tokens: int = 1) -> None:
        check_heads(self, width, self.expand, self.headdim, self.groups)
        if self.rope_fraction not in (0.5, 1):
            raise ConfigurationError(f"Mamba3Block: rope_fraction is {self.rope_fraction}, expected 0.5 or 1")
        if self.d_state * self.rope_fraction < 2:
            raise ConfigurationError(
                f"Mamba3Block: d_state is {self.d_state}, expected at least {int(2 / self.rope_fraction)}"
            )

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return Mamba3(
            width,
            self.d_state,
            expand=self.expand,
            headdim=self.headdim,
            ngroups=self.groups,
            rope_fraction=self.rope_fraction,
        )


@dataclasses.dataclass(frozen=True)
class DeltaBlock(Block):
    """A Gated DeltaNet block: a matrix per head, whose values are overwritten by key.

    Attributes:
        heads: matrices.
        d_head: features of a key.
        expand_v: features of a value per feature of a key.
        d_conv: convolution taps; 1 disables it.
    """

    kind: ClassVar[str] = "delta"
    heads: Size = 4
    d_head: Size = 16
    expand_v: Expansion = 1
    d_conv: Taps = 4

    def check(self, width: int, tokens: int = 1) -> None:
        if int(self.expand_v * self.d_head) < 1:
            raise ConfigurationError(
                f"DeltaBlock: expand_v is {self.expand_v} and d_head {self.d_head}, expected a product of at least 1"
            )

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return GatedDeltaNet(width, self.heads, self.d_head, self.expand_v, d_conv=self.d_conv)


@dataclasses.dataclass(frozen=True)
class GatedConvBlock(Block):
    """A Mamba block without its scan; ``d_conv=1`` has no memory.

    Attributes:
        d_conv: convolution taps.
        expand: inner channels per feature.
    """

    kind: ClassVar[str] = "gated_conv"
    d_conv: Taps = 4
    expand: Expansion = 2

    def check(self, width: int, tokens: int = 1) -> None:
        check_inner(self, width, self.expand)

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return GatedConv(width, self.d_conv, self.expand)


@dataclasses.dataclass(frozen=True)
class ConvLSTMBlock(Block):
    """A ConvLSTM layer; width = channels * height * width.

    Attributes:
        map_size: (height, width).
        kernel: side, odd.
    """

    kind: ClassVar[str] = "conv_lstm"
    map_size: tuple[Size, Size] = (4, 4)
    kernel: Annotated[int, Bounds(1, 255)] = 3

    def check(self, width: int, tokens: int = 1) -> None:
        if self.kernel % 2 == 0:
            raise ConfigurationError(f"ConvLSTMBlock: kernel is {self.kernel}, expected an odd number")
        if width % math.prod(self.map_size):
            raise ConfigurationError(
                f"ConvLSTMBlock: map_size is {self.map_size} and width {width}, expected width to be channels * height "
                "* width"
            )

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return MapLSTM(width, self.map_size, self.kernel)


@dataclasses.dataclass(frozen=True)
class GRUBlock(Block):
    """A GRU layer."""

    kind: ClassVar[str] = "gru"

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return GRU(width)


@dataclasses.dataclass(frozen=True)
class LSTMBlock(Block):
    """An LSTM layer."""

    kind: ClassVar[str] = "lstm"

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return LSTM(width)


@dataclasses.dataclass(frozen=True)
class TokenAttentionBlock(Block):
    """Attention among the tokens of a step.

    Attributes:
        heads: a divisor of the width.
    """

    kind: ClassVar[str] = "token_attention"
    heads: Size = 4

    def check(self, width: int, tokens: int = 1) -> None:
        if width % self.heads:
            raise ConfigurationError(
                f"TokenAttentionBlock: heads is {self.heads} and width {width}, expected a divisor"
            )

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        return TokenAttention(width, self.heads)


BlockConfig = (
    RotaryScanBlock
    | ScanBlock
    | Mamba2Block
    | Mamba3Block
    | DeltaBlock
    | GatedConvBlock
    | ConvLSTMBlock
    | GRUBlock
    | LSTMBlock
    | TokenAttentionBlock
    | BlockScanBlock
    | LocalAttentionBlock
    | MemoryAttentionBlock
    | PlaceBlock
    | CustomBlock
)
