"""Base of the ConvLSTM modules."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wmkernels.checks import FLOATS, has_shape, require_device, require_dtype, require_tensor, state_dtype
from wmkernels.conv_lstm.meta import output_size
from wmkernels.conv_lstm.validation import Padding, Pair, paddings, pair
from wmkernels.nn.memory_module import MemoryModule

MapState = tuple[Tensor, Tensor]


class ConvLSTMBase(MemoryModule):
    """Parameters and checks."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: Pair,
        bias: bool,
        peephole: bool | Sequence[int],
        forget_bias: float,
        stride: Pair,
        padding: Padding,
        dilation: Pair,
        keep_gates: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.kernel_size = pair(name, "kernel_size", kernel_size)
        if self.kernel_size[0] % 2 == 0 or self.kernel_size[1] % 2 == 0:
            raise ValueError(
                f"{name}: kernel_size is {kernel_size!r}, expected odd sizes: the hidden convolution keeps the map's "
                "size"
            )
        self._with_bias = bias
        self._peephole: bool | tuple[int, int] = (
            peephole if isinstance(peephole, bool) else pair(name, "peephole", peephole)
        )
        self.forget_bias = float(forget_bias)
        self.stride = pair(name, "stride", stride)
        self.padding = padding
        self.dilation = pair(name, "dilation", dilation)
        paddings(name, padding, (1, 1), (1, 1), (1, 1), (1, 1))  # raises if invalid
        self.keep_gates = keep_gates
        self.backend = backend

    def add_parameters(self, suffix: str, input_size: int, factory: dict[str, Any]) -> None:
        hidden, kernel = self.hidden_size, self.kernel_size
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight_ih": (4 * hidden, input_size, *kernel),
            "weight_hh": (4 * hidden, hidden, *kernel),
            "bias": (4 * hidden,) if self._with_bias else None,
            "peephole": None,
        }
        if self._peephole is not False:
            shapes["peephole"] = (3, hidden) if self._peephole is True else (3, hidden, *self._peephole)
        for name, shape in shapes.items():
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, **factory))
            self.register_parameter(name + suffix, parameter)

    def parameters_of(self, suffix: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        weight_ih, weight_hh, bias, peephole = (
            getattr(self, name + suffix) for name in ("weight_ih", "weight_hh", "bias", "peephole")
        )
        return weight_ih, weight_hh, bias, peephole

    def reset_parameters_of(self, suffix: str) -> None:
        """Weights as of one ``nn.Conv2d`` over x and h."""
        weight_ih, weight_hh, bias, peephole = self.parameters_of(suffix)
        fan_in = (weight_ih.shape[1] + weight_hh.shape[1]) * weight_hh.shape[2] * weight_hh.shape[3]
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(weight_ih, -bound, bound)
        nn.init.uniform_(weight_hh, -bound, bound)
        with torch.no_grad():
            if bias is not None:
                bias.zero_()
                bias[self.hidden_size : 2 * self.hidden_size] = self.forget_bias
            if peephole is not None:
                peephole.zero_()

    def _map_size(self, size: Sequence[int]) -> tuple[int, int]:
        name = type(self).__name__
        pads = paddings(name, self.padding, size, self.kernel_size, self.stride, self.dilation)
        found = output_size(size, self.kernel_size, self.stride, pads, self.dilation)
        if isinstance(self._peephole, tuple) and any(a != b for a, b in zip(found, self._peephole, strict=True)):
            raise ValueError(
                f"{name}: a map of {tuple(size)} makes states of {found}, expected {self._peephole} to match peephole"
            )
        return found

    def _zeros(self, *shape: int) -> MapState:
        weight: Tensor = next(self.parameters())
        h = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        return h, torch.zeros(shape, device=weight.device, dtype=state_dtype(weight.dtype))

    def _check(self, argument: str, x: Tensor, leading: str) -> None:
        name = type(self).__name__
        require_tensor(name, argument, x)
        require_dtype(name, argument, x, FLOATS, "")
        if x.dim() != leading.count(",") + 4 or x.shape[-3] != self.input_size:
            expected = f"({leading}, channels={self.input_size}, height, width)"
            time = "time" in leading
            hint = ""
            if x.dim() == (4 if time else 5):
                hint = "; step() takes one step of time" if time else "; forward() takes a sequence"
            raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, expected {expected}{hint}")

    def _options(self, layer: int) -> dict[str, Any]:
        options: dict[str, Any] = {"keep_gates": self.keep_gates, "backend": self.backend}
        if layer == 0:
            options |= {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return options

    def extra_repr(self) -> str:
        shown = [f"{self.input_size}, {self.hidden_size}, kernel_size={self.kernel_size}"]
        values = {
            "num_layers": (getattr(self, "num_layers", 1), 1),
            "bias": (self._with_bias, True),
            "batch_first": (getattr(self, "batch_first", False), False),
            "dropout": (getattr(self, "dropout", 0.0), 0.0),
            "bidirectional": (getattr(self, "bidirectional", False), False),
            "peephole": (self._peephole, False),
            "stride": (self.stride, (1, 1)),
            "padding": (self.padding, "same"),
            "dilation": (self.dilation, (1, 1)),
            "keep_gates": (self.keep_gates, True),
            "backend": (self.backend, None),
        }
        shown += [f"{name}={value!r}" for name, (value, default) in values.items() if value != default]
        return ", ".join(shown)


def require_pair(module: str, state: Any, shape: tuple[int, ...], like: Tensor) -> MapState:
    """``state`` as (h, c), checked."""
    if not isinstance(state, tuple | list) or len(state) != 2:
        held = f"{len(state)} values" if isinstance(state, tuple | list) else f"a {type(state).__name__}"
        raise TypeError(f"{module}: state is {held}, expected a pair (h, c) as init_state() makes it")
    for name, value in zip(("h", "c"), state, strict=True):
        require_tensor(module, f"the state's {name}", value)
        require_dtype(module, f"the state's {name}", value, FLOATS, "")
        require_device(module, f"the state's {name}", value, like.device, "the input")
        if not has_shape(value, shape):
            raise ValueError(f"{module}: the state's {name} has shape {tuple(value.shape)}, expected {shape}")
    return state[0], state[1]
