"""The modules of memory blocks that wmkernels does not have.

A module maps (batch, time, width) to the same shape; its state is a flat dict of tensors, batch first.
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.nn import CausalConv1d, ConvLSTM
from wmkernels.nn.memory_module import forward_with_states
from worldmodel.data.batch import State


class GatedConv(nn.Module):
    """A Mamba block without its scan."""

    def __init__(self, width: int, d_conv: int, expand: float) -> None:
        super().__init__()
        inner = int(expand * width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = CausalConv1d(inner, d_conv, activation="silu")
        self.out_proj = nn.Linear(inner, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        return self.conv1d.init_state(batch_size)

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x, z = self.in_proj(inputs).chunk(2, -1)
        x, carried = self.conv1d(x, state, reset)
        return self.out_proj(x * F.silu(z)), carried

    def forward_with_states(
        self,
        inputs: Tensor,
        states_after: Sequence[int],
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """As of ``wmkernels.nn.memory_module``."""
        x, z = self.in_proj(inputs).chunk(2, -1)
        x, windows = forward_with_states(self.conv1d, x, states_after, state, reset)
        return self.out_proj(x * F.silu(z)), windows

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x, z = self.in_proj(input).chunk(2, -1)
        x, carried = self.conv1d(x, state, reset, single_step=True)
        return self.out_proj(x * F.silu(z)), carried


class MapLSTM(nn.Module):
    """A ConvLSTM on flattened (channels, height, width) maps."""

    def __init__(self, width: int, map_size: tuple[int, int], kernel: int) -> None:
        super().__init__()
        self.shape = (width // math.prod(map_size), *map_size)
        self.cell = ConvLSTM(self.shape[0], self.shape[0], kernel, batch_first=True)

    def init_state(self, batch_size: int) -> State:
        hidden, cell = self.cell.init_state(batch_size, self.shape[1:])
        return {"hidden": hidden[0], "cell": cell[0]}

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self._run(self.cell, inputs, state, reset)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self._run(self.cell.step, input, state, reset)

    def _run(
        self, run: Callable[..., Any], inputs: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        given = None if state is None else (state["hidden"][None], state["cell"][None])
        outputs, (hidden, cell) = run(inputs.unflatten(-1, self.shape), given, reset)
        return outputs.flatten(-3), {"hidden": hidden[0], "cell": cell[0]}


class CellLoop(nn.Module, abc.ABC):
    """A recurrent cell in a loop over time, with resets."""

    @abc.abstractmethod
    def init_state(self, batch_size: int) -> State: ...

    @abc.abstractmethod
    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]: ...

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        carried: Mapping[str, Tensor] = self.init_state(inputs.shape[0]) if state is None else state
        outputs = []
        for t in range(inputs.shape[1]):
            output, carried = self.step(inputs[:, t], carried, None if reset is None else reset[:, t])
            outputs.append(output)
        if not outputs:
            return torch.zeros_like(inputs), {name: x.clone() for name, x in carried.items()}
        return torch.stack(outputs, 1), dict(carried)

    def _started(self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None) -> Mapping[str, Tensor]:
        """The state, zero where ``reset``."""
        carried = self.init_state(input.shape[0]) if state is None else state
        if reset is None:
            return carried
        return {name: value.masked_fill(reset[:, None], 0) for name, value in carried.items()}


class GRU(CellLoop):
    """A GRU (Cho et al. 2014) with resets: a loop over time, as a baseline."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRUCell(width, width)

    def init_state(self, batch_size: int) -> State:
        weight = self.cell.weight_hh
        return {"hidden": torch.zeros(batch_size, self.width, device=weight.device, dtype=weight.dtype)}

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        hidden = self.cell(input, self._started(input, state, reset)["hidden"])
        return hidden, {"hidden": hidden}


class LSTM(CellLoop):
    """An LSTM (Hochreiter & Schmidhuber 1997) with resets: a loop over time, as a baseline."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.LSTMCell(width, width)

    def init_state(self, batch_size: int) -> State:
        zeros = self.cell.weight_hh.new_zeros(batch_size, self.width)
        return {"hidden": zeros, "cell": zeros.clone()}

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        carried = self._started(input, state, reset)
        hidden, cell = self.cell(input, (carried["hidden"], carried["cell"]))
        return hidden, {"hidden": hidden, "cell": cell}


class TokenAttention(nn.Module):
    """Attention among the tokens of one step (Vaswani et al. 2017); without state."""

    mixes_tokens = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        return {}

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``inputs`` (..., tokens, width)."""
        heads = self.in_proj(inputs).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(*heads)  # (..., heads, tokens, width / heads)
        return self.out_proj(mixed.transpose(-3, -2).flatten(-2)), {}

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self(input, state, reset)
