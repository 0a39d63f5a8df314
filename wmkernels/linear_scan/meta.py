"""Allocation of what the linear scan returns: one place for the fakes and for every backend, strides included."""

import torch
from torch import Tensor

from wmkernels.allocation import empty_activation, empty_vector
from wmkernels.checks import state_dtype


def forward_outputs(gates: Tensor, channel_last: bool) -> tuple[Tensor, Tensor]:
    """(out, last_state) for gates of (batch, channels, time)."""
    batch, channels, _ = gates.shape
    last_state = torch.empty((batch, channels), dtype=state_dtype(gates.dtype), device=gates.device)
    return empty_activation(gates, channel_last), last_state


def backward_outputs(gates: Tensor, initial_state: Tensor | None, channel_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (gates, tokens, initial_state), uninitialised; the last is of shape (0,) where there is none."""
    return (
        empty_activation(gates, channel_last),
        empty_activation(gates, channel_last),
        empty_vector(initial_state, gates.device),
    )
