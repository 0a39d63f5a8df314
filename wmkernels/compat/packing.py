"""Bounds of packed sequences that may end before the row does."""

import torch
from torch import Tensor

from wmkernels.checks import require_dtype, require_tensor


def padded_bounds(op: str, cu_seqlens: Tensor, time: int) -> Tensor:
    """``cu_seqlens`` and the row's end: what follows the last sequence is one more, without steps if there is none."""
    require_tensor(op, "cu_seqlens", cu_seqlens)
    require_dtype(op, "cu_seqlens", cu_seqlens, (torch.int64, torch.int32), "")
    if cu_seqlens.dim() != 1:
        raise ValueError(f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (sequences + 1,)")
    return torch.cat([cu_seqlens, cu_seqlens.new_full((1,), time)])
