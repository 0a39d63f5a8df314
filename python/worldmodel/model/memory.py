"""Memory, s_t, m_t = D(x_t, m_{t-1}): what was seen and done before, in a state of fixed size.

Every memory takes (batch, time, width) and speaks the language of ``wmkernels.nn``: ``init_state``, ``forward`` over
all steps at once, ``step``; the state is a flat dict of tensors. ``build_memory`` makes the one that a
``MemoryConfig`` names.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.nn import CausalConv1d, ConvLSTM, Mamba, RotaryMamba
from worldmodel.data.batch import State


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """A memory.

    Attributes:
        kind: "scan", a stack of Mamba blocks; "conv_lstm", on maps; "gru"; or "none", which keeps nothing from one
            step to the next but has the layers of "scan".
        width: features between the layers; of a ConvLSTM channels * height * width.
        layers: blocks, or layers of the GRU or the ConvLSTM.
        expand: inner channels of a block for each feature.
        states: real states of each inner channel of a scan.
        groups: sets of B, C and angles of a scan: each turns states at rates of its own.
        convolution: steps that a block's convolution sees, its own included; 1 turns it off.
        scan: whether the blocks scan; without it the convolution is the only memory.
        rotated: whether the scan's states turn, which lets it tell lags apart.
        selective_angle: whether what is seen changes by how much they turn.
        decay: initial -A of a rotated scan.
        map_size: (height, width) of the maps of a ConvLSTM.
        kernel: of the convolutions of a ConvLSTM, an odd number.
    """

    kind: Literal["scan", "conv_lstm", "gru", "none"] = "scan"
    width: int = 64
    layers: int = 1
    expand: float = 2
    states: int = 16
    groups: int = 4
    convolution: int = 4
    scan: bool = True
    rotated: bool = True
    selective_angle: bool = False
    decay: float = 0.5
    map_size: tuple[int, int] = (4, 4)
    kernel: int = 3

    def __post_init__(self) -> None:
        if self.kind not in ("scan", "conv_lstm", "gru", "none"):
            raise ValueError(f"MemoryConfig: kind is {self.kind!r}, expected 'scan', 'conv_lstm', 'gru' or 'none'")
        if self.kind == "conv_lstm" and (min(self.map_size) < 1 or self.width % math.prod(self.map_size)):
            raise ValueError(
                f"MemoryConfig: map_size is {self.map_size} and width {self.width}, expected width to be channels * "
                "height * width"
            )
        if self.width < 1 or self.layers < 1:
            raise ValueError(
                f"MemoryConfig: width is {self.width} and layers {self.layers}, expected at least 1 of each"
            )


class MemoryStack(nn.Module):
    """Blocks with a norm before and a residual connection around each, and a norm at the end.

    The state of block i is in the dict under "i.name".
    """

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in blocks)
        self.norm = nn.LayerNorm(width)

    def init_state(self, batch_size: int) -> State:
        """The states of all blocks before the first step."""
        return _joined([block.init_state(batch_size) for block, _ in self._layers()])

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """All steps at once: ``inputs`` (batch, time, width), ``reset`` bool (batch, time)."""
        parts = []
        for index, (block, norm) in enumerate(self._layers()):
            outputs, part = block(norm(inputs), None if state is None else _part(state, index), reset)
            inputs = inputs + outputs
            parts.append(part)
        return self.norm(inputs), _joined(parts)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step: ``input`` (batch, width), ``reset`` bool (batch,)."""
        parts = []
        for index, (block, norm) in enumerate(self._layers()):
            output, part = block.step(norm(input), None if state is None else _part(state, index), reset)
            input = input + output
            parts.append(part)
        return self.norm(input), _joined(parts)

    def _layers(self) -> Iterator[tuple[Any, nn.Module]]:
        return zip(self.blocks, self.norms, strict=True)


