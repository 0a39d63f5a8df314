"""The public SSD scan and its step."""

import math

import torch
from torch import Tensor

from wmkernels.checks import Signature, is_autocast, state_dtype
from wmkernels.dispatch import PYTORCH_BACKENDS, choose
from wmkernels.modes import needs_autograd, requires_pytorch
from wmkernels.registration import differentiably
from wmkernels.ssd_scan.autograd import OP, SSDScan
from wmkernels.ssd_scan.canonical_form import canonical_form, last_state
from wmkernels.ssd_scan.chunked import ssd_scan_chunked
from wmkernels.ssd_scan.meta import CHUNK, SSDArguments, SSDState, kept_interval
from wmkernels.ssd_scan.reference import ssd_scan_reference
from wmkernels.ssd_scan.validation import STEP, canonical, checked_chunk

_NO_LIMIT = (0.0, math.inf)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_state: Tensor | SSDState | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    angle: Tensor | None = None,
    trapezoid: Tensor | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | SSDState]:
    """Mamba-2's scan (SSD; Dao & Gu 2024, arXiv 2405.21060), one decay per head, differentiable.

    ``h_t = exp(step_t A) h_{t-1} + step_t x_t B_t^T`` and ``out_t = (h_t C_t + D x_t) silu(z_t)`` per head, with
    ``step_t = softplus(dt_t + dt_bias)``, or without softplus, clamped to ``dt_limit``.

    With ``angle`` and ``trapezoid``, Mamba-3's: ``angle`` turns adjacent pairs of the state, which are then complex
    numbers with the decay ``exp(step_t (A - i angle_t))``; with ``trapezoid``, ``h_t = exp(step_t A) (h_{t-1} + (1 -
    trapezoid_t) step_t x_{t-1} B_{t-1}^T) + trapezoid_t step_t x_t B_t^T``.

    Time is the second dimension, as in the published function: heads and channels of a step lie together in memory,
    and there is no other order to choose with ``channel_last``.

    Args:
        x: (batch, time, heads, d), any strides; float32, float64, bfloat16 or float16. The others may have any of these
            dtypes that float32 (float64 for float64) holds. Arithmetic is in float32 (float64).
        dt: step size, (batch, time, heads).
        A: negative to decay, (heads,), or (batch, time, heads).
        B: (batch, time, groups, n); head h reads group ``h // (heads // groups)``.
        C: as ``B``.
        D: skip connection, (heads,) or (heads, d).
        z: gate, as ``x``.
        dt_bias: (heads,).
        dt_softplus: apply softplus to ``dt + dt_bias``.
        dt_limit: lowest and highest step size; the default only cuts negative ones to 0.
        initial_state: (batch, heads, d, n), or (sequences, ...) with ``cu_seqlens``; zeros if None. With ``angle`` or
            ``trapezoid`` an ``SSDState``.
        reset: bool (batch, time); true drops the previous state, phase and step, NaN included.
        cu_seqlens: int32 or int64 (sequences + 1,), nondecreasing from 0 to time: packed sequences, batch 1. Not
            checked on a GPU.
        chunk: steps per block of matrix products: memory and speed, the same result up to rounding. None chooses.
        angle: radians per unit of step size, (batch, time, heads or 1, pairs), for the first ``2 * pairs`` of n; summed
            in float64.
        trapezoid: weight of a step's own end in [0, 1], (batch, time, heads); 1 is Mamba-2's rule.
        return_last_state: also return the last state.
        backend: as for ``selective_scan``.

    Returns:
        The output, as ``x``; with ``return_last_state`` also the last state, as ``initial_state``, float32 (float64
        for float64).

    Raises:
        ValueError: invalid shape, device, backend, chunk, dt_limit or cu_seqlens.
        TypeError: invalid dtype, chunk, dt_limit or state.

    Example:
        >>> import torch, wmkernels
        >>> x, dt, A = torch.randn(2, 100, 4, 8), torch.rand(2, 100, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 100, 1, 16), torch.randn(2, 100, 1, 16)
        >>> out, state = wmkernels.ssd_scan(x, dt, A, B, C, return_last_state=True)
        >>> out.shape, state.shape
        (torch.Size([2, 100, 4, 8]), torch.Size([2, 4, 8, 16]))
    """
    _SIGNATURE.require(
        *(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, reset, cu_seqlens, chunk, angle),
        *(trapezoid, return_last_state, backend),
    )
    steps = checked_chunk(chunk)
    arguments = canonical(
        *(OP, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, reset, cu_seqlens),
        *(angle, trapezoid),
    )
    out, state = _run(arguments, x, steps, backend, OP)
    if not return_last_state:
        return out
    return out, state.state if arguments.is_plain else state


