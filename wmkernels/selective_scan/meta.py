"""Allocation of what the selective scan returns: one place for the fakes and for every backend, strides included.

Canonical shapes: activations (batch, channels, time), varying B and C (batch, groups, state, time), constant ones
(channels, state). With ``channel_last`` the memory is time-major, so that the transposed view handed to the user is
contiguous. An absent gradient is an empty tensor of shape (0,).
"""

import torch
from torch import Tensor

from wmkernels.allocation import empty_activation, empty_vector
from wmkernels.checks import state_dtype


def empty_projection(like: Tensor, channel_last: bool) -> Tensor:
    """The gradient of B or C: (batch, groups, state, time), time-major where ``channel_last``, or (channels, state)."""
    if like.dim() == 4 and channel_last:
        _, groups, state, time = like.shape
        strides = (groups * time * state, time * state, 1, state)
        return torch.empty_strided(tuple(like.shape), strides, dtype=like.dtype, device=like.device)
    return torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)


def sequence_count(u: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many initial and last states there are."""
    return u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def chunk_slots(u: Tensor, cu_seqlens: Tensor | None, chunk: int) -> int:
    """How many saved states the backward pass needs room for (``csrc/include/wmkernels.h``, Chunks)."""
    time = u.shape[2]
    if cu_seqlens is None:
        return u.shape[0] * ((time + chunk - 1) // chunk)
    return time // chunk + sequence_count(u, cu_seqlens)


def forward_outputs(
    u: Tensor, A: Tensor, cu_seqlens: Tensor | None, channel_last: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, last_state, chunk_states), uninitialised; ``chunk`` 0 saves no states."""
    channels, state = A.shape
    dtype = state_dtype(u.dtype)
    out = empty_activation(u, channel_last)
    last_state = torch.empty((sequence_count(u, cu_seqlens), channels, state), dtype=dtype, device=u.device)
    slots = chunk_slots(u, cu_seqlens, chunk) if chunk else 0
    # Packed, no chunk falls on some of the slots; an op leaves nothing unwritten.
    allocate = torch.empty if cu_seqlens is None else torch.zeros
    chunk_states = allocate((slots, channels, state), dtype=dtype, device=u.device)
    return out, last_state, chunk_states


def backward_outputs(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    channel_last: bool,
) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state), uninitialised."""
    return (
        empty_activation(u, channel_last),
        empty_activation(u, channel_last),
        empty_vector(A, u.device),
        empty_projection(B, channel_last),
        empty_projection(C, channel_last),
        empty_vector(D, u.device),
        empty_vector(None, u.device) if z is None else empty_activation(z, channel_last),
        empty_vector(delta_bias, u.device),
        empty_vector(initial_state, u.device),
    )
