"""Selective scan inputs and outputs; with ``channel_last``, outputs have contiguous channels (dB, dC: states)."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmkernels.allocation import empty_activation, empty_like_or_absent
from wmkernels.checks import state_dtype


class ScanInputs(NamedTuple):
    """In op order; parameters and states in the state dtype."""

    u: Tensor  # (batch, channels, time)
    delta: Tensor  # as u
    A: Tensor  # (channels, state)
    B: Tensor  # (batch, groups, state, time) or (channels, state)
    C: Tensor  # as B
    D: Tensor | None = None  # (channels,)
    z: Tensor | None = None  # (batch, channels, time)
    delta_bias: Tensor | None = None  # (channels,)
    initial_state: Tensor | None = None  # (sequences, channels, state)
    reset: Tensor | None = None  # (batch, time)
    cu_seqlens: Tensor | None = None  # (sequences + 1,), int64
    delta_softplus: bool = False
    channel_last: bool = False

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Differentiable inputs."""
        return self[:9]

    @property
    def groups(self) -> int:
        """Groups of B and C."""
        return next((x.shape[1] for x in (self.B, self.C) if x.dim() == 4), 1)

    @property
    def sequences(self) -> int:
        """Number of sequences, each with an initial state."""
        return self.u.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


DIFFERENTIABLE, TENSORS = 9, 11


def chunk_count(inputs: ScanInputs, chunk: int) -> int:
    """Rows of chunk_states (``csrc/include/selective_scan.inc``)."""
    batch, _, time = inputs.u.shape
    if inputs.cu_seqlens is None:
        return batch * ((time + chunk - 1) // chunk)
    return time // chunk + inputs.sequences


def forward_outputs(inputs: ScanInputs, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, last_state, chunk_states), uninitialised; ``chunk`` 0 saves none."""
    u = inputs.u
    channels, state = inputs.A.shape
    dtype = state_dtype(u.dtype)
    out = empty_activation(u, inputs.channel_last)
    last_state = torch.empty((inputs.sequences, channels, state), dtype=dtype, device=u.device)
    count = chunk_count(inputs, chunk) if chunk else 0
    # Packed chunks leave gaps; ops must initialise all output
    allocate = torch.empty if inputs.cu_seqlens is None else torch.zeros
    chunk_states = allocate((count, channels, state), dtype=dtype, device=u.device)
    return out, last_state, chunk_states


def backward_outputs(inputs: ScanInputs) -> tuple[Tensor, ...]:
    """Uninitialised gradients; (0,) if absent."""
    u, device, channel_last = inputs.u, inputs.u.device, inputs.channel_last
    return (
        empty_activation(u, channel_last),
        empty_activation(u, channel_last),
        empty_like_or_absent(inputs.A, device),
        _empty_projection(inputs.B, channel_last),
        _empty_projection(inputs.C, channel_last),
        empty_like_or_absent(inputs.D, device),
        empty_like_or_absent(None, device) if inputs.z is None else empty_activation(inputs.z, channel_last),
        empty_like_or_absent(inputs.delta_bias, device),
        empty_like_or_absent(inputs.initial_state, device),
    )


def _empty_projection(like: Tensor, channel_last: bool) -> Tensor:
    if like.dim() == 4 and channel_last:
        _, groups, state, time = like.shape
        strides = (groups * time * state, time * state, 1, state)
        return torch.empty_strided(tuple(like.shape), strides, dtype=like.dtype, device=like.device)
    return torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)
