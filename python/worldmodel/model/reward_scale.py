"""The scale of rewards: what the model's rewards and values are multiplied by to be in the environment's units."""

import torch
from torch import Tensor, nn


class RewardScale(nn.Module):
    """Root mean square of the rewards that are not zero: a rare reward then counts as much as a steady one.

    The mean is over all rewards at first, and over about the last ``memory`` later on. ``count`` and ``mean_square``
    are float64 buffers: whoever has the model's state has the units of its rewards and values.

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
        """Float64 (): what rewards are divided by; 1 as long as every reward was zero."""
        return torch.where(self.mean_square > 0, self.mean_square, 1).sqrt()

    @torch.no_grad()
    def update(self, count: Tensor, square: Tensor) -> None:
        """Moves the running mean.

        Args:
            count: number of rewards that are not zero, ().
            square: the sum of their squares, ().
        """
        if not count:
            return
        count = count.to(self.count.dtype)
        self.count.add_(count).clamp_(max=float(self.memory))
        weight = (count / self.count).clamp(max=1.0)
        self.mean_square.add_(weight * (square.to(self.mean_square.dtype) / count - self.mean_square))
