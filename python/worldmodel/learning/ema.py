"""The average of the weights over the last updates: what acts once training is over.

Where one update is large, each of them leaves the policy a little beside the one before. It wavers around what it is
learning, and so does its return; the mean of the weights does so less (Polyak & Juditsky 1992).
"""

import copy

import torch

from worldmodel.model.networks import polyak_update
from worldmodel.model.world_model import WorldModel

_EARLY = 0.1  # of all updates so far: while they are few, the average goes back no further


class Average:
    """An exponential moving average of a world model's parameters; buffers are the newest ones.

    Args:
        world_model: followed, from the weights that it has now.
        updates: over which is averaged.

    Attributes:
        world_model: with the averaged weights.
    """

    def __init__(self, world_model: WorldModel, updates: int) -> None:
        self.world_model = copy.deepcopy(world_model).requires_grad_(False)
        self._updates = updates

    @torch.no_grad()
    def follow(self, newest: WorldModel, updates: int) -> None:
        """Takes the weights of ``newest`` in, which are those after ``updates`` updates."""
        polyak_update(self.world_model, newest, 1 / max(1.0, min(self._updates, _EARLY * updates)))
        for kept, buffer in zip(self.world_model.buffers(), newest.buffers(), strict=True):
            kept.copy_(buffer)
