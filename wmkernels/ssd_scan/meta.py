"""SSD scan inputs and outputs.

A call's arguments (``SSDArguments``) are those of the papers. Kernels and the chunked form compute ``SSDInputs``: one
gate and one weight per head and step, to which ``canonical_form.py`` reduces the arguments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wmkernels.allocation import empty_like_or_absent
from wmkernels.checks import state_dtype


class SSDState(NamedTuple):
    """State of a scan with ``angle`` or ``trapezoid``.

    Attributes:
        state: (batch, heads, d, n), float32 (float64 for float64).
        phase: (batch, heads, pairs), float64 radians within [-pi, pi]; None without ``angle``.
        B: of the last step, before rotation, (batch, groups, n), as ``state``; None without ``trapezoid``.
        x: of the last step, (batch, heads, d), as ``state``; None without ``trapezoid``.
    """

    state: Tensor
    phase: Tensor | None = None
    B: Tensor | None = None
    x: Tensor | None = None


class SSDArguments(NamedTuple):
    """Arguments of ``ssd_scan``, checked."""

    x: Tensor  # (batch, time, heads, d)
    dt: Tensor  # (batch, time, heads), state dtype, as all below but B, C and z
    A: Tensor  # (heads,) or as dt
    B: Tensor  # (batch, time, groups, n), as x
    C: Tensor  # as B
    D: Tensor | None  # (heads, d)
    z: Tensor | None  # as x
    dt_bias: Tensor | None  # (heads,)
    angle: Tensor | None  # (batch, time, heads or 1, pairs)
    trapezoid: Tensor | None  # as dt
    initial_state: Tensor | None  # (sequences, heads, d, n)
    phase: Tensor | None  # (sequences, heads, pairs), float64
    previous_B: Tensor | None  # (sequences, groups, n)
    previous_x: Tensor | None  # (sequences, heads, d)
    reset: Tensor | None  # (batch, time)
    cu_seqlens: Tensor | None  # (sequences + 1,), int64
    dt_softplus: bool
    dt_limit: tuple[float, float]

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Differentiable inputs."""
        return self[:14]

    @property
    def sequences(self) -> int:
        """Number of sequences, each with an initial state."""
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def is_plain(self) -> bool:
        """Whether the state is a single tensor."""
        return self.angle is None and self.trapezoid is None


class SSDInputs(NamedTuple):
    """In op order: ``S_t = exp(gate_t) S_{t-1} + weight_t x_t B_t^T``.

    ``out_t = (S_t C_t + D x_t) silu(z_t)``; with ``own_weight``, step t itself has that weight in ``out_t``.
    """

    x: Tensor  # (batch, time, heads, d)
    gate: Tensor  # (batch, time, heads), state dtype
    weight: Tensor  # as gate
    B: Tensor  # (batch, time, groups, n)
    C: Tensor  # as B
    own_weight: Tensor | None = None  # as gate
    D: Tensor | None = None  # (heads, d), state dtype
    z: Tensor | None = None  # as x
    initial_state: Tensor | None = None  # (sequences, heads, d, n), state dtype
    reset: Tensor | None = None  # (batch, time)
    cu_seqlens: Tensor | None = None  # (sequences + 1,), int64

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Differentiable inputs."""
        return self[:9]

    @property
    def sequences(self) -> int:
        """Number of sequences, each with an initial state."""
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(sequences, heads, d, n)."""
        return (self.sequences, self.x.shape[2], self.x.shape[3], self.B.shape[3])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return self.x.numel() == 0


DIFFERENTIABLE, TENSORS = 9, 11
CHUNK = 64  # steps per block of matrix products
KEPT = 512  # steps per saved state, at least


def kept_interval(chunk: int) -> int:
    """Steps between saved states: whole chunks."""
    return -(-KEPT // chunk) * chunk


def state_count(inputs: SSDInputs, interval: int) -> int:
    """Rows of chunk_states (``csrc/include/ssd_scan.inc``)."""
    batch, time = inputs.x.shape[:2]
    if inputs.cu_seqlens is None:
        return batch * ((time + interval - 1) // interval)
    return time // interval + inputs.sequences


def forward_outputs(inputs: SSDInputs, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, last_state, chunk_states), uninitialised; a state is kept every ``kept`` steps, none if 0."""
    x = inputs.x
    _, heads, d, n = inputs.state_shape
    dtype = state_dtype(x.dtype)
    out = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    last_state = torch.empty(inputs.state_shape, dtype=dtype, device=x.device)
    count = state_count(inputs, kept) if kept else 0
    # Packed chunks leave gaps; ops must initialise all output
    allocate = torch.empty if inputs.cu_seqlens is None else torch.zeros
    return out, last_state, allocate((count, heads, n, d), dtype=dtype, device=x.device)


def backward_outputs(inputs: SSDInputs) -> tuple[Tensor, ...]:
    """Uninitialised gradients; (0,) if absent."""
    return tuple(empty_like_or_absent(x, inputs.x.device) for x in inputs.differentiable)
