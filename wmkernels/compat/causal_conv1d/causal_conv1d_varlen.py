"""Convolution states of packed sequences."""

import torch
from torch import Tensor

from wmkernels.checks import require_device, require_dtype, require_size, require_tensor


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` inputs of each packed sequence, zeros before its start; differentiable.

    Args:
        x: (time, channels).
        cu_seqlens: int32 or int64 (sequences + 1,), nondecreasing from 0, at most to time.
        state_len: inputs per state.

    Returns:
        (sequences, channels, state_len), as ``x``, channels contiguous.

    Raises:
        ValueError: invalid shape, device or state_len.
        TypeError: invalid dtype or state_len.
    """
    op = "causal_conv1d_varlen_states"
    require_tensor(op, "x", x)
    require_tensor(op, "cu_seqlens", cu_seqlens)
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (time, channels)")
    require_dtype(op, "cu_seqlens", cu_seqlens, (torch.int64, torch.int32), "")
    require_device(op, "cu_seqlens", cu_seqlens, x.device, "x")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (sequences + 1,)")
    require_size(op, "state_len", state_len, least=1)
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    steps = end - state_len + torch.arange(state_len, device=x.device)  # (sequences, state_len)
    if x.shape[0] == 0:
        return x.new_zeros(*steps.shape, x.shape[1]).mT
    return x[steps.clamp(min=0)].masked_fill((steps < begin)[..., None], 0).mT


causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states
