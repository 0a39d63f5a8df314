"""Open-loop prediction of a ball that passes behind a curtain.

After ``OBSERVED`` steps the model imagines with the recorded actions. Error: cells where imagined and real map disagree
about the ball, at most 8. The persistence baseline repeats the last observed map.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.data.actions import action_generator
from worldmodel.data.batch import Batch
from worldmodel.environments.hidden_ball import LEATHER
from worldmodel.environments.registry import make
from worldmodel.model.world_model import WorldModel

OBSERVED = 16
AHEAD = 24


def random_episodes(name: str, count: int, seed: int, frames: int = OBSERVED + AHEAD) -> tuple[np.ndarray, np.ndarray]:
    """First ``frames`` frames of ``count`` episodes under random actions.

    Returns:
        ``(frames, actions)``: uint8 (count, frames, height, width, 1), int64 (count, frames - 1).
    """
    env, films, taken = make(name), [], []
    for number in range(seed, seed + count):
        actions = action_generator(number).integers(env.action_space.n, size=frames - 1)
        films.append([env.reset(seed=number)[0], *(env.step(int(action))[0] for action in actions)])
        taken.append(actions)
    env.close()
    return np.array(films), np.array(taken)


class _RecordedActions:
    def __init__(self, actions: Iterator[Tensor]) -> None:
        self.actions = actions

    def __call__(self, _: Tensor) -> "_RecordedActions":
        return self

    def sample(self) -> Tensor:
        return next(self.actions)


@torch.no_grad()
def imagined(world_model: WorldModel, frames: np.ndarray, actions: np.ndarray, observed: int = OBSERVED) -> np.ndarray:
    """Maps after ``observed`` frames, (count, frames - observed, height, width, 1)."""
    (modality,) = world_model.observation_spec.modalities
    count, length = len(frames), frames.shape[1]
    acted = torch.ones(count, observed, dtype=torch.bool)
    batch = Batch(
        observations={modality: torch.from_numpy(frames[:, :observed])},
        actions=torch.from_numpy(actions[:, :observed]),
        rewards=torch.zeros(count, observed),
        terminated=torch.zeros_like(acted),
        is_last=torch.zeros_like(acted),
        is_first=(torch.arange(observed) == 0).repeat(count, 1),
        valid=acted,
    )
    state = world_model.observe(batch).state
    encoded = world_model.action_spec.encode(torch.from_numpy(actions)).float()
    policy: Any = _RecordedActions(iter(encoded[:, observed - 1 :].unbind(1)))
    rollout = world_model.imagine(state, policy, length - observed, sample=world_model.perception.latent.mode)
    return world_model.perception.reconstruct(rollout.latent)[modality].numpy()


def wrong_cells(pictures: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Mean over episodes, (steps,)."""
    return ((pictures == LEATHER) != (frames == LEATHER)).sum((-1, -2, -3)).mean(0)


def errors(world_model: WorldModel, frames: np.ndarray, actions: np.ndarray) -> dict[str, list[float]]:
    target = frames[:, OBSERVED:]
    persistence = np.broadcast_to(frames[:, OBSERVED - 1 : OBSERVED], target.shape)
    pictures = imagined(world_model, frames, actions)
    return {
        "model": wrong_cells(pictures, target).tolist(),
        "persistence": wrong_cells(persistence, target).tolist(),
    }
