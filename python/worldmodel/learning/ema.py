"""Averaged weights: an exponential moving average over updates, which acts once training is over.

Where one update is large, each leaves the policy a little beside the one before. The newest weights waver around what
is learned, and their return does, too; the mean of the weights does so less (Polyak & Juditsky 1992).
"""

from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from worldmodel.model.world_model import WorldModel

_EARLY = 0.1  # of all updates so far: while they are few, the average reaches no further back


def ema_of(world_model: WorldModel, updates: int) -> AveragedModel:
    """PyTorch's average of the parameters; buffers are the newest ones.

    Args:
        world_model: averaged from the weights that it has after its first update on.
        updates: over which is averaged; fewer at the beginning.

    Returns:
        ``update_parameters(world_model)`` follows each update; ``module`` is the averaged world model, ``n_averaged``
        the number of updates.
    """

    def average(averaged: Tensor, newest: Tensor, n_averaged: Tensor | int) -> Tensor:
        return averaged.lerp(newest, 1 / max(1.0, min(updates, _EARLY * (int(n_averaged) + 1))))

    return AveragedModel(world_model, avg_fn=average).requires_grad_(False)
