"""Checks and canonicalises selective scan arguments."""

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    common_dtype,
    has_shape,
    is_autocast,
    promote_dtypes,
    require_dtype,
    require_float,
    require_packing,
    require_reset,
    require_shape,
    state_dtype,
)
from wmkernels.selective_scan.meta import ScanInputs

OP = "selective_scan"


def canonical(
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
    cu_seqlens: Tensor | None,
    channel_last: bool,
) -> ScanInputs:
    """Time last, varying B and C 4-D with equal groups, parameters in the state dtype. Raises ValueError, TypeError.

    Activations of unlike dtypes come in the state dtype.
    """
    require_dtype(OP, "u", u, FLOATS, "")
    if is_autocast(u.device):
        u, delta, z, B, C = _promote(u, delta, z, B, C)
    if channel_last:
        u, delta = _swap_time(u, "u"), _swap_time(delta, "delta")
        z = None if z is None else _swap_time(z, "z")
        B, C = (x.transpose(-1, -2) if x.dim() in (3, 4) else x for x in (B, C))
    _check_activations(u, delta, z, channel_last)
    _check_parameters(u, A, D, delta_bias)
    B, C = _canonical_projection("B", B, u, A, channel_last), _canonical_projection("C", C, u, A, channel_last)
    B, C = _same_groups(B, C)
    cu_seqlens = _canonical_sequences(u, cu_seqlens)
    _check_states(u, A, initial_state, reset, cu_seqlens)
    dtype = state_dtype(u.dtype)
    projections = [x for x in (B, C) if x.dim() == 4]
    if any(x is not None and x.dtype != u.dtype for x in (delta, z, *projections)):
        u, delta, z, B, C = common_dtype((u, delta, z, B, C), u)  # type: ignore[assignment]
    A = A.to(dtype)
    D, delta_bias, initial_state = (None if x is None else x.to(dtype) for x in (D, delta_bias, initial_state))
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens)
    return ScanInputs(*tensors, delta_softplus, channel_last)


def _promote(*activations: Tensor | None) -> tuple[Tensor, ...]:
    """To one dtype; constant B and C keep theirs."""
    varying = [x.dtype for x in activations if x is not None and x.dim() > 2]
    if not varying:
        return activations  # type: ignore[return-value]
    dtype = promote_dtypes(varying)
    return tuple(x if x is None or x.dim() <= 2 else x.to(dtype) for x in activations)  # type: ignore[misc]


def _swap_time(x: Tensor, name: str) -> Tensor:
    if x.dim() != 3:
        raise ValueError(
            f"{OP}: {name} has shape {tuple(x.shape)}, expected (batch, time, channels) with channel_last=True"
        )
    return x.transpose(1, 2)


def _check_activations(u: Tensor, delta: Tensor, z: Tensor | None, channel_last: bool) -> None:
    if u.dim() != 3:
        raise ValueError(f"{OP}: u has shape {tuple(u.shape)}, expected (batch, channels, time)")
    order = (0, 2, 1) if channel_last else (0, 1, 2)
    labels = ("batch", "channels", "time")
    for name, x in (("delta", delta), ("z", z)):
        if x is None:
            continue
        require_float(OP, name, x, u, "u")
        if not has_shape(x, u.shape):
            shown = x.transpose(1, 2) if channel_last and x.dim() == 3 else x
            require_shape(OP, name, shown, [labels[i] for i in order], [u.shape[i] for i in order], "u")


def _check_parameters(u: Tensor, A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> None:
    if A.is_complex():
        raise TypeError(
            f"{OP}: A is complex ({A.dtype}), expected a real A; a complex memory can be had by rotating B and C"
        )
    channels = u.shape[1]
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(f"{OP}: A has shape {tuple(A.shape)}, expected (channels={channels}, state) to match u")
    for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        if x is None:
            continue
        require_float(OP, name, x, u, "u")
        if name != "A":
            require_shape(OP, name, x, ("channels",), (channels,), "u")


def _canonical_projection(name: str, x: Tensor, u: Tensor, A: Tensor, channel_last: bool) -> Tensor:
    batch, channels, time = u.shape
    state = A.shape[1]
    require_float(OP, name, x, u, "u")
    if x.dim() == 2:
        require_shape(OP, name, x, ("channels", "state"), (channels, state), "u and A")
        return x.to(state_dtype(u.dtype))
    if x.dim() == 3:
        x = x.unsqueeze(1)
    elif x.dim() != 4:
        raise ValueError(
            f"{OP}: {name} has shape {tuple(x.shape)}, expected (channels, state), (batch, state, time) or "
            "(batch, groups, state, time)"
        )
    groups = x.shape[1]
    if x.shape[0] != batch or x.shape[2] != state or x.shape[3] != time:
        labels, sizes = ["batch", "groups", "state", "time"], [batch, groups, state, time]
        shown, hint = x, ""
        if channel_last:
            labels[2:], sizes[2:], shown = labels[:1:-1], sizes[:1:-1], x.transpose(2, 3)
        if groups == 1:
            labels, sizes, shown = labels[:1] + labels[2:], sizes[:1] + sizes[2:], shown.squeeze(1)
        if x.shape[2] == time and x.shape[3] == state:
            hint = f"channel_last={not channel_last} takes this order"
        require_shape(OP, name, shown, labels, sizes, "u and A", hint)
    if groups < 1 or channels % groups:
        raise ValueError(f"{OP}: {name} has {groups} groups, expected a divisor of channels={channels}")
    return x


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    if B.dim() == 4 and C.dim() == 4 and B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        if 1 not in (B.shape[1], C.shape[1]):
            raise ValueError(
                f"{OP}: B has {B.shape[1]} groups and C has {C.shape[1]}, expected as many in both, or one"
            )
        B, C = (x.expand(-1, groups, -1, -1) for x in (B, C))
    return B, C


def _canonical_sequences(u: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None:
        return None
    require_packing(OP, cu_seqlens, u, "u")
    return cu_seqlens.to(torch.int64)


def _check_states(
    u: Tensor, A: Tensor, initial_state: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    batch, channels, time = u.shape
    if initial_state is not None:
        require_float(OP, "initial_state", initial_state, u, "u")
        first = ("batch", batch) if cu_seqlens is None else ("sequences", cu_seqlens.shape[0] - 1)
        sizes = (first[1], channels, A.shape[1])
        require_shape(OP, "initial_state", initial_state, (first[0], "channels", "state"), sizes, "u and A")
    require_reset(OP, reset, ("batch", "time"), (batch, time), u, "u")
