"""The selective scan as a loop: the specification.

Mamba's S6 (Gu & Dao 2023, algorithm 2), one channel, N states:

    step_t = softplus(delta_t + delta_bias)
    h_t    = exp(step_t A) h_{t-1} + step_t u_t B_t        # N numbers
    y_t    = C_t · h_t + D u_t
    out_t  = y_t silu(z_t)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.packed import by_sequence
from wmkernels.selective_scan.meta import ScanInputs
from wmkernels.selective_step.meta import StepInputs
from wmkernels.selective_step.reference import per_channel, selective_step_reference


def selective_scan_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    if inputs.cu_seqlens is not None:
        timed = ("u", "delta", *(name for name in "BC" if getattr(inputs, name).dim() > 2), "z", "reset")
        return by_sequence("selective_scan", selective_scan_reference, inputs, timed, ("initial_state",), -1)
    u, delta, A, B, C, D, z, delta_bias, state, reset = inputs[:10]
    batch, channels, time = u.shape
    dtype = state_dtype(u.dtype)
    if state is None:
        state = torch.zeros((batch, *A.shape), dtype=dtype, device=u.device)
    state = state.to(dtype)
    resets = [None] * time if reset is None else reset.unbind(1)
    steps_B, steps_C = _each_step(B, channels, time), _each_step(C, channels, time)
    outputs = []
    for u_t, delta_t, B_t, C_t, reset_t in zip(u.unbind(2), delta.unbind(2), steps_B, steps_C, resets, strict=True):
        step = StepInputs(state, u_t, delta_t, A, B_t, C_t, D, None, delta_bias, reset_t, inputs.delta_softplus)
        out, state = selective_step_reference(step)
        outputs.append(out)
    if not outputs:
        return u.clone(), state.clone()
    y = torch.stack(outputs, 2)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def _each_step(x: Tensor, channels: int, time: int) -> list[Tensor]:
    """Broadcastable to (batch, channels, state)."""
    if x.dim() == 2:
        return [x[None]] * time
    return [x_t if x.shape[1] == 1 else per_channel(x_t, channels) for x_t in x.unbind(3)]
