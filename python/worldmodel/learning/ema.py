"""Exponential moving average of the weights, for acting.

It reduces the noise of large updates (Polyak & Juditsky 1992).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from worldmodel.model.world_model import WorldModel

_EARLY = 0.1  # longest average / updates so far


def ema_of(world_model: WorldModel, updates: int) -> AveragedModel:
    """Averages parameters over ``updates``, fewer at the beginning; buffers are the newest."""

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], newest: Sequence[Tensor], n_averaged: Tensor | int) -> None:
        torch._foreach_lerp_(list(averaged), list(newest), 1 / max(1.0, min(updates, _EARLY * (int(n_averaged) + 1))))

    return AveragedModel(world_model, multi_avg_fn=average).requires_grad_(False)
