"""Gated delta rule inputs and outputs; with ``channel_last``, outputs are (batch, time, heads, size) in memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmkernels.allocation import empty_like_or_absent
from wmkernels.checks import state_dtype


class DeltaRuleInputs(NamedTuple):
    """In op order."""

    q: Tensor  # (batch, heads, d_k, time)
    k: Tensor  # as q
    v: Tensor  # (batch, heads, d_v, time)
    gate: Tensor  # (batch, heads, time), state dtype
    beta: Tensor  # as gate
    initial_state: Tensor | None = None  # (sequences, heads, d_k, d_v), state dtype
    reset: Tensor | None = None  # (batch, time)
    cu_seqlens: Tensor | None = None  # (sequences + 1,), int64
    scale: float = 1.0
    channel_last: bool = False

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Differentiable inputs."""
        return self[:6]

    @property
    def sequences(self) -> int:
        """Number of sequences, each with an initial state."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(sequences, heads, d_k, d_v)."""
        return (self.sequences, self.q.shape[1], self.q.shape[2], self.v.shape[2])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return self.v.numel() == 0 or self.q.numel() == 0


DIFFERENTIABLE, TENSORS = 6, 8
CHUNK = 32  # steps per saved state and per block of matrix products


def chunk_count(inputs: DeltaRuleInputs, chunk: int) -> int:
    """Rows of chunk_states (``csrc/include/gated_delta_rule.inc``)."""
    batch, time = inputs.q.shape[0], inputs.q.shape[3]
    if inputs.cu_seqlens is None:
        return batch * ((time + chunk - 1) // chunk)
    return time // chunk + inputs.sequences


def forward_outputs(inputs: DeltaRuleInputs, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, last_state, chunk_states, residuals), uninitialised; ``chunk`` 0 saves no states and residuals."""
    v = inputs.v
    batch, heads, d_v, time = v.shape
    dtype = state_dtype(v.dtype)
    out = empty_heads(v, inputs.channel_last)
    last_state = torch.empty(inputs.state_shape, dtype=dtype, device=v.device)
    count = chunk_count(inputs, chunk) if chunk else 0
    # Packed chunks leave gaps; ops must initialise all output
    allocate = torch.empty if inputs.cu_seqlens is None else torch.zeros
    chunk_states = allocate((count, *inputs.state_shape[1:]), dtype=dtype, device=v.device)
    residuals = torch.empty((batch, heads, time if chunk else 0, d_v), dtype=dtype, device=v.device)
    return out, last_state, chunk_states, residuals


def backward_outputs(inputs: DeltaRuleInputs) -> tuple[Tensor, ...]:
    """Uninitialised gradients; (0,) if absent."""
    q, k, v = (empty_heads(x, inputs.channel_last) for x in inputs[:3])
    gate, beta = (torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device) for x in (inputs.gate, inputs.beta))
    return q, k, v, gate, beta, empty_like_or_absent(inputs.initial_state, q.device)


def empty_heads(like: Tensor, channel_last: bool) -> Tensor:
    """Uninitialised (batch, heads, size, time) as ``like``."""
    batch, heads, size, time = like.shape
    if channel_last:
        strides = (time * heads * size, size, 1, heads * size)
        return torch.empty_strided((batch, heads, size, time), strides, dtype=like.dtype, device=like.device)
    return torch.empty((batch, heads, size, time), dtype=like.dtype, device=like.device)
