"""One step of Mamba's or Mamba-2's scan."""

import math

from torch import Tensor

from wmkernels.checks import require_writable, state_dtype
from wmkernels.compat.arguments import narrowed, rows_of, without_padding, write_rows
from wmkernels.modes import needs_autograd
from wmkernels.selective_step import function as selective_step
from wmkernels.selective_step.validation import UPDATE, require_heads
from wmkernels.ssd_scan.function import ssd_step

_ANY_STEP = (-math.inf, math.inf)


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
    """One step that updates ``state`` in place; differentiable where gradients are recorded.

    With heads, an A, dt and dt_bias that were expanded from one number per head are read as such numbers: nothing of
    the size of the state is copied but the state. With gradients, the state keeps its history: ``state.detach_()``
    between updates of a model, or ``torch.no_grad()`` to generate.

    Args:
        state: (batch, channels, state) or (batch, heads, headdim, state); then (heads, headdim) replaces channels
            below. More rows than the batch with ``state_batch_indices``. In 16 bits it is rounded every step.
        x: (batch, channels).
        dt: as ``x``.
        A: (channels, state).
        B: (batch, state) or (batch, groups, state).
        C: as ``B``.
        D: (channels,).
        z: as ``x``.
        dt_bias: (channels,).
        dt_softplus: apply softplus to ``dt + dt_bias``.
        state_batch_indices: int (batch,), unique rows of ``state``; negative: no update, output 0.

    Returns:
        The output, as ``x``.

    Raises:
        ValueError: invalid shape, device or index.
        TypeError: invalid dtype.

    Example:
        >>> import torch
        >>> from wmkernels.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
        >>> state, x, B = torch.zeros(1, 2, 4, 8), torch.randn(1, 2, 4), torch.randn(1, 1, 8)
        >>> A, dt = -torch.rand(2)[:, None, None].expand(2, 4, 8), torch.rand(1, 2)[..., None].expand(1, 2, 4)
        >>> selective_state_update(state, x, dt, A, B, B).shape, bool(state.any())
        (torch.Size([1, 2, 4]), True)
    """
    dt, A, B, C, D, z, dt_bias = narrowed(x, dt, A, B, C, D, z, dt_bias)
    dt_softplus = bool(dt_softplus)
    has_heads = state.dim() == 4
    per_head = has_heads and _is_per_head(dt, A, dt_bias)
    if not per_head and not needs_autograd((state, x, dt, A, B, C, D, z, dt_bias)):
        return selective_step.selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        )
    require_writable(UPDATE, "state", state)
    if has_heads:
        require_heads(state, x, dt, A, D, z, dt_bias)
    before = rows_of(state_batch_indices, state).to(state_dtype(x.dtype))
    if per_head:
        bias = None if dt_bias is None else dt_bias[:, 0]
        B, C = (v.unsqueeze(1) if v.dim() == 2 else v for v in (B, C))
        out, after = ssd_step(before, x, dt[..., 0], A[:, 0, 0], B, C, D, z, bias, dt_softplus, dt_limit=_ANY_STEP)
        assert isinstance(after, Tensor)
    else:
        out, after = _step(before, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    write_rows(state_batch_indices, state, after)
    return without_padding(state_batch_indices, out)


def selective_state_update_ref(
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
) -> Tensor:
    """``selective_state_update`` by the backend ``reference``."""
    dt, A, B, C, D, z, dt_bias = narrowed(x, dt, A, B, C, D, z, dt_bias)
    before = rows_of(None, state).to(state_dtype(x.dtype))
    out, after = _step(before, x, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), "reference")
    state.copy_(after)
    return out


def _is_per_head(dt: Tensor, A: Tensor, dt_bias: Tensor | None) -> bool:
    """Whether one number per head was expanded over its channels, and in A over their states."""
    if A.dim() != 3 or dt.dim() != 3 or 0 in A.shape or (dt_bias is not None and dt_bias.dim() != 2):
        return False
    expanded = [(A, 1), (A, 2), (dt, 2), *([] if dt_bias is None else [(dt_bias, 1)])]
    return all(x.stride(dim) == 0 or x.shape[dim] == 1 for x, dim in expanded)


def _step(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``selective_step``, of heads as well."""
    if state.dim() == 3:
        return selective_step.selective_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, backend=backend)
    sizes = require_heads(state, x, dt, A, D, z, dt_bias)
    x, dt, z = (None if v is None else v.flatten(1, 2) for v in (x, dt, z))  # type: ignore[assignment]
    A, D, dt_bias = (None if v is None else v.flatten(0, 1) for v in (A, D, dt_bias))  # type: ignore[assignment]
    out, after = selective_step.selective_step(
        state.flatten(1, 2), x, dt, A, B, C, D, z, dt_bias, dt_softplus, backend=backend
    )
    return out.unflatten(1, sizes), after.unflatten(1, sizes)
