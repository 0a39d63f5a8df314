"""ConvLSTM modules."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import require_flag
from wmkernels.conv_lstm.function import conv_lstm, conv_lstm_step
from wmkernels.conv_lstm.validation import Padding, Pair
from wmkernels.nn.checks import checked
from wmkernels.nn.conv_lstm_base import ConvLSTMBase, MapState, require_pair


class ConvLSTM(ConvLSTMBase):
    """Multi-layer convolutional LSTM over a sequence of maps (Shi et al. 2015), after ``nn.LSTM``.

    Each layer has one bias, ``bias_l0``, and ``peephole_l0``. ``stride``, ``padding`` and ``dilation`` are the first
    layer's. Arguments not listed are those of ``nn.LSTM`` and ``wmkernels.conv_lstm``.

    Args:
        input_size: input channels.
        hidden_size: channels of h and c.
        kernel_size: of both convolutions, odd; int or (vertical, horizontal).
        bidirectional: outputs have 2 * hidden_size channels.
        peephole: True, or the states' (height, width) for weights per position.
        forget_bias: initial bias of the forget gate.

    Example:
        >>> import torch, wmkernels
        >>> memory = wmkernels.nn.ConvLSTM(3, 8, kernel_size=3, num_layers=2)
        >>> outputs, (h, c) = memory(torch.randn(5, 2, 3, 16, 16))
        >>> output, (h, c) = memory.step(torch.randn(2, 3, 16, 16), (h, c))
        >>> outputs.shape, h.shape
        (torch.Size([5, 2, 8, 16, 16]), torch.Size([2, 2, 8, 16, 16]))
    """

    @checked
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: Pair,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        peephole: bool | Sequence[int] = False,
        forget_bias: float = 1.0,
        stride: Pair = 1,
        padding: Padding = "same",
        dilation: Pair = 1,
        *,
        keep_gates: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            kernel_size,
            bias,
            peephole,
            forget_bias,
            stride,
            padding,
            dilation,
            keep_gates,
            backend,
        )
        if not 0 <= dropout <= 1:
            raise ValueError(f"ConvLSTM: dropout is {dropout!r}, expected a share from 0 to 1")
        if dropout and num_layers == 1:
            raise ValueError("ConvLSTM: dropout lies between layers, and num_layers is 1; leave it at 0 or add a layer")
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        self._directions = ("", "_reverse") if bidirectional else ("",)
        for layer in range(num_layers):
            channels = hidden_size * len(self._directions) if layer else input_size
            for direction in self._directions:
                self.add_parameters(f"_l{layer}{direction}", channels, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in range(self.num_layers):
            for direction in self._directions:
                self.reset_parameters_of(f"_l{layer}{direction}")

    def init_state(self, batch_size: int, map_size: Sequence[int]) -> MapState:
        """Zeros (h, c), each (num_layers, batch, hidden_size, height, width), for inputs of ``map_size``.

        Bidirectional: 2 * num_layers, forward before reverse per layer.
        """
        count = self.num_layers * len(self._directions)
        return self._zeros(count, batch_size, self.hidden_size, *self._map_size(map_size))

    def forward(
        self,
        inputs: Tensor,
        state: MapState | None = None,
        reset: Tensor | None = None,
        *,
        single_step: bool = False,
    ) -> tuple[Tensor, MapState]:
        """The last layer's outputs and the last state; errors of ``conv_lstm``.

        Args:
            inputs: (time, batch, input_size, height, width).
            state: zeros if None.
            reset: bool (time, batch), true at a sequence's first step.
            single_step: as ``step``, which calls the module with it.
        """
        if require_flag("ConvLSTM", "single_step", single_step):
            return self._step(inputs, state, reset)
        self._check("inputs", inputs, "batch, time" if self.batch_first else "time, batch")
        time_axis, batch_axis = (1, 0) if self.batch_first else (0, 1)
        state = self._require_state(state, inputs, inputs.shape[batch_axis])
        outputs, last = inputs, []
        for layer in range(self.num_layers):
            results = []
            for number, direction in enumerate(self._directions):
                index = layer * len(self._directions) + number
                weight_ih, weight_hh, bias, peephole = self.parameters_of(f"_l{layer}{direction}")
                backwards = direction == "_reverse"
                result, after = conv_lstm(
                    outputs.flip(time_axis) if backwards else outputs,
                    weight_ih,
                    weight_hh,
                    bias,
                    None if state is None else (state[0][index], state[1][index]),
                    peephole=peephole,
                    reset=_reversed_resets(reset, time_axis) if backwards else reset,
                    batch_first=self.batch_first,
                    **self._options(layer),
                )
                results.append(result.flip(time_axis) if backwards else result)
                last.append(after)
            outputs = torch.cat(results, 2) if self.bidirectional else results[0]
            if layer + 1 < self.num_layers:
                outputs = F.dropout(outputs, self.dropout, self.training)
        h, c = (torch.stack(parts) for parts in zip(*last, strict=True))
        return outputs, (h, c)

    def step(self, input: Tensor, state: MapState | None, reset: Tensor | None = None) -> tuple[Tensor, MapState]:
        """One step: ``input`` (batch, input_size, height, width), ``reset`` bool (batch,).

        Raises:
            RuntimeError: bidirectional.
        """
        if self._steps_by_call:
            stepped: tuple[Tensor, MapState] = self(input, state, reset, single_step=True)
            return stepped
        return self._step(input, state, reset)

    def _step(self, input: Tensor, state: MapState | None, reset: Tensor | None) -> tuple[Tensor, MapState]:
        if self.bidirectional:
            raise RuntimeError(
                "ConvLSTM: step() of a bidirectional module: its reverse direction starts from the sequence's end, "
                "unknown to a step; use forward() on the whole sequence, or bidirectional=False"
            )
        self._check("input", input, "batch")
        state = self._require_state(state, input, input.shape[0])
        output, last = input, []
        for layer in range(self.num_layers):
            weight_ih, weight_hh, bias, peephole = self.parameters_of(f"_l{layer}")
            output, after = conv_lstm_step(
                output,
                None if state is None else (state[0][layer], state[1][layer]),
                weight_ih,
                weight_hh,
                bias,
                peephole=peephole,
                reset=reset,
                **self._options(layer),
            )
            last.append(after)
            if layer + 1 < self.num_layers:
                output = F.dropout(output, self.dropout, self.training)
        h, c = (torch.stack(parts) for parts in zip(*last, strict=True))
        return output, (h, c)

    def _require_state(self, state: MapState | None, inputs: Tensor, batch: int) -> MapState | None:
        if state is None:
            return None
        count = self.num_layers * len(self._directions)
        shape = (count, batch, self.hidden_size, *self._map_size(inputs.shape[-2:]))
        return require_pair("ConvLSTM", state, shape, inputs)


class ConvLSTMCell(ConvLSTMBase):
    """One step of a ``ConvLSTM`` layer.

    Example:
        >>> import torch, wmkernels
        >>> cell = wmkernels.nn.ConvLSTMCell(3, 8, kernel_size=3)
        >>> state = cell.init_state(2, (16, 16))
        >>> for _ in range(5):
        ...     h, state = cell(torch.randn(2, 3, 16, 16), state)
        >>> h.shape
        torch.Size([2, 8, 16, 16])
    """

    @checked
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: Pair,
        bias: bool = True,
        peephole: bool | Sequence[int] = False,
        forget_bias: float = 1.0,
        stride: Pair = 1,
        padding: Padding = "same",
        dilation: Pair = 1,
        *,
        keep_gates: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            kernel_size,
            bias,
            peephole,
            forget_bias,
            stride,
            padding,
            dilation,
            keep_gates,
            backend,
        )
        self.add_parameters("", input_size, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.reset_parameters_of("")

    def init_state(self, batch_size: int, map_size: Sequence[int]) -> MapState:
        """Zeros (h, c), each (batch, hidden_size, height, width)."""
        return self._zeros(batch_size, self.hidden_size, *self._map_size(map_size))

    def forward(
        self, input: Tensor, state: MapState | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, MapState]:
        """``(h, (h, c))``; arguments as for ``ConvLSTM.step``."""
        self._check("input", input, "batch")
        if state is not None:
            shape = (input.shape[0], self.hidden_size, *self._map_size(input.shape[-2:]))
            state = require_pair("ConvLSTMCell", state, shape, input)
        weight_ih, weight_hh, bias, peephole = self.parameters_of("")
        return conv_lstm_step(
            input, state, weight_ih, weight_hh, bias, peephole=peephole, reset=reset, **self._options(0)
        )

    def step(self, input: Tensor, state: MapState | None, reset: Tensor | None = None) -> tuple[Tensor, MapState]:
        """As ``forward``."""
        stepped: tuple[Tensor, MapState] = self(input, state, reset)
        return stepped


def _reversed_resets(reset: Tensor | None, time_axis: int) -> Tensor | None:
    """A step resets where its successor in time does."""
    if reset is None or reset.dim() <= time_axis or reset.shape[time_axis] == 0:
        return reset
    flipped = reset.flip(time_axis).roll(1, time_axis)
    first = torch.zeros_like(flipped.narrow(time_axis, 0, 1))
    return torch.cat([first, flipped.narrow(time_axis, 1, flipped.shape[time_axis] - 1)], time_axis)
