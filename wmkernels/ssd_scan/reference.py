"""The SSD scan as a loop: the specification.

Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, equation 1 with a scalar decay), one head, a state h of d x n numbers:

    step_t = softplus(dt_t + dt_bias), within dt_limit
    h_t    = exp(step_t A) h_{t-1} + step_t x_t B_t^T
    y_t    = h_t C_t + D x_t
    out_t  = y_t silu(z_t)

Mamba-3 replaces the input's rule and turns the state (``angle``, ``trapezoid``; exponential-trapezoidal discretisation
and data-dependent rotation):

    h_t = exp(step_t A) (h_{t-1} + (1 - trapezoid_t) step_t x_{t-1} B_{t-1}^T) + trapezoid_t step_t x_t B_t^T

with adjacent pairs of B_t and C_t turned by phase_t = phase_{t-1} + step_t angle_t. So a pair of the state is a complex
number with the decay exp(step_t (A - i angle_t)), seen in a frame that turns with it.

A reset drops the state, the phase and the previous step. Without a state before it, a step decays nothing: neither at a
reset nor at the start of a sequence without an initial state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.packed import by_sequence
from wmkernels.ssd_scan.meta import SSDArguments, SSDState


def ssd_scan_reference(arguments: SSDArguments) -> tuple[Tensor, SSDState]:
    """(out, last state)."""
    if arguments.cu_seqlens is not None:
        per_step = arguments.A.dim() > 1
        timed = ("x", "dt", *(["A"] if per_step else []), "B", "C", "z", "angle", "trapezoid", "reset")
        firsts = ("initial_state", "phase", "previous_B", "previous_x")
        return by_sequence("ssd_scan", ssd_scan_reference, arguments, timed, firsts, 1)
    x, dt, A, B, C, D, z, _, angle, trapezoid, h, phase, last_B, last_x, reset = arguments[:15]
    batch, time, heads, d = x.shape
    dtype = state_dtype(x.dtype)
    starts = h is None
    if h is None:
        h = torch.zeros((batch, heads, d, B.shape[3]), dtype=dtype, device=x.device)
    if angle is not None and phase is None:
        phase = torch.zeros((batch, heads, angle.shape[3]), dtype=torch.float64, device=x.device)
    if last_x is None or last_B is None:
        last_B, last_x = (torch.zeros((batch, *v.shape[2:]), dtype=dtype, device=x.device) for v in (B, x))
    turned_B = _turned(last_B, phase, heads)  # (batch, heads, n)
    outputs = []
    for t in range(time):
        x_t, C_t = x[:, t].to(dtype), C[:, t].to(dtype)  # (batch, heads, d), (batch, groups, n)
        step = _step(dt[:, t], arguments)  # (batch, heads)
        A_t = A if A.dim() == 1 else A[:, t]
        dropped = None if reset is None else reset[:, t, None]  # (batch, 1)
        decaying = step
        if dropped is not None:
            # A, too: an infinite one times the exponent's gradient of zero would be NaN
            decaying, A_t = step.masked_fill(dropped, 0), torch.where(dropped, 0, A_t)
            h = h.masked_fill(dropped[..., None, None], 0)
            phase = None if phase is None else phase.masked_fill(dropped[..., None], 0)
            last_x, turned_B = (v.masked_fill(dropped[..., None], 0) for v in (last_x, turned_B))
        if phase is not None and angle is not None:
            phase = phase + step.double()[..., None] * angle[:, t].double()
        if trapezoid is not None:
            earlier = (1 - trapezoid[:, t]) * step
            h = h + _input(earlier if dropped is None else earlier.masked_fill(dropped, 0), last_x, turned_B)
        if t or not starts:
            h = torch.exp(decaying * A_t)[..., None, None] * h
        last_x, last_B = x_t, B[:, t].to(dtype)
        turned_B = _turned(last_B, phase, heads)
        h = h + _input(step if trapezoid is None else trapezoid[:, t] * step, x_t, turned_B)
        y = (h * _turned(C_t, phase, heads)[:, :, None]).sum(-1)
        if D is not None:
            y = y + D * x_t
        if z is not None:
            y = y * F.silu(z[:, t].to(dtype))
        outputs.append(y)
    out = torch.stack(outputs, 1).to(x.dtype) if outputs else x.clone()
    if phase is not None:
        phase = within_a_turn(phase)
    if trapezoid is None:
        return out, SSDState(h.clone() if not outputs else h, phase)
    return out, SSDState(h.clone() if not outputs else h, phase, last_B.clone(), last_x.clone())


def _step(dt: Tensor, arguments: SSDArguments) -> Tensor:
    step = dt if arguments.dt_bias is None else dt + arguments.dt_bias
    if arguments.dt_softplus:
        step = F.softplus(step)
    return step.clamp(*arguments.dt_limit)


def _input(weight: Tensor, x: Tensor, B: Tensor) -> Tensor:
    """(batch, heads, d, n)."""
    return (weight[..., None] * x)[..., None] * B[..., None, :]


def _turned(vectors: Tensor, phase: Tensor | None, heads: int) -> Tensor:
    """(batch, groups, n) -> (batch, heads, n), the first pairs turned by ``phase`` (batch, heads, pairs)."""
    vectors = vectors.repeat_interleave(heads // vectors.shape[1], 1)
    if phase is None:
        return vectors
    cos, sin = phase.cos().to(vectors.dtype), phase.sin().to(vectors.dtype)
    turning, rest = vectors.split([2 * phase.shape[-1], vectors.shape[-1] - 2 * phase.shape[-1]], -1)
    real, imaginary = turning.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([cos * real - sin * imaginary, sin * real + cos * imaginary], -1)
    return torch.cat([turned.flatten(-2), rest], -1)


def within_a_turn(phase: Tensor) -> Tensor:
    """The phase within [-pi, pi], with a derivative of 1."""
    return phase - (2 * torch.pi) * (phase.detach() / (2 * torch.pi)).round()
