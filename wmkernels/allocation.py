"""Allocation of outputs."""

import torch
from torch import Tensor


def empty_activation(like: Tensor, channel_last: bool) -> Tensor:
    """Uninitialised (batch, channels, time) as ``like``; with ``channel_last``, channels are contiguous in memory."""
    batch, channels, time = like.shape
    if channel_last:
        strides = (time * channels, 1, channels)
        return torch.empty_strided((batch, channels, time), strides, dtype=like.dtype, device=like.device)
    return torch.empty((batch, channels, time), dtype=like.dtype, device=like.device)


def empty_like_or_absent(like: Tensor | None, device: torch.device) -> Tensor:
    """Uninitialised and contiguous, as ``like``; (0,) float32 if None, since ops return no None."""
    if like is None:
        return torch.empty((0,), dtype=torch.float32, device=device)
    return torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)
