"""MiniGrid's Memory: accuracy of the prediction at the cue's cell.

The cue, a key or a ball, leaves and re-enters a small view. On re-entry, the prior's prediction at its cell is
evaluated: key or ball? Chance is 50%. The mean error over cells says little, as most are walls.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from worldmodel.data.actions import action_generator
from worldmodel.data.batch import Batch
from worldmodel.environments.minigrid import BALL, KEY, cue_cell, cue_kind
from worldmodel.environments.registry import make
from worldmodel.model.world_model import WorldModel

GAPS = {"1-3": (1, 3), "4-8": (4, 8), "9-16": (9, 16), "over 16": (17, 10**9)}
"""First and last number of steps since the cue was in view (1: it never left)."""


@dataclasses.dataclass
class Trajectory:
    """An episode of n actions.

    Attributes:
        views: uint8 (n + 1, width, height, channels).
        actions: int64 (n,).
        rewards: (n,).
        terminated: whether the last action ended the episode.
        kind: KEY or BALL.
        cells: the cue's first two indices per view; None if out of view.
    """

    views: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    kind: int
    cells: list[tuple[int, int] | None]

    def reappearances(self) -> list[tuple[int, int]]:
        """``(step, gap)`` of re-entries; ``gap`` > 1 steps after the cue was last in view."""
        shown = [step for step, cell in enumerate(self.cells) if cell is not None]
        return [(step, step - last) for last, step in itertools.pairwise(shown) if step - last > 1]


Predictor = Callable[[Trajectory], np.ndarray]
"""Class scores per cell of the next views, (n, classes, width, height): row t is view t + 1."""


def random_trajectories(name: str, count: int, seed: int) -> list[Trajectory]:
    env = make(name)
    trajectories = []
    for number in range(seed, seed + count):
        random = action_generator(number)
        views, actions, rewards = [env.reset(seed=number)[0]], [], []
        cells, ended = [_cue_in(env, views[0])], False
        while not ended:
            actions.append(int(random.integers(env.action_space.n)))
            view, reward, terminated, truncated, _ = env.step(actions[-1])
            rewards.append(float(reward))
            views.append(view)
            cells.append(_cue_in(env, view))
            ended = terminated or truncated
        played = np.stack(views), np.array(actions), np.array(rewards, np.float32), terminated
        trajectories.append(Trajectory(*played, cue_kind(env), cells))
    env.close()
    return trajectories


def _cue_in(env: Any, view: np.ndarray) -> tuple[int, int] | None:
    cell = cue_cell(env)
    return cell if cell is not None and view[(*cell, 0)] == cue_kind(env) else None


def of_model(world_model: WorldModel) -> Predictor:
    """The prior's mode after (s_t, a_t), decoded."""
    (modality,) = world_model.observation_spec.modalities

    @torch.no_grad()
    def predict(trajectory: Trajectory) -> np.ndarray:
        steps = len(trajectory.actions)
        acted = torch.ones(1, steps, dtype=torch.bool)
        batch = Batch(
            observations={modality: torch.from_numpy(trajectory.views[None, :-1])},
            actions=torch.from_numpy(trajectory.actions[None]),
            rewards=torch.zeros(1, steps),
            terminated=torch.zeros_like(acted),
            is_last=torch.zeros_like(acted),
            is_first=torch.arange(steps)[None] == 0,
            valid=acted,
        )
        predicted = world_model.predict(world_model.observe(batch), batch)
        perception = world_model.perception
        latent = perception.latent.mode(predicted.prior)
        return perception.decode(latent)[modality][0, ..., 0].numpy()

    return predict


def accuracy_by_gap(trajectories: Sequence[Trajectory], predictor: Predictor) -> dict[str, dict[str, float]]:
    """Accuracy at the cue's cell on re-entry, per gap.

    Returns:
        "count"; "key_or_ball", accuracy between the two; "cell", accuracy among all classes.
    """
    counts = {name: np.zeros(3) for name in GAPS}
    for trajectory in trajectories:
        reappearances = trajectory.reappearances()
        scores = predictor(trajectory) if reappearances else None
        for step, gap in reappearances:
            of_cell = scores[(step - 1, slice(None), *trajectory.cells[step])]
            other = KEY + BALL - trajectory.kind
            correct = [1, of_cell[trajectory.kind] > of_cell[other], of_cell.argmax() == trajectory.kind]
            counts[next(name for name, (low, high) in GAPS.items() if low <= gap <= high)] += correct
    return {
        name: {"count": int(count), "key_or_ball": named / max(count, 1), "cell": exact / max(count, 1)}
        for name, (count, named, exact) in counts.items()
    }
