"""Canonical inputs and outputs of the causal convolution."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmkernels.allocation import empty_activation, empty_like_or_absent
from wmkernels.checks import state_dtype


class ConvInputs(NamedTuple):
    """In op order; all but ``x`` in the state dtype."""

    x: Tensor  # (batch, channels, time)
    weight: Tensor  # (channels, width), for the newest input last
    bias: Tensor | None = None  # (channels,)
    initial_state: Tensor | None = None  # (sequences, channels, width - 1), oldest first
    reset: Tensor | None = None  # (batch, time)
    cu_seqlens: Tensor | None = None  # (sequences + 1,), int64
    silu: bool = False
    channel_last: bool = False

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Differentiable inputs."""
        return self.x, self.weight, self.bias, self.initial_state

    @property
    def sequences(self) -> int:
        """Number of sequences, each with a window."""
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of the windows before and after the sequences."""
        return self.sequences, self.x.shape[1], self.weight.shape[1] - 1


DIFFERENTIABLE, TENSORS = 4, 6


def forward_outputs(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state), uninitialised; with ``channel_last``, channels are contiguous in both."""
    return empty_activation(inputs.x, inputs.channel_last), empty_window(inputs)


def backward_outputs(inputs: ConvInputs) -> tuple[Tensor, ...]:
    """Uninitialised gradients of ``differentiable``; (0,) if absent."""
    device = inputs.x.device
    return (
        empty_activation(inputs.x, inputs.channel_last),
        empty_like_or_absent(inputs.weight, device),
        empty_like_or_absent(inputs.bias, device),
        empty_like_or_absent(None, device) if inputs.initial_state is None else empty_window(inputs),
    )


def empty_window(inputs: ConvInputs) -> Tensor:
    """Uninitialised windows of all sequences."""
    sequences, channels, past = inputs.state_shape
    strides = (past * channels, 1, channels) if inputs.channel_last else (past * channels, past, 1)
    dtype = state_dtype(inputs.x.dtype)
    return torch.empty_strided((sequences, channels, past), strides, dtype=dtype, device=inputs.x.device)
