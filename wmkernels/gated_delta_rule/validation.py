"""Checks and canonicalises gated delta rule arguments."""

import math
import numbers
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
    require_reset,
    require_shape,
    shown,
    state_dtype,
)
from wmkernels.gated_delta_rule.meta import DeltaRuleInputs

OP, STEP = "gated_delta_rule", "gated_delta_rule_step"
_CHANNEL_LAST = "channel_last=True takes (batch, time, heads, size)"


def canonical(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    scale: object,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    channel_last: bool,
) -> DeltaRuleInputs:
    """Time last, as many heads of q and k as of v, gates in the state dtype. Raises ValueError, TypeError.

    q, k and v of unlike dtypes come in the state dtype.
    """
    require_dtype(op, "q", q, FLOATS, "")
    if is_autocast(q.device):
        dtype = promote_dtypes([x.dtype for x in (q, k, v)])
        q, k, v = (x.to(dtype) for x in (q, k, v))
    order = ["batch", "time", "heads", "d_k"] if channel_last else ["batch", "heads", "d_k", "time"]
    if op == STEP:
        order.remove("time")
    _check_heads(op, q, k, v, order)
    shape = [size for size, label in zip(v.shape, order, strict=True) if label != "d_k"]
    labels = ["value_heads" if label == "heads" else label for label in order if label != "d_k"]
    hint = "" if op == STEP or channel_last else _CHANNEL_LAST
    for name, x in (("gate", gate), ("beta", beta)):
        require_float(op, name, x, q, "q")
        require_shape(op, name, x, labels, shape, "v", hint if tuple(x.shape) == tuple(v.shape[:3]) else "")
    if op == STEP:
        q, k, v, gate, beta = (x.unsqueeze(-1) for x in (q, k, v, gate, beta))
        reset = None if reset is None else _reset_of_step(reset, q)
    elif channel_last:
        q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
        gate, beta = gate.transpose(1, 2), beta.transpose(1, 2)
    if cu_seqlens is not None:
        require_packing(op, cu_seqlens, q, "q")
        cu_seqlens = cu_seqlens.to(torch.int64)
    _check_states(op, q, v, initial_state, reset, cu_seqlens)
    q, k, v = common_dtype((q, k, v), q)  # type: ignore[assignment]
    dtype = state_dtype(q.dtype)
    gate, beta = gate.to(dtype), beta.to(dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    scale = _checked_scale(op, scale, q.shape[2])
    if q.shape[1] != v.shape[1]:
        q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    return DeltaRuleInputs(q, k, v, gate, beta, initial_state, reset, cu_seqlens, scale, channel_last)


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, labels: Sequence[str]) -> None:
    wanted = "(" + ", ".join(labels) + ")"
    hint = " with channel_last=True" if labels[1] == "time" else ""
    if q.dim() != len(labels):
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, expected {wanted}{hint}")
    require_float(op, "k", k, q, "q")
    require_float(op, "v", v, q, "q")
    require_shape(op, "k", k, labels, q.shape, "q")
    heads, size = labels.index("heads"), labels.index("d_k")
    others = [i for i in range(len(labels)) if i not in (heads, size)]
    if v.dim() != q.dim() or any(v.shape[i] != q.shape[i] for i in others):
        expected = [f"{label}={q.shape[i]}" if i in others else label for i, label in enumerate(labels)]
        expected[heads], expected[size] = "value_heads", "d_v"
        hint = f"; {_CHANNEL_LAST}" if labels[-1] == "time" and v.shape[:2] == q.shape[:2] else ""
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}, expected ({', '.join(expected)}) to match q{hint}")
    if q.shape[size] < 1 or q.shape[heads] < 1:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, expected heads and d_k of at least 1")
    if v.shape[heads] % q.shape[heads]:
        raise ValueError(
            f"{op}: v has {v.shape[heads]} heads, expected a multiple of the {q.shape[heads]} heads of q and k"
        )


def _check_states(
    op: str, q: Tensor, v: Tensor, initial_state: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    batch, _, d_k, time = q.shape
    _, value_heads, d_v, _ = v.shape
    if initial_state is not None:
        name = "state" if op == STEP else "initial_state"
        require_float(op, name, initial_state, q, "q")
        first = ("batch", batch) if cu_seqlens is None else ("sequences", cu_seqlens.shape[0] - 1)
        labels, sizes = (first[0], "value_heads", "d_k", "d_v"), (first[1], value_heads, d_k, d_v)
        require_shape(op, name, initial_state, labels, sizes, "q and v")
    require_reset(op, reset, ("batch", "time"), (batch, time), q, "q")


def _reset_of_step(reset: Tensor, q: Tensor) -> Tensor:
    require_reset(STEP, reset, ("batch",), (q.shape[0],), q, "q")
    return reset.unsqueeze(-1)


def _checked_scale(op: str, scale: object, d_k: int) -> float:
    if scale is None:
        return float(d_k**-0.5)
    try:
        value = float(scale) if isinstance(scale, numbers.Real) and not isinstance(scale, bool) else math.nan
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise TypeError(f"{op}: scale is {shown(scale)}, expected a finite number or None")
    return value
