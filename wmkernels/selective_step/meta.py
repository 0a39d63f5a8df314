"""Canonical step inputs and outputs."""

from typing import NamedTuple

import torch
from torch import Tensor


class StepInputs(NamedTuple):
    """In op order; parameters in the state dtype."""

    state: Tensor  # (rows, channels, state)
    u: Tensor  # (batch, channels)
    delta: Tensor  # as u
    A: Tensor  # (channels, state)
    B: Tensor  # (batch, groups, state)
    C: Tensor  # (batch, groups, state)
    D: Tensor | None = None  # (channels,)
    z: Tensor | None = None  # (batch, channels)
    delta_bias: Tensor | None = None  # (channels,)
    reset: Tensor | None = None  # (batch,)
    delta_softplus: bool = False

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Differentiable inputs."""
        return self[:9]


DIFFERENTIABLE = 9


def step_outputs(state: Tensor, u: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """(out, new_state), uninitialised."""
    new_state = torch.empty(tuple(state.shape), dtype=state.dtype, device=state.device)
    return torch.empty(tuple(u.shape), dtype=u.dtype, device=u.device), new_state


def update_outputs(state: Tensor, u: Tensor, *_: object) -> Tensor:
    """Uninitialised output."""
    return torch.empty(tuple(u.shape), dtype=u.dtype, device=u.device)
