"""Running scales: rewards are divided by theirs, returns by theirs, so that one setting serves every environment."""

from collections.abc import Mapping

import torch
from torch import Tensor


class RewardScale:
    """Root mean square of the rewards seen that are not zero: a rare reward is then as large as a steady one.

    It is the mean over all of them at first, and over about the last ``memory`` later on.

    Example:
        >>> scale = RewardScale()
        >>> scale.update(torch.tensor([0.0, 0.25, -0.25]))
        >>> scale.scale
        0.25
    """

    def __init__(self, memory: int = 1_000_000) -> None:
        self.memory = memory
        self._count = 0.0
        self._square = 0.0

    @property
    def scale(self) -> float:
        """1 as long as every reward was zero."""
        return self._square**0.5 or 1.0

    def update(self, rewards: Tensor) -> None:
        """Takes rewards of any shape in."""
        squares = rewards.double().square()
        seen = int(torch.count_nonzero(squares))
        if not seen:
            return
        self._count = min(self._count + seen, float(self.memory))
        share = min(1.0, seen / self._count)
        self._square += share * (float(squares.sum()) / seen - self._square)

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"count": self._count, "square": self._square}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from what ``state_dict`` said."""
        self._count, self._square = float(state["count"]), float(state["square"])


class ReturnRange:
    """The distance from the 5th to the 95th percentile of returns, smoothed, and never below ``floor``.

    (Hafner et al. 2023, arXiv 2301.04104, equation 7.) The floor keeps noise from being blown up where all returns are
    alike.
    """

    def __init__(self, floor: float, keep: float = 0.99) -> None:
        self.floor = floor
        self.keep = keep
        self._low: float | None = None
        self._high = 0.0

    @property
    def range(self) -> float:
        """What returns are divided by."""
        return max(self.floor, self._high - (self._low or 0.0))

    def update(self, returns: Tensor) -> float:
        """Takes returns of any shape in, unless one is NaN or infinite; answers ``range``."""
        if returns.numel() and returns.isfinite().all():
            points = torch.tensor([0.05, 0.95], device=returns.device, dtype=returns.dtype)
            low, high = torch.quantile(returns.flatten(), points).tolist()
            keep = 0.0 if self._low is None else self.keep
            self._low = keep * (self._low or 0.0) + (1 - keep) * low
            self._high = keep * self._high + (1 - keep) * high
        return self.range

    def state_dict(self) -> dict[str, float | None]:
        """Plain numbers."""
        return {"low": self._low, "high": self._high}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Goes on from what ``state_dict`` said."""
        self._low, self._high = state["low"], float(state["high"] or 0.0)
