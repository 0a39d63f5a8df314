"""Arguments as callers pass them, and as the ops take them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import require_device, require_dtype, require_shape, require_tensor, shown, state_dtype

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def narrowed(like: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, float64 ones in float32 beside a narrower ``like``, whose arithmetic could not hold them.

    All other mixtures of dtypes the ops take as they are, and compute in float32.
    """
    if state_dtype(like.dtype) == torch.float64:
        return tensors
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x for x in tensors)


def is_silu(op: str, activation: object) -> bool:
    """Raises ValueError."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{op}: activation is {shown(activation)}, expected "silu", "swish" or None')
    return activation is not None


def reset_of(op: str, seq_idx: Tensor | None, like: Tensor, sizes: tuple[int, int]) -> Tensor | None:
    """True where ``seq_idx`` (batch, time) changes; an initial state counts as one of sequence 0."""
    if seq_idx is None:
        return None
    require_tensor(op, "seq_idx", seq_idx)
    require_dtype(op, "seq_idx", seq_idx, _INTEGERS, "(the sequence that a step belongs to)")
    require_device(op, "seq_idx", seq_idx, like.device, "x")
    require_shape(op, "seq_idx", seq_idx, ("batch", "time"), sizes, "x")
    return seq_idx != F.pad(seq_idx, (1, 0))[:, :-1]


def rows_of(indices: Tensor | None, cache: Tensor) -> Tensor:
    """The cache, or its rows at ``indices``, where negative ones read row 0. A copy where gradients are recorded.

    The cache is updated in place afterwards, and autograd keeps what a step has read.
    """
    if indices is not None:
        return cache.index_select(0, indices.clamp(min=0))
    return cache.clone() if torch.is_grad_enabled() else cache


def write_rows(indices: Tensor | None, cache: Tensor, rows: Tensor) -> None:
    """Writes ``rows`` in place, but for those at negative indices."""
    if indices is None:
        cache.copy_(rows)
    else:
        kept = indices >= 0
        cache.index_copy_(0, indices[kept].long(), rows[kept].to(cache.dtype))


def without_padding(indices: Tensor | None, out: Tensor) -> Tensor:
    """The output, zero in rows with a negative index."""
    if indices is None:
        return out
    return out.masked_fill((indices < 0).view(-1, *[1] * (out.dim() - 1)), 0)
