"""Running statistics of rewards, returns and targets, so that one setting fits every environment."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.learning.reduction import LOCAL, Reduction
from worldmodel.model.perception import Perception
from worldmodel.model.reward_scale import RewardScale


def update_reward_scale(scale: RewardScale, rewards: Tensor, reduction: Reduction = LOCAL) -> None:
    """Updates ``scale``; ``rewards`` (...) are in the environment's units.

    Example:
        >>> scale = RewardScale()
        >>> update_reward_scale(scale, torch.tensor([0.0, 0.25, -0.25]))
        >>> float(scale.scale)
        0.25
    """
    squares = rewards.detach().double().square()
    squares = squares[squares.isfinite()]
    sums = torch.stack([torch.count_nonzero(squares).double(), squares.sum()])
    count, square = reduction.reduce_statistics(sums[None]).sum(0)
    scale.update(count, square)


def update_standardisation(
    perception: Perception, observations: Mapping[str, Tensor], valid: Tensor, reduction: Reduction = LOCAL
) -> None:
    """Updates codecs that learn statistics by the ``valid`` ``observations``, (batch, time, ...)."""
    for codec, moments in perception.moments(observations, valid):
        codec.update(reduction.reduce_statistics(torch.stack(moments)))


class ReturnNormaliser:
    """Smoothed 5th to 95th percentile range of returns (Hafner et al. 2023, arXiv 2301.04104, eq. 7).

    At least ``floor``, which keeps noise from being amplified.
    """

    def __init__(self, floor: float, decay: float = 0.99) -> None:
        self.floor = floor
        self.decay = decay
        self._low: float | None = None
        self._high = 0.0

    @property
    def scale(self) -> float:
        return max(self.floor, self._high - (self._low or 0.0))

    def update(self, returns: Tensor, reduction: Reduction = LOCAL) -> None:
        """Ignored unless all ``returns`` are finite."""
        returns = reduction.reduce_statistics(returns.detach().flatten())
        if returns.numel() and returns.isfinite().all():
            points = torch.tensor([0.05, 0.95], device=returns.device, dtype=returns.dtype)
            low, high = torch.quantile(returns, points).tolist()
            decay = 0.0 if self._low is None else self.decay
            self._low = decay * (self._low or 0.0) + (1 - decay) * low
            self._high = decay * self._high + (1 - decay) * high

    def state_dict(self) -> dict[str, float | None]:
        """Both are None before the first update."""
        return {"low": self._low, "high": None if self._low is None else self._high}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Raises ValueError for NaN or infinity."""
        for name in ("low", "high"):
            if not math.isfinite(state[name] or 0.0):
                raise ValueError(f"returns.{name} is {state[name]}, expected a finite number")
        self._low, self._high = state["low"], float(state["high"] or 0.0)
