"""Public selective scan steps."""

import torch
from torch import Tensor

from wmkernels.checks import DENSE, Signature, require_disjoint, require_writable
from wmkernels.dispatch import PYTORCH_BACKENDS, choose, kernels
from wmkernels.modes import FORWARD_MODE, can_bypass_dispatcher, has_tangent, needs_autograd, requires_pytorch
from wmkernels.registration import differentiably
from wmkernels.selective_step.autograd import OP, UPDATE, SelectiveStep, update_in_pytorch
from wmkernels.selective_step.meta import StepInputs
from wmkernels.selective_step.reference import per_channel, selective_step_reference
from wmkernels.selective_step.validation import canonical_step, canonical_update, require_heads

_UPDATE_READS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state_batch_indices")
_FAST_PATH_DTYPES = (torch.float32, torch.float64)


def selective_step(
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
    *,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of ``selective_scan``, differentiable.

    Args:
        state: (batch, channels, state), float32 or as ``u``; unchanged.
        u: (batch, channels); float32, float64, bfloat16 or float16.
        delta: step size, as ``u``.
        A: (channels, state). Dtypes may differ as for ``selective_scan``.
        B: (batch, state) or (batch, groups, state).
        C: as ``B``.
        D: skip connection, (channels,).
        z: gate, as ``u``.
        delta_bias: (channels,).
        delta_softplus: as for ``selective_scan``.
        reset: bool (batch,); true drops ``state``.
        backend: as for ``selective_scan``.

    Returns:
        The output, as ``u``, and new state, float32 (float64 for float64).

    Raises:
        ValueError: invalid shape, device or backend.
        TypeError: invalid dtype.

    Example:
        >>> import torch, wmkernels
        >>> state = torch.zeros(1, 8, 4)
        >>> u, delta, A, B = torch.randn(1, 8), torch.rand(1, 8), -torch.rand(8, 4), torch.randn(1, 4)
        >>> out, state = wmkernels.selective_step(state, u, delta, A, B, B)
        >>> out.shape, state.shape
        (torch.Size([1, 8]), torch.Size([1, 8, 4]))
    """
    tensors = (state, u, delta, A, B, C, D, z, delta_bias, reset)
    if _may_use_fast_path(tensors, delta_softplus, backend):
        out, new_state = _empty(u), _empty(state)
        if kernels(OP, "cpu").step_fast_path((state, new_state, out, *tensors[1:]), delta_softplus):
            return out, new_state
    _SIGNATURE.require(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reset, backend)
    inputs = canonical_step(state, u, delta, A, B, C, D, z, delta_bias, reset, delta_softplus)
    chosen = choose(OP, u.device, backend, A.shape[1], pytorch_for=requires_pytorch(inputs.differentiable))
    if chosen in PYTORCH_BACKENDS:
        channels = u.shape[1]
        wide = inputs._replace(B=per_channel(inputs.B, channels), C=per_channel(inputs.C, channels))
        out, new_state = selective_step_reference(wide)
        return out.to(u.dtype), new_state
    if needs_autograd(inputs.differentiable):
        out, new_state = differentiably(SelectiveStep, *inputs, chosen)
    else:
        out, new_state = torch.ops.wmkernels.selective_step_forward(*inputs, chosen)
    return (out if out.dtype == u.dtype else out.to(u.dtype)), new_state


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step that updates ``state`` in place, without gradient; mamba_ssm's signature.

    Args:
        state: (batch, channels, state), float32 or 16 bits (float64 for float64); or (batch, heads, headdim, state),
            then (heads, headdim) replaces channels below. Any number of rows with ``state_batch_indices``.
        x: (batch, channels). Dtypes may differ as for ``selective_scan``.
        dt: step size, as ``x``.
        A: (channels, state).
        B: (batch, state) or (batch, groups, state).
        C: as ``B``.
        D: (channels,).
        z: gate, as ``x``.
        dt_bias: (channels,).
        dt_softplus: apply softplus to ``dt + dt_bias``.
        state_batch_indices: int (batch,), unique rows of ``state``; negative: no update, output 0.
            GPU kernels do not check the upper bound.

    Returns:
        The output, as ``x``.

    Raises:
        ValueError: invalid shape, device or index; a state that cannot be written or shares memory with an argument.
        TypeError: invalid dtype.
        RuntimeError: an input requires grad or is dual.

    Example:
        >>> import torch, wmkernels
        >>> state = torch.zeros(1, 8, 4)
        >>> x, dt, A, B = torch.randn(1, 8), torch.rand(1, 8), -torch.rand(8, 4), torch.randn(1, 4)
        >>> wmkernels.selective_state_update(state, x, dt, A, B, B).shape
        torch.Size([1, 8])
    """
    inputs = (state, x, dt, A, B, C, D, z, dt_bias)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise RuntimeError(f"{UPDATE}: it works in place, without gradient; use selective_step, or torch.no_grad()")
    if has_tangent(inputs):
        raise RuntimeError(
            f'{UPDATE}: it works in place, without {FORWARD_MODE}; use selective_step, with backend="reference" or none'
        )
    if isinstance(state, Tensor) and state.dim() == 4:
        _UPDATE_SIGNATURE.require(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
        require_writable(UPDATE, "state", state)
        return _update_heads(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    if state_batch_indices is None and _may_use_fast_path(tensors, dt_softplus, None) and not state.is_inference():
        out = _empty(x)
        if kernels(OP, "cpu").step_fast_path((state, state, out, *tensors[1:]), dt_softplus):
            torch.autograd.graph.increment_version(state)
            return out
    _UPDATE_SIGNATURE.require(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    canonical = canonical_update(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    require_writable(UPDATE, "state", state)
    require_disjoint(UPDATE, "state", state, dict(zip(_UPDATE_READS, canonical[1:], strict=True)))
    pytorch_for = requires_pytorch(())
    chosen = choose(OP, x.device, None, A.shape[1], UPDATE, pytorch_for)
    if pytorch_for:
        record = StepInputs._make((*canonical[:9], None, dt_softplus))
        out = update_in_pytorch(record, state, canonical[9])
    else:
        out = torch.ops.wmkernels.selective_state_update_(*canonical, dt_softplus, chosen)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def _update_heads(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> Tensor:
    heads, headdim = require_heads(state, x, dt, A, D, z, dt_bias)
    # Then ``flat`` is a view; a tracer has no addresses to compare.
    is_view = headdim == 1 or heads == 1 or state.stride(1) == headdim * state.stride(2)
    flat = state.flatten(1, 2)
    out = selective_state_update(
        flat,
        x.flatten(1, 2),
        dt.flatten(1, 2),
        A.flatten(0, 1),
        B,
        C,
        None if D is None else D.flatten(),
        None if z is None else z.flatten(1, 2),
        None if dt_bias is None else dt_bias.flatten(),
        dt_softplus,
        state_batch_indices,
    )
    if not is_view:
        state.copy_(flat.view_as(state))
    return out.unflatten(1, (heads, headdim))


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)  # twice as fast as ``new_empty``


def _may_use_fast_path(tensors: tuple[Tensor | None, ...], delta_softplus: bool, backend: str | None) -> bool:
    """Whether to try the extension's fast path, which takes one dtype for all tensors."""
    state, u, _, A, *_ = tensors
    return (
        isinstance(u, Tensor)
        and isinstance(state, Tensor)
        and u.layout is DENSE is state.layout
        and u.dtype in _FAST_PATH_DTYPES
        and u.is_cpu
        and type(delta_softplus) is bool
        and (backend is None or type(backend) is str)
        and can_bypass_dispatcher(tensors)
        and isinstance(A, Tensor)
        and A.dim() == 2
        and choose(OP, u.device, backend, A.shape[1]) == "cpu"
    )


_SIGNATURE, _UPDATE_SIGNATURE = Signature(selective_step), Signature(selective_state_update)
