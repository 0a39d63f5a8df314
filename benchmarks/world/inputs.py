"""What memory is given, by what it learned from: means of the latents, samples of them, or modes.

Memory learns from means, as when acting, or from samples, as in imagination (``ObjectiveConfig.sampled``). Where the
losses on one are much higher than on another, the world model does not know what it imagines with.
"""

from typing import Any

import numpy as np
import torch

from world.cue import Trajectory
from worldmodel.data.batch import Batch
from worldmodel.learning.objectives import ObjectiveConfig, model_loss
from worldmodel.model.world_model import WorldModel

GIVEN = ("means", "samples", "modes")


def losses(world_model: WorldModel, batch: Batch) -> dict[str, dict[str, float]]:
    """Losses of the prior and of the reward, and the mean value, by what memory is given."""
    latent, found = world_model.perception.latent, {}
    everyone = torch.ones(batch.shape[0], dtype=torch.bool)
    ways: dict[str, dict[str, Any]] = {
        "means": {},
        "samples": {"sampled": everyone},
        "modes": {"sampled": everyone, "sample": latent.mode},
    }
    for given in GIVEN:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            observed = world_model.observe(batch, **ways[given])
            _, parts = model_loss(world_model, batch, observed, ObjectiveConfig())
            value = world_model.evaluation.value(observed.features)[batch.valid].mean()
        found[given] = {
            "dynamics": float(parts["loss/dynamics"]),
            "reward": float(parts["loss/reward"]),
            "value": float(value),
        }
    return found


def batch_of(world_model: WorldModel, trajectories: list[Trajectory]) -> Batch:
    """All trajectories, padded to the longest."""
    (modality,) = world_model.observation_spec.modalities
    count, longest = len(trajectories), max(len(one.views) for one in trajectories)
    rows = count, longest
    views = np.zeros((*rows, *trajectories[0].views.shape[1:]), trajectories[0].views.dtype)
    actions, rewards = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
    valid, last, terminated = np.zeros(rows, bool), np.zeros(rows, bool), np.zeros(rows, bool)
    for row, one in enumerate(trajectories):
        steps = len(one.actions)
        views[row, : steps + 1], valid[row, : steps + 1] = one.views, True
        actions[row, :steps], rewards[row, :steps] = one.actions, one.rewards
        last[row, steps:], terminated[row, steps - 1] = True, one.terminated
    return Batch(
        observations={modality: torch.from_numpy(views)},
        actions=torch.from_numpy(actions),
        rewards=torch.from_numpy(rewards),
        terminated=torch.from_numpy(terminated),
        is_last=torch.from_numpy(last),
        is_first=torch.arange(longest).expand(rows) == 0,
        valid=torch.from_numpy(valid),
    )
