"""One selective scan step in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.selective_step.meta import StepInputs


def selective_step_reference(inputs: StepInputs) -> tuple[Tensor, Tensor]:
    """(out, new_state); B and C broadcast to (batch, channels, state).

    ``step = softplus(delta + delta_bias)``, ``h = exp(step A) h + step u B``, ``out = (C · h + D u) silu(z)``.
    """
    state, u, delta, A, B, C, D, z, delta_bias, reset, delta_softplus = inputs
    dtype = state_dtype(u.dtype)
    u, step = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias
    if delta_softplus:
        step = F.softplus(step)
    if reset is None:
        exponent = step[..., None] * A
    else:
        is_reset = reset[:, None, None]
        # A, too: an infinite one times the exponent's gradient of zero would be NaN
        exponent = (step[..., None] * torch.where(is_reset, 0, A)).masked_fill(is_reset, 0)
        state = state.masked_fill(is_reset, 0)
    state = torch.exp(exponent) * state + (step * u)[..., None] * B.to(dtype)
    y = (state * C.to(dtype)).sum(-1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y, state


def per_channel(x: Tensor, channels: int) -> Tensor:
    """(batch, groups, state) -> (batch, channels, state)."""
    batch, groups, state = x.shape
    return x[:, :, None].expand(batch, groups, channels // groups, state).reshape(batch, channels, state)
