"""Means over the steps that count."""

import torch
from torch import Tensor


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Scalar; 0 if all weights are 0, NaN of weight 0 is ignored."""
    weights = weights.to(values.dtype)
    return torch.where(weights > 0, values * weights, 0).sum() / weights.sum().clamp(min=1e-8)
