"""The selective scan in plain PyTorch, a loop over time: the specification that every kernel is held against.

Mamba's S6 (Gu & Dao 2023, algorithm 2), for one channel with N states:

    step_t = softplus(delta_t + delta_bias)
    h_t    = exp(step_t A) h_{t-1} + step_t u_t B_t        # N numbers
    y_t    = C_t · h_t + D u_t
    out_t  = y_t silu(z_t)
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import require_sequences, state_dtype


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, last_state) for u, delta, z (batch, channels, time) and A (channels, state).

    B and C are (batch, groups, state, time) or, where they do not vary, (channels, state). States are in float32, in
    float64 for float64 inputs.
    """
    if cu_seqlens is not None:
        return _packed(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, cu_seqlens)
    batch, channels, time = u.shape
    dtype = state_dtype(u.dtype)
    if initial_state is None:
        state = torch.zeros((batch, channels, A.shape[1]), dtype=dtype, device=u.device)
    else:
        state = initial_state.to(dtype)
    resets = [None] * time if reset is None else reset.unbind(1)
    steps_B, steps_C = _each_step(B, batch, channels, time), _each_step(C, batch, channels, time)
    outputs = []
    for u_t, delta_t, B_t, C_t, reset_t in zip(u.unbind(2), delta.unbind(2), steps_B, steps_C, resets, strict=True):
        out, state = selective_step_reference(
            state, u_t, delta_t, A, B_t, C_t, D, None, delta_bias, delta_softplus, reset_t
        )
        outputs.append(out)
    y = torch.stack(outputs, 2) if outputs else u.new_zeros(u.shape, dtype=dtype)  # (batch, channels, time)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def selective_step_reference(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, new_state) of one step, in the state's dtype: u, delta, z (batch, channels), B, C (batch, channels, state).

    A reset selects: it multiplies neither the old state nor its decay, so NaN and infinity stay behind it.
    """
    dtype = state_dtype(u.dtype)
    u, step = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias
    if delta_softplus:
        step = F.softplus(step)
    exponent = step[..., None] * A  # (batch, channels, state)
    if reset is not None:
        forget = reset[:, None, None]
        exponent = exponent.masked_fill(forget, 0)
        state = state.masked_fill(forget, 0)
    state = torch.exp(exponent) * state + (step * u)[..., None] * B.to(dtype)
    y = (state * C.to(dtype)).sum(-1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y, state


def per_channel(x: Tensor, channels: int) -> Tensor:
    """(batch, groups, state) -> (batch, channels, state): channel c reads group c // (channels // groups)."""
    batch, groups, state = x.shape
    return x[:, :, None].expand(batch, groups, channels // groups, state).reshape(batch, channels, state)


def _each_step(x: Tensor, batch: int, channels: int, time: int) -> list[Tensor]:
    """B or C of every step, each (batch, channels, state) or broadcast to it."""
    if x.dim() == 2:
        return [x[None]] * time
    if x.shape[1] == 1:
        return list(x.unbind(3))
    return [per_channel(x_t, channels) for x_t in x.unbind(3)]


def _packed(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sequences one by one."""
    require_sequences("selective_scan", cu_seqlens, u.shape[2])
    outputs, states = [], []
    bounds = cu_seqlens.tolist()
    for index, (start, end) in enumerate(pairwise(bounds)):

        def piece(x: Tensor | None, start: int = start, end: int = end) -> Tensor | None:
            return x if x is None or x.dim() == 2 else x[..., start:end]

        out, state = selective_scan_reference(
            piece(u),  # type: ignore[arg-type]
            piece(delta),  # type: ignore[arg-type]
            A,
            piece(B),  # type: ignore[arg-type]
            piece(C),  # type: ignore[arg-type]
            D,
            piece(z),
            delta_bias,
            delta_softplus,
            None if initial_state is None else initial_state[index : index + 1],
            None if reset is None else reset[:, start:end],
        )
        outputs.append(out)
        states.append(state)
    return torch.cat(outputs, 2), torch.cat(states, 0)