def ssd_step(
    state: Tensor | SSDState,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    reset: Tensor | None = None,
    angle: Tensor | None = None,
    trapezoid: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | SSDState]:
    """One differentiable step of ``ssd_scan``; other arguments and errors are those of the scan.

    Args:
        state: (batch, heads, d, n), an ``SSDState`` with ``angle`` or ``trapezoid``; unchanged.
        x: (batch, heads, d).
        dt: step size, (batch, heads).
        A: (heads,), read once per head, or (batch, heads).
        B: (batch, groups, n).
        C: as ``B``.
        D: skip connection, (heads,) or (heads, d).
        z: gate, as ``x``.
        dt_bias: (heads,).
        dt_softplus: apply softplus to ``dt + dt_bias``.
        dt_limit: lowest and highest step size.
        reset: bool (batch,); true drops ``state``.
        angle: (batch, heads or 1, pairs).
        trapezoid: (batch, heads).
        backend: as for ``selective_scan``.

    Returns:
        The output, as ``x``, and the new state, float32 (float64 for float64).

    Raises:
        ValueError: invalid shape, device, backend or dt_limit.
        TypeError: invalid dtype, dt_limit or state.

    Example:
        >>> import torch, wmkernels
        >>> state, x, dt, A = torch.zeros(1, 2, 4, 8), torch.randn(1, 2, 4), torch.rand(1, 2), -torch.rand(2)
        >>> B = torch.randn(1, 1, 8)
        >>> out, state = wmkernels.ssd_step(state, x, dt, A, B, B)
        >>> out.shape
        torch.Size([1, 2, 4])
    """
    _STEP_SIGNATURE.require(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, reset, angle, trapezoid, backend
    )
    if state is None:
        raise TypeError(f"{STEP}: state is None, expected a torch.Tensor or an SSDState")
    arguments = canonical(
        STEP, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, reset, None, angle, trapezoid
    )
    out, new_state = _run(arguments, x, 1, backend, STEP)
    return out.squeeze(1), new_state.state if arguments.is_plain else new_state


def _run(
    arguments: SSDArguments, x: Tensor, chunk: int | None, backend: str | None, function: str
) -> tuple[Tensor, SSDState]:
    device = x.device
    chosen = choose(OP, device, backend, function=function, pytorch_for=requires_pytorch(arguments.differentiable))
    if chosen == "reference":
        out, state = ssd_scan_reference(arguments)
    elif arguments.x.shape[1] == 0:
        out, state = _without_steps(arguments)
    else:
        inputs, phases = canonical_form(arguments, chosen if chosen in PYTORCH_BACKENDS else None)
        # without a chunk no size of the call is read: the graph of a compiled one holds for all lengths
        steps = CHUNK if chunk is None else min(chunk, arguments.x.shape[1])
        if chosen == "chunked":
            out, last = ssd_scan_chunked(inputs, chunk)
        elif needs_autograd(inputs.differentiable):
            out, last, _ = differentiably(SSDScan, *inputs, steps, kept_interval(steps), chosen)
        else:
            out, last, _ = torch.ops.wmkernels.ssd_scan_forward(*inputs, steps, 0, chosen)
        state = last_state(arguments, last, phases)
    if out.dtype != x.dtype and not is_autocast(device):  # x was widened beside others
        out = out.to(x.dtype)
    return out, state


def _without_steps(arguments: SSDArguments) -> tuple[Tensor, SSDState]:
    """What the chunked form and kernels make of no step: a copy of the state."""
    heads, d = arguments.x.shape[2:]
    shape = (arguments.sequences, heads, d, arguments.B.shape[3])
    held, given = state_dtype(arguments.x.dtype), arguments.initial_state
    state = arguments.x.new_zeros(shape, dtype=held) if given is None else given.clone()
    return arguments.x.clone(), last_state(arguments, state, None)


_SIGNATURE, _STEP_SIGNATURE = Signature(ssd_scan), Signature(ssd_step)
