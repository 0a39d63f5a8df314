"""LayerNorm and RMS norm in plain PyTorch, for the norms of mamba_ssm."""

import torch
from torch import Tensor


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool, group_size: int | None = None
) -> Tensor:
    """The norm of the last dimension, or of each ``group_size`` features of it, in the dtype of ``x``."""
    grouped = x if group_size is None else x.unflatten(-1, (-1, group_size))
    if not is_rms_norm:
        grouped = grouped - grouped.mean(-1, keepdim=True)
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    if group_size is not None:
        normed = normed.flatten(-2)
    normed = normed * weight.to(x.dtype)
    return normed if bias is None else normed + bias.to(x.dtype)
