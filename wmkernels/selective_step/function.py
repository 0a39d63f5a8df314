"""One step of the selective scan: ``selective_step`` is differentiable, ``selective_state_update`` works in place."""

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    require_device,
    require_dtype,
    require_reset,
    require_shape,
    require_tensor,
    state_dtype,
)
from wmkernels.dispatch import choose, kernels
from wmkernels.registration import can_bypass_dispatcher, needs_autograd
from wmkernels.selective_scan.reference import per_channel, selective_step_reference
from wmkernels.selective_step.autograd import OP, UPDATE, SelectiveStep


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
    """One differentiable step of ``selective_scan``: the same numbers as the scan over one step of time.

    Args:
        state: (batch, channels, state), float32 or the dtype of ``u``.
        u: (batch, channels), as are ``delta`` and ``z``; float32, float64, bfloat16 or float16.
        delta: step size before bias and softplus.
        A: (channels, state); parameters may be float32 beside 16-bit activations.
        B: (batch, state) or (batch, groups, state).
        C: likewise.
        D: skip connection, (channels,).
        z: gate before silu.
        delta_bias: (channels,).
        delta_softplus: pass ``delta + delta_bias`` through softplus.
        reset: bool (batch,); where true the state is forgotten before the step.
        backend: as for ``selective_scan``.

    Returns:
        ``(out, new_state)``: (batch, channels) in the dtype of ``u``, and (batch, channels, state) in float32 (float64
        for float64 inputs). ``state`` itself is not changed.

    Raises:
        ValueError: a shape, a device or a backend that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch, wmkernels
        >>> state = torch.zeros(1, 8, 4)
        >>> u, delta, A, B = torch.randn(1, 8), torch.rand(1, 8), -torch.rand(8, 4), torch.randn(1, 4)
        >>> out, state = wmkernels.selective_step(state, u, delta, A, B, B)
        >>> out.shape, state.shape
        (torch.Size([1, 8]), torch.Size([1, 8, 4]))
    """
    tensors = (state, u, delta, A, B, C, D, z, delta_bias, reset)
    if _is_quick(tensors, backend):
        out, new_state = _empty(u), _empty(state)
        if kernels(OP, "cpu").step_at_once((state, new_state, out, *tensors[1:]), delta_softplus):
            return out, new_state
    B, C = _check_step(OP, state, u, delta, A, B, C, D, z, delta_bias)
    require_shape(OP, "state", state, ("batch", "channels", "state"), (*u.shape, A.shape[1]), "u and A")
    dtype = state_dtype(u.dtype)
    require_dtype(OP, "state", state, (u.dtype, dtype), f"beside u of {u.dtype}")
    state, A = state.to(dtype), A.to(dtype)
    D = None if D is None else D.to(dtype)
    delta_bias = None if delta_bias is None else delta_bias.to(dtype)
    require_reset(OP, reset, ("batch",), u.shape[:1], u, "u")
    chosen = choose(OP, u.device, backend, A.shape[1])
    tensors = (state, u, delta, A, B, C, D, z, delta_bias, reset)
    if chosen == "reference":
        wide_B, wide_C = per_channel(B, u.shape[1]), per_channel(C, u.shape[1])
        out, state = selective_step_reference(
            state, u, delta, A, wide_B, wide_C, D, z, delta_bias, delta_softplus, reset
        )
        return out.to(u.dtype), state
    if needs_autograd(tensors):
        return SelectiveStep.apply(*tensors, delta_softplus, chosen)
    return torch.ops.wmkernels.selective_step_forward(*tensors, delta_softplus, chosen)


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
    """One step that updates ``state`` in place, without gradient: for decoding and acting.

    The signature is the one of mamba_ssm's function of this name, so code written for it runs unchanged.

    Args:
        state: (batch, channels, state), or (batch, heads, headdim, state), then every (channels) below is
            (heads, headdim) too. float32, or the dtype of ``x``. With ``state_batch_indices``, a cache with any number
            of rows.
        x: (batch, channels); ``dt`` and ``z`` likewise.
        dt: step size before bias and softplus.
        A: (channels, state).
        B: (batch, state) or (batch, groups, state).
        C: likewise.
        D: (channels,).
        z: gate before silu.
        dt_bias: (channels,).
        dt_softplus: pass ``dt + dt_bias`` through softplus.
        state_batch_indices: int (batch,), the row of ``state`` of each batch element, each named once at most; a row
            below 0 leaves every state alone and gives zeros.

    Returns:
        (batch, channels) or (batch, heads, headdim), in the dtype of ``x``.

    Raises:
        ValueError: a shape, a device or an index that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: an input requires grad; use ``selective_step``.

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
    if isinstance(state, Tensor) and state.dim() == 4:
        return _update_heads(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    if state_batch_indices is None and _is_quick(tensors, None):
        out = _empty(x)
        if kernels(OP, "cpu").step_at_once((state, state, out, *tensors[1:]), dt_softplus):
            torch.autograd.graph.increment_version(state)
            return out
    B, C = _check_step(UPDATE, state, x, dt, A, B, C, D, z, dt_bias)
    dtype = state_dtype(x.dtype)
    require_dtype(UPDATE, "state", state, (x.dtype, dtype), f"beside x of {x.dtype}")
    rows = x.shape[0] if state_batch_indices is None else state.shape[0]
    require_shape(UPDATE, "state", state, ("batch", "channels", "state"), (rows, x.shape[1], A.shape[1]), "x and A")
    A = A.to(dtype)
    D = None if D is None else D.to(dtype)
    dt_bias = None if dt_bias is None else dt_bias.to(dtype)
    if state_batch_indices is not None:
        require_device(UPDATE, "state_batch_indices", state_batch_indices, x.device, "x")
        require_dtype(UPDATE, "state_batch_indices", state_batch_indices, (torch.int64, torch.int32), "")
        require_shape(UPDATE, "state_batch_indices", state_batch_indices, ("batch",), x.shape[:1], "x")
        state_batch_indices = state_batch_indices.to(torch.int64)
    chosen = choose(OP, x.device, None, A.shape[1])
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    return torch.ops.wmkernels.selective_state_update_(*tensors, dt_softplus, chosen)


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
    """The (batch, heads, headdim, state) form: heads and headdim together are the channels."""
    _, heads, headdim, _ = state.shape
    expected = {"x": (x, 3), "dt": (dt, 3), "A": (A, 3), "D": (D, 2), "z": (z, 3), "dt_bias": (dt_bias, 2)}
    for name, (tensor, rank) in expected.items():
        if tensor is None:
            continue
        start = 1 if name in ("x", "dt", "z") else 0
        if tensor.dim() != rank or tuple(tensor.shape[start : start + 2]) != (heads, headdim):
            wanted = (
                f"(batch, heads={heads}, headdim={headdim})" if start else f"(heads={heads}, headdim={headdim}, ...)"
            )
            raise ValueError(f"{UPDATE}: {name} has shape {tuple(tensor.shape)}, expected {wanted} to match state")
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
    if flat.data_ptr() != state.data_ptr():
        state.copy_(flat.view_as(state))
    return out.unflatten(1, (heads, headdim))


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)  # half the time of ``new_empty``


def _is_quick(tensors: tuple[Tensor | None, ...], backend: str | None) -> bool:
    """Whether a step may be tried in one call of the extension, which checks the tensors itself."""
    u = tensors[1]
    return (
        can_bypass_dispatcher(tensors) and isinstance(u, Tensor) and u.is_cpu and choose(OP, u.device, backend) == "cpu"
    )


def _check_step(
    op: str,
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Raises unless all fit; answers B and C as (batch, groups, state)."""
    u_name, delta_name, bias_name = ("u", "delta", "delta_bias") if op == OP else ("x", "dt", "dt_bias")
    required = (("state", state), (u_name, u), (delta_name, delta), ("A", A), ("B", B), ("C", C))
    for name, x in required:
        require_tensor(op, name, x)
    require_dtype(op, u_name, u, FLOATS, "")
    if u.dim() != 2:
        raise ValueError(f"{op}: {u_name} has shape {tuple(u.shape)}, expected (batch, channels)")
    if A.is_complex():
        raise TypeError(f"{op}: A is complex ({A.dtype}), expected a real A")
    batch, channels = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(f"{op}: A has shape {tuple(A.shape)}, expected (channels={channels}, state) to match {u_name}")
    size = A.shape[1]
    for name, optional in ((delta_name, delta), ("z", z)):
        if optional is not None:
            require_shape(op, name, optional, ("batch", "channels"), (batch, channels), u_name)
            require_dtype(op, name, optional, (u.dtype,), f"as {u_name} has")
            require_device(op, name, optional, u.device, u_name)
    for name, optional in (("A", A), ("D", D), (bias_name, delta_bias)):
        if optional is not None:
            require_dtype(op, name, optional, (u.dtype, state_dtype(u.dtype)), f"beside {u_name} of {u.dtype}")
            require_device(op, name, optional, u.device, u_name)
            if optional is not A:
                require_shape(op, name, optional, ("channels",), (channels,), u_name)
    require_device(op, "state", state, u.device, u_name)
    projections = []
    for name, x in (("B", B), ("C", C)):
        require_dtype(op, name, x, (u.dtype,), f"as {u_name} has")
        require_device(op, name, x, u.device, u_name)
        if x.dim() == 2:
            require_shape(op, name, x, ("batch", "state"), (batch, size), f"{u_name} and A")
            x = x.unsqueeze(1)
        groups = x.shape[1] if x.dim() == 3 else 1
        require_shape(op, name, x, ("batch", "groups", "state"), (batch, groups, size), f"{u_name} and A")
        if groups < 1 or channels % groups:
            raise ValueError(f"{op}: {name} has {groups} groups, expected a divisor of channels={channels}")
        projections.append(x)
    wide_B, wide_C = projections
    if wide_B.shape[1] != wide_C.shape[1]:
        if 1 not in (wide_B.shape[1], wide_C.shape[1]):
            raise ValueError(
                f"{op}: B has {wide_B.shape[1]} groups and C has {wide_C.shape[1]}, expected as many in both"
            )
        groups = max(wide_B.shape[1], wide_C.shape[1])
        wide_B, wide_C = wide_B.expand(-1, groups, -1), wide_C.expand(-1, groups, -1)
    return wide_B, wide_C
