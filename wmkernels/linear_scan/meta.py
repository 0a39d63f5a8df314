"""Canonical linear scan inputs and outputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmkernels.allocation import empty_activation, empty_like_or_absent
from wmkernels.checks import state_dtype


class LinearScanInputs(NamedTuple):
    """In op order."""

    gates: Tensor  # (batch, channels, time)
    tokens: Tensor | None  # as gates; None in backward
    initial_state: Tensor | None = None  # (batch, channels), state dtype
    reset: Tensor | None = None  # (batch, time)
    reverse: bool = False
    channel_last: bool = False


def forward_outputs(inputs: LinearScanInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state), uninitialised."""
    gates = inputs.gates
    last_state = torch.empty(gates.shape[:2], dtype=state_dtype(gates.dtype), device=gates.device)
    return empty_activation(gates, inputs.channel_last), last_state


def backward_outputs(inputs: LinearScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients; (0,) if absent."""
    gates, channel_last = inputs.gates, inputs.channel_last
    return (
        empty_activation(gates, channel_last),
        empty_activation(gates, channel_last),
        empty_like_or_absent(inputs.initial_state, gates.device),
    )
