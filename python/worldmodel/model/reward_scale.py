"""Reward scale: converts model rewards and values to the environment's units."""

import torch
from torch import Tensor, nn


class RewardScale(nn.Module):
    """Root mean square of nonzero rewards, so that sparse rewards count as much as dense ones.

    The mean covers about the last ``memory`` rewards.

    Example:
        >>> scale = RewardScale()
        >>> scale.update(torch.tensor(2.0), torch.tensor(0.125))
        >>> float(scale.scale)
        0.25
    """

    count: Tensor
    mean_square: Tensor

    def __init__(self, memory: int = 1_000_000) -> None:
        super().__init__()
        self.memory = memory
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean_square", torch.zeros((), dtype=torch.float64))

    @property
    def scale(self) -> Tensor:
        """Float64 (); 1 while every reward was zero."""
        return torch.where(self.mean_square > 0, self.mean_square, 1).sqrt()

    @torch.no_grad()
    def update(self, count: Tensor, square: Tensor) -> None:
        """``count`` and sum of squares of nonzero rewards, both ()."""
        if not count:
            return
        count = count.to(self.count.dtype)
        self.count.add_(count).clamp_(max=float(self.memory))
        weight = (count / self.count).clamp(max=1.0)
        self.mean_square.add_(weight * (square.to(self.mean_square.dtype) / count - self.mean_square))
