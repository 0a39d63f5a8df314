"""Canonical ConvLSTM inputs and uninitialised outputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wmkernels.checks import state_dtype

KEEP_NOTHING, KEEP_CELLS, KEEP_GATES = 0, 1, 2


class Sizes(NamedTuple):
    """Sizes of all states."""

    time: int
    batch: int
    hidden: int
    height: int
    width: int


class ConvLSTMInputs(NamedTuple):
    """In the forward op's order; shapes as for ``conv_lstm``."""

    x: Tensor  # (time, batch, channels, height, width)
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None  # state dtype
    peephole: Tensor | None  # state dtype
    h: Tensor | None  # dtype of x
    c: Tensor | None  # state dtype
    reset: Tensor | None  # (time, batch)
    stride: Sequence[int]  # (vertical, horizontal)
    padding: Sequence[int]  # (top, bottom, left, right)
    dilation: Sequence[int]  # (vertical, horizontal)

    @classmethod
    def from_op(cls, args: Sequence[Any]) -> "ConvLSTMInputs":
        """From the first arguments of the op, which are tensors and single sizes."""
        tensors, sizes = args[:TENSORS], args[TENSORS : TENSORS + SIZES]
        return cls._make((*tensors, sizes[:2], sizes[2:6], sizes[6:]))

    @property
    def op_args(self) -> tuple[Any, ...]:
        """The op's first arguments: ``torch.jit.trace`` cannot record a list of sizes that may be symbolic."""
        return (*self.tensors, *self.stride, *self.padding, *self.dilation)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:8]

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self[:7]

    @property
    def sizes(self) -> Sizes:
        size = output_size(self.x.shape[-2:], self.weight_ih.shape[-2:], self.stride, self.padding, self.dilation)
        return Sizes(self.x.shape[0], self.x.shape[1], self.weight_hh.shape[1], *size)


DIFFERENTIABLE, TENSORS, SIZES = 7, 8, 8


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """(height, width) of a convolution, below 1 if the kernel does not fit."""
    height, width = (
        (size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return height, width


def empty_maps(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(..., channels, height, width), channels contiguous."""
    *leading, channels, height, width = shape
    return torch.empty((*leading, height, width, channels), dtype=dtype, device=device).movedim(-1, -3)


def forward_outputs(inputs: ConvLSTMInputs, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, h, c, cells, activated gates); the last two in the state dtype, (0,) if not kept."""
    x = inputs.x
    time, batch, hidden, height, width = inputs.sizes
    dtype = state_dtype(x.dtype)
    state = (batch, hidden, height, width)
    cells = (time, batch, height, width, hidden) if keep >= KEEP_CELLS else (0,)
    gates = (time, batch, height, width, 4, hidden) if keep >= KEEP_GATES else (0,)
    return (
        empty_maps((time, *state), x.dtype, x.device),
        empty_maps(state, x.dtype, x.device),
        empty_maps(state, dtype, x.device),
        torch.empty(cells, dtype=dtype, device=x.device),
        torch.empty(gates, dtype=dtype, device=x.device),
    )


def backward_outputs(inputs: ConvLSTMInputs) -> tuple[Tensor, ...]:
    """Gradients of the differentiable inputs; (0,) for None."""
    x = inputs.x

    def empty(given: Tensor | None, are_maps: bool) -> Tensor:
        if given is None:
            return torch.empty((0,), dtype=x.dtype, device=x.device)
        if are_maps:
            return empty_maps(given.shape, given.dtype, given.device)
        return torch.empty(tuple(given.shape), dtype=given.dtype, device=given.device)

    names = ConvLSTMInputs._fields
    return tuple(
        empty(given, name in ("x", "h", "c")) for name, given in zip(names, inputs.differentiable, strict=False)
    )
