"""Does a world model know what it saw before? MiniGrid's Memory, judged at the cue's cell alone.

The cue, a key or a ball, is in and out of a small view. At every step that brings it back into sight, the prediction
of the next observation, made from what was seen and done before, is asked about that one cell: key or ball? Whoever
does not remember is right half of the time. The mean error over all cells would say nothing: walls are most of what is
seen, and a random walk sees the cue again after three steps in the median.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from worldmodel.data.batch import Batch
from worldmodel.environments.minigrid import BALL, KEY, cue_cell, cue_kind
from worldmodel.environments.registry import make
from worldmodel.model.world_model import WorldModel

GAPS = {"1-3": (1, 3), "4-8": (4, 8), "9-16": (9, 16), "over 16": (17, 10**9)}
"""First and last number of steps since the cue was last seen. (After 1 step, it was never out of sight.)"""


@dataclasses.dataclass
class Walk:
    """An episode of n actions.

    Attributes:
        views: uint8 (n + 1, width, height, channels).
        actions: int64 (n,).
        kind: what the cue is, KEY or BALL.
        cells: where each view shows the cue, as the first two indices of a view; None where it does not.
    """

    views: np.ndarray
    actions: np.ndarray
    kind: int
    cells: list[tuple[int, int] | None]

    def seen_again(self) -> list[tuple[int, int]]:
        """``(step, gap)`` of every view that shows the cue again: an earlier one did, ``gap`` steps ago, but not the
        one before.
        """
        shown = [step for step, cell in enumerate(self.cells) if cell is not None]
        return [(step, step - last) for last, step in itertools.pairwise(shown) if step - last > 1]


Predictor = Callable[[Walk], np.ndarray]
"""Scores of the classes of each cell in every next view, (n, classes, width, height): row t is of view t + 1."""


def random_walks(name: str, count: int, seed: int) -> list[Walk]:
    """``count`` episodes of the environment called ``name`` under random actions, with the seeds from ``seed`` on."""
    env = make(name)
    walks = []
    for number in range(seed, seed + count):
        random = np.random.default_rng(number)
        views, actions = [env.reset(seed=number)[0]], []
        cells, ended = [_cue_in(env, views[0])], False
        while not ended:
            actions.append(int(random.integers(env.action_space.n)))
            view, _, terminated, truncated, _ = env.step(actions[-1])
            views.append(view)
            cells.append(_cue_in(env, view))
            ended = terminated or truncated
        walks.append(Walk(np.stack(views), np.array(actions), cue_kind(env), cells))
    env.close()
    return walks


def _cue_in(env: Any, view: np.ndarray) -> tuple[int, int] | None:
    cell = cue_cell(env)
    return cell if cell is not None and view[(*cell, 0)] == cue_kind(env) else None


def of_model(world_model: WorldModel) -> Predictor:
    """What a world model predicts: the likeliest next latent after (s_t, a_t), decoded."""
    (leaf,) = world_model.observation_spec.leaves

    @torch.no_grad()
    def predict(walk: Walk) -> np.ndarray:
        steps = len(walk.actions)
        acted = torch.ones(1, steps, dtype=torch.bool)
        batch = Batch(
            observations={leaf: torch.from_numpy(walk.views[None, :-1])},
            actions=torch.from_numpy(walk.actions[None]),
            rewards=torch.zeros(1, steps),
            terminated=torch.zeros_like(acted),
            has_action=acted,
            reset=torch.arange(steps)[None] == 0,
            valid=acted,
        )
        predicted = world_model.predict(world_model.observe(batch), batch)
        perception = world_model.perception
        latent = perception.mode(perception.probabilities(predicted.logits))
        return perception.decode(latent)[leaf][0, ..., 0].numpy()

    return predict


def accuracy_by_gap(walks: Sequence[Walk], predictor: Predictor) -> dict[str, dict[str, float]]:
    """How often the cue's cell is predicted rightly where the cue is seen again.

    Returns:
        For each of ``GAPS``: "count"; "key_or_ball", how often the score of what the cue is beats that of what it is
        not, and "cell", how often it is the best of all classes.
    """
    asked = {name: np.zeros(3) for name in GAPS}
    for walk in walks:
        again = walk.seen_again()
        scores = predictor(walk) if again else None
        for step, gap in again:
            of_cell = scores[(step - 1, slice(None), *walk.cells[step])]
            other = KEY + BALL - walk.kind
            right = [1, of_cell[walk.kind] > of_cell[other], of_cell.argmax() == walk.kind]
            asked[next(name for name, (low, high) in GAPS.items() if low <= gap <= high)] += right
    return {
        name: {"count": int(count), "key_or_ball": named / max(count, 1), "cell": exact / max(count, 1)}
        for name, (count, named, exact) in asked.items()
    }
