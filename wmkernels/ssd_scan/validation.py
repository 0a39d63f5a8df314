"""Checks and canonicalises SSD scan arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    common_dtype,
    is_autocast,
    promote_dtypes,
    require_dtype,
    require_float,
    require_packing,
    require_range,
    require_reset,
    require_shape,
    require_size,
    require_tensor,
    state_dtype,
)
from wmkernels.ssd_scan.meta import SSDArguments, SSDState

OP, STEP = "ssd_scan", "ssd_step"


def canonical(
    op: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: object,
    initial_state: object,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    angle: Tensor | None,
    trapezoid: Tensor | None,
) -> SSDArguments:
    """With a time dimension, D per channel, parameters in the state dtype. Raises ValueError, TypeError.

    Activations x, B, C and z of unlike dtypes come in the state dtype.
    """
    require_dtype(op, "x", x, FLOATS, "")
    if is_autocast(x.device):
        dtype = promote_dtypes([v.dtype for v in (x, B, C, z) if v is not None])
        x, B, C, z = (None if v is None else v.to(dtype) for v in (x, B, C, z))  # type: ignore[assignment]
    timed = ["batch"] if op == STEP else ["batch", "time"]
    if x.dim() != len(timed) + 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected ({', '.join(timed)}, heads, d)")
    first, (heads, d) = list(x.shape[:-2]), x.shape[-2:]
    if heads < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected at least 1 head")
    per_head = ([*timed, "heads"], [*first, heads])
    _check(op, "dt", dt, *per_head, x)
    if A.is_complex():
        raise TypeError(f"{op}: A is complex ({A.dtype}), expected a real A; angle makes the state complex")
    _check(op, "A", A, *(per_head if A.dim() > 1 else (["heads"], [heads])), x)
    groups, n = _check_projections(op, x, B, C, timed, first)
    for name, value, labels, sizes in (
        ("z", z, [*timed, "heads", "d"], [*first, heads, d]),
        ("dt_bias", dt_bias, ["heads"], [heads]),
        ("trapezoid", trapezoid, *per_head),
    ):
        if value is not None:
            _check(op, name, value, labels, sizes, x)
    if D is not None:
        _check(op, "D", D, *((["heads", "d"], [heads, d]) if D.dim() > 1 else (["heads"], [heads])), x)
        D = D if D.dim() > 1 else D[:, None].expand(heads, d)
    pairs = _check_angle(op, angle, x, timed, n)
    limit = require_range(op, "dt_limit", dt_limit)
    if op == STEP:
        x, dt, B, C = (v.unsqueeze(1) for v in (x, dt, B, C))
        A = A.unsqueeze(1) if A.dim() > 1 else A
        z, angle, trapezoid = (None if v is None else v.unsqueeze(1) for v in (z, angle, trapezoid))
        if reset is not None:
            require_reset(STEP, reset, ("batch",), first, x, "x")
            reset = reset.unsqueeze(-1)
    else:
        require_reset(op, reset, ("batch", "time"), first, x, "x")
    if cu_seqlens is not None:
        require_packing(op, cu_seqlens, x, "x")
        cu_seqlens = cu_seqlens.to(torch.int64)
    rows = ("batch", x.shape[0]) if cu_seqlens is None else ("sequences", cu_seqlens.shape[0] - 1)
    states = _checked_state(op, initial_state, x, rows, groups, n, pairs, trapezoid is not None)
    x, B, C, z = common_dtype((x, B, C, z), x)  # type: ignore[assignment]
    dtype = state_dtype(x.dtype)
    dt, A = dt.to(dtype), A.to(dtype)
    D, dt_bias, angle, trapezoid = (None if v is None else v.to(dtype) for v in (D, dt_bias, angle, trapezoid))
    return SSDArguments(
        *(x, dt, A, B, C, D, z, dt_bias, angle, trapezoid, *states, reset, cu_seqlens, dt_softplus, limit)
    )


def checked_chunk(chunk: object) -> int | None:
    """Raises TypeError, ValueError."""
    if chunk is not None:
        require_size(OP, "chunk", chunk, 1)
    return chunk  # type: ignore[return-value]


def _check(op: str, name: str, value: Tensor, labels: Sequence[str], sizes: Sequence[int], x: Tensor) -> None:
    require_float(op, name, value, x, "x")
    require_shape(op, name, value, labels, sizes, "x")


def _check_projections(op: str, x: Tensor, B: Tensor, C: Tensor, timed: list[str], first: list[int]) -> tuple[int, int]:
    """(groups, n)."""
    heads = x.shape[-2]
    require_float(op, "B", B, x, "x")
    if B.dim() != x.dim() or list(B.shape[:-2]) != first:
        expected = ", ".join(f"{label}={size}" for label, size in zip(timed, first, strict=True))
        raise ValueError(f"{op}: B has shape {tuple(B.shape)}, expected ({expected}, groups, n) to match x")
    groups, n = B.shape[-2:]
    if n < 1:
        raise ValueError(f"{op}: B has shape {tuple(B.shape)}, expected n of at least 1")
    if groups < 1 or heads % groups:
        raise ValueError(f"{op}: B has {groups} groups, expected a divisor of heads={heads}")
    require_float(op, "C", C, x, "x")
    require_shape(op, "C", C, [*timed, "groups", "n"], [*first, groups, n], "x and B")
    return groups, n


def _check_angle(op: str, angle: Tensor | None, x: Tensor, timed: list[str], n: int) -> int | None:
    """The number of pairs, None without ``angle``."""
    if angle is None:
        return None
    heads = x.shape[-2]
    require_float(op, "angle", angle, x, "x")
    given = tuple(angle.shape)
    if len(given) != x.dim() or given[:-2] != tuple(x.shape[:-2]) or given[-2] not in (1, heads):
        expected = ", ".join(f"{label}={size}" for label, size in zip(timed, x.shape, strict=False))
        raise ValueError(f"{op}: angle has shape {given}, expected ({expected}, heads={heads} or 1, pairs) to match x")
    if not 1 <= given[-1] <= n // 2:
        raise ValueError(f"{op}: angle has {given[-1]} pairs, expected 1 to {n // 2}, n // 2, to turn pairs of B")
    return int(given[-1])


def _checked_state(
    op: str,
    given: object,
    x: Tensor,
    rows: tuple[str, int],
    groups: int,
    n: int,
    pairs: int | None,
    has_trapezoid: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(state, phase, B, x)."""
    heads, d = x.shape[2:]
    name = "state" if op == STEP else "initial_state"
    if given is None:
        return None, None, None, None
    if pairs is None and not has_trapezoid:
        if isinstance(given, SSDState):
            raise TypeError(f"{op}: {name} is an SSDState, expected a torch.Tensor without angle and trapezoid")
        given = SSDState(given)  # type: ignore[arg-type]
        names = SSDState(name)  # type: ignore[arg-type]
    elif not isinstance(given, SSDState):
        raise TypeError(f"{op}: {name} is a {type(given).__name__}, expected an SSDState with angle or trapezoid")
    else:
        names = SSDState(*(f"{name}.{field}" for field in SSDState._fields))  # type: ignore[arg-type]
    shapes = (
        (True, ("heads", "d", "n"), (heads, d, n)),
        (pairs is not None, ("heads", "pairs"), (heads, pairs)),
        (has_trapezoid, ("groups", "n"), (groups, n)),
        (has_trapezoid, ("heads", "d"), (heads, d)),
    )
    checked: list[Tensor | None] = []
    for field, label, value, (is_used, labels, sizes) in zip(SSDState._fields, names, given, shapes, strict=True):
        if not is_used:
            if value is not None:
                other = "angle" if field == "phase" else "trapezoid"
                raise ValueError(f"{op}: {label} is given without {other}, expected None")
            checked.append(None)
            continue
        require_tensor(op, str(label), value)
        assert value is not None
        if field == "phase":
            require_dtype(op, str(label), value, FLOATS, "")
        else:
            require_float(op, str(label), value, x, "x")
        require_shape(op, str(label), value, (rows[0], *labels), (rows[1], *sizes), "x and B")  # type: ignore[arg-type]
        checked.append(value.to(torch.float64 if field == "phase" else state_dtype(x.dtype)))
    return tuple(checked)  # type: ignore[return-value]
