"""Checks and canonicalises step arguments."""

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    common_dtype,
    require_device,
    require_dtype,
    require_float,
    require_reset,
    require_shape,
    state_dtype,
)
from wmkernels.selective_step.meta import StepInputs

OP = "selective_step"
UPDATE = "selective_state_update"


def canonical_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    reset: Tensor | None,
    delta_softplus: bool,
) -> StepInputs:
    """Inputs of ``selective_step``; activations of unlike dtypes come in the state dtype."""
    B, C = _require_step(OP, state, u, delta, A, B, C, D, z, delta_bias)
    require_shape(OP, "state", state, ("batch", "channels", "state"), (*u.shape, A.shape[1]), "u and A")
    dtype = state_dtype(u.dtype)
    require_reset(OP, reset, ("batch",), u.shape[:1], u, "u")
    D, delta_bias = (None if x is None else x.to(dtype) for x in (D, delta_bias))
    u, delta, B, C, z = common_dtype((u, delta, B, C, z), u)  # type: ignore[assignment]
    return StepInputs(state.to(dtype), u, delta, A.to(dtype), B, C, D, z, delta_bias, reset, delta_softplus)


def canonical_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Inputs of ``selective_state_update``; activations of unlike dtypes come in the state dtype."""
    B, C = _require_step(UPDATE, state, x, dt, A, B, C, D, z, dt_bias)
    dtype = state_dtype(x.dtype)
    if x.dtype == torch.float64:  # it cannot hold the new state
        require_dtype(UPDATE, "state", state, (torch.float64,), "beside x of torch.float64")
    rows = x.shape[0] if state_batch_indices is None or state.dim() != 3 else state.shape[0]
    require_shape(UPDATE, "state", state, ("batch", "channels", "state"), (rows, x.shape[1], A.shape[1]), "x and A")
    if state_batch_indices is not None:
        require_device(UPDATE, "state_batch_indices", state_batch_indices, x.device, "x")
        require_dtype(UPDATE, "state_batch_indices", state_batch_indices, (torch.int64, torch.int32), "")
        require_shape(UPDATE, "state_batch_indices", state_batch_indices, ("batch",), x.shape[:1], "x")
        state_batch_indices = state_batch_indices.to(torch.int64)
    D, dt_bias = (None if v is None else v.to(dtype) for v in (D, dt_bias))
    x, dt, B, C, z = common_dtype((x, dt, B, C, z), x)  # type: ignore[assignment]
    return state, x, dt, A.to(dtype), B, C, D, z, dt_bias, state_batch_indices


def require_heads(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[int, int]:
    """(heads, headdim); raises ValueError for other shapes."""
    _, heads, headdim, _ = state.shape
    expected = {"x": (x, 3), "dt": (dt, 3), "A": (A, 3), "D": (D, 2), "z": (z, 3), "dt_bias": (dt_bias, 2)}
    for name, (tensor, rank) in expected.items():
        if tensor is None:
            continue
        start = 1 if name in ("x", "dt", "z") else 0
        if tensor.dim() != rank or tensor.shape[start] != heads or tensor.shape[start + 1] != headdim:
            wanted = (
                f"(batch, heads={heads}, headdim={headdim})" if start else f"(heads={heads}, headdim={headdim}, ...)"
            )
            raise ValueError(f"{UPDATE}: {name} has shape {tuple(tensor.shape)}, expected {wanted} to match state")
    return heads, headdim


def _require_step(
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
    """B and C as (batch, groups, state)."""
    u_name, delta_name, bias_name = ("u", "delta", "delta_bias") if op == OP else ("x", "dt", "dt_bias")
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
            require_float(op, name, optional, u, u_name)
    for name, optional in (("A", A), ("D", D), (bias_name, delta_bias)):
        if optional is not None:
            require_float(op, name, optional, u, u_name)
            if optional is not A:
                require_shape(op, name, optional, ("channels",), (channels,), u_name)
    require_float(op, "state", state, u, u_name)
    projections = []
    for name, x in (("B", B), ("C", C)):
        require_float(op, name, x, u, u_name)
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
