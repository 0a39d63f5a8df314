"""Memory, s_t, m_t = D(x_t, m_{t-1}): a stack of recurrent blocks."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from worldmodel.data.batch import State
from worldmodel.model.blocks import BlockConfig, RotaryScanBlock


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Memory.

    Attributes:
        width: features between blocks.
        blocks: in order.

    Example:
        >>> from worldmodel.model.blocks import ConvLSTMBlock
        >>> hybrid = MemoryConfig(width=64, blocks=(RotaryScanBlock(d_state=32), ConvLSTMBlock((4, 4))))
        >>> sorted(build_memory(hybrid).init_state(1))
        ['0.angle', '0.scan', '0.window', '1.cell', '1.hidden']
    """

    width: int = 64
    blocks: tuple[BlockConfig, ...] = (RotaryScanBlock(),)

    def __post_init__(self) -> None:
        if self.width < 1 or not self.blocks:
            raise ValueError(
                f"MemoryConfig: width is {self.width} and blocks has {len(self.blocks)}, expected at least 1 of each"
            )
        for block in self.blocks:
            block.check(self.width)


class MemoryStack(nn.Module):
    """Pre-norm residual blocks and a final norm; block i's state is under "i.name"."""

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in blocks)
        self.norm = nn.LayerNorm(width)

    def init_state(self, batch_size: int) -> State:
        return _joined([block.init_state(batch_size) for block, _ in self._layers()])

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``inputs`` (batch, time, width), ``reset`` bool (batch, time)."""
        parts = []
        for index, (block, norm) in enumerate(self._layers()):
            outputs, part = block(norm(inputs), None if state is None else _part(state, index), reset)
            inputs = inputs + outputs
            parts.append(part)
        return self.norm(inputs), _joined(parts)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        parts = []
        for index, (block, norm) in enumerate(self._layers()):
            output, part = block.step(norm(input), None if state is None else _part(state, index), reset)
            input = input + output
            parts.append(part)
        return self.norm(input), _joined(parts)

    def _layers(self) -> Iterator[tuple[Any, nn.Module]]:
        return zip(self.blocks, self.norms, strict=True)


def build_memory(config: MemoryConfig) -> MemoryStack:
    """Raises ConfigurationError if a ``CustomBlock`` cannot be built."""
    return MemoryStack([block.build(config.width) for block in config.blocks], config.width)


def _joined(parts: list[State]) -> State:
    return {f"{index}.{name}": value for index, part in enumerate(parts) for name, value in part.items()}


def _part(state: Mapping[str, Tensor], index: int) -> State:
    prefix = f"{index}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
