"""Canonical place memory inputs and outputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmkernels.allocation import empty_like_or_absent
from wmkernels.checks import state_dtype


class PlaceMemoryInputs(NamedTuple):
    """In op order; all but ``values`` in the state dtype."""

    values: Tensor  # (batch, time, places, channels)
    phase: Tensor  # (batch, time, groups, 2 frequencies)
    keys: Tensor  # (places, 2 frequencies)
    inverse: Tensor | None = None  # (places, places)
    gate: Tensor | None = None  # (batch, time, places, groups)
    initial_state: Tensor | None = None  # (sequences, groups, 2 frequencies, channels / groups)
    initial_phase: Tensor | None = None  # (sequences, groups, 2 frequencies)
    reset: Tensor | None = None  # (batch, time)
    cu_seqlens: Tensor | None = None  # (sequences + 1,), int64

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Differentiable inputs."""
        return self[:DIFFERENTIABLE]

    @property
    def groups(self) -> int:
        """Groups of channels, each with phases of its own."""
        return self.phase.shape[2]

    @property
    def sequences(self) -> int:
        """Number of sequences, each with an initial state."""
        return self.values.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Of the first and last states."""
        groups, rows = self.phase.shape[2:]
        return self.sequences, groups, rows, self.values.shape[3] // groups


DIFFERENTIABLE, TENSORS = 7, 9


def forward_outputs(inputs: PlaceMemoryInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, last_state, residual), uninitialised; residual is (0,) unless the backward pass needs it."""
    values = inputs.values
    dtype = state_dtype(values.dtype)
    shape = tuple(values.shape) if keep and inputs.inverse is not None else (0,)
    return (
        torch.empty(tuple(values.shape), dtype=values.dtype, device=values.device),
        torch.empty(inputs.state_shape, dtype=dtype, device=values.device),
        torch.empty(shape, dtype=dtype, device=values.device),
    )


def backward_outputs(inputs: PlaceMemoryInputs, phase_gradient: bool, key_gradient: bool) -> tuple[Tensor, ...]:
    """Uninitialised gradients of ``differentiable``; (0,) if absent or not asked for."""
    device = inputs.values.device
    given = {name: x for name, x in zip(inputs._fields, inputs.differentiable, strict=False)}
    if not phase_gradient:
        given |= {"phase": None, "initial_phase": None}
    if not key_gradient:
        given |= {"keys": None, "inverse": None}
    return tuple(empty_like_or_absent(x, device) for x in given.values())