class ScanlessBlock(nn.Module):
    """A Mamba block without its scan: projection, causal convolution, gate, projection back."""

    def __init__(self, width: int, convolution: int, expand: float) -> None:
        super().__init__()
        inner = int(expand * width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = CausalConv1d(inner, convolution)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        """The window of the convolution."""
        return self.conv1d.init_state(batch_size)

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """All steps at once."""
        x, z = self.in_proj(inputs).chunk(2, -1)
        x, carried = self.conv1d(x, state, reset)
        return self.out_proj(F.silu(x) * F.silu(z)), carried

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step."""
        x, z = self.in_proj(input).chunk(2, -1)
        x, carried = self.conv1d.step(x, state, reset)
        return self.out_proj(F.silu(x) * F.silu(z)), carried


class ConvLSTMBlock(nn.Module):
    """One layer of a ConvLSTM whose map is laid out in the features, (channels, height, width)."""

    def __init__(self, width: int, map_size: tuple[int, int], kernel: int) -> None:
        super().__init__()
        self.shape = (width // math.prod(map_size), *map_size)
        self.cell = ConvLSTM(self.shape[0], self.shape[0], kernel, batch_first=True)

    def init_state(self, batch_size: int) -> State:
        """Zeros: ``{"hidden": ..., "cell": ...}``, both (batch, channels, height, width)."""
        hidden, cell = self.cell.init_state(batch_size, self.shape[1:])
        return {"hidden": hidden[0], "cell": cell[0]}

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """All steps, one call of the kernel."""
        return self._run(self.cell, inputs, state, reset)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step."""
        return self._run(self.cell.step, input, state, reset)

    def _run(
        self, run: Callable[..., Any], inputs: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        given = None if state is None else (state["hidden"][None], state["cell"][None])
        outputs, (hidden, cell) = run(inputs.unflatten(-1, self.shape), given, reset)
        return outputs.flatten(-3), {"hidden": hidden[0], "cell": cell[0]}


class GRU(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) that resets inside a sequence: a loop over time, for comparison."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRUCell(width, width)

    def init_state(self, batch_size: int) -> State:
        """Zeros: ``{"hidden": (batch, width)}``."""
        weight = self.cell.weight_hh
        return {"hidden": torch.zeros(batch_size, self.width, device=weight.device, dtype=weight.dtype)}

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Step by step: a GRU knows no other way."""
        carried: Mapping[str, Tensor] = self.init_state(inputs.shape[0]) if state is None else state
        outputs = []
        for t in range(inputs.shape[1]):
            output, carried = self.step(inputs[:, t], carried, None if reset is None else reset[:, t])
            outputs.append(output)
        return torch.stack(outputs, 1) if outputs else torch.zeros_like(inputs), dict(carried)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step."""
        hidden = (self.init_state(input.shape[0]) if state is None else state)["hidden"]
        if reset is not None:
            hidden = hidden.masked_fill(reset[:, None], 0)
        hidden = self.cell(input, hidden)
        return hidden, {"hidden": hidden}


def build_memory(config: MemoryConfig) -> MemoryStack:
    """The memory that ``config`` names; features in and out are ``config.width``."""
    return MemoryStack([_block(config) for _ in range(config.layers)], config.width)


def _block(config: MemoryConfig) -> nn.Module:
    if config.kind == "gru":
        return GRU(config.width)
    if config.kind == "conv_lstm":
        return ConvLSTMBlock(config.width, config.map_size, config.kernel)
    if config.kind == "none":
        return ScanlessBlock(config.width, 1, config.expand)
    if not config.scan:
        return ScanlessBlock(config.width, config.convolution, config.expand)
    if not config.rotated:
        return Mamba(config.width, config.states, config.convolution, config.expand, groups=config.groups)
    return RotaryMamba(
        config.width,
        config.states,
        d_conv=config.convolution,
        expand=config.expand,
        groups=config.groups,
        selective_angle=config.selective_angle,
        decay=config.decay,
    )


def _joined(parts: list[State]) -> State:
    return {f"{index}.{name}": value for index, part in enumerate(parts) for name, value in part.items()}


def _part(state: Mapping[str, Tensor], index: int) -> State:
    prefix = f"{index}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
