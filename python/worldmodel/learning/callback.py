"""Open-loop validation during training, in at most 1% of its time and five seconds.

It uses the newest batch and the likeliest latents, so no random generator moves.
"""

from typing import Any

import numpy as np
import torch

from worldmodel.data.batch import Batch
from worldmodel.learning.interval import Clock, Interval
from worldmodel.model.open_loop import OpenLoop, open_loop
from worldmodel.model.world_model import WorldModel
from worldmodel.pictures.renderers import renderer
from worldmodel.runs.optional_dependencies import MissingPackage

SHARE = 0.01  # of training time
ALLOWANCE = 5.0  # seconds beyond the share, for the first minutes
CONTEXT = 5  # observed steps
AHEAD = (1, 2, 4, 8, 16)
_WIDTH, _DPI = 12.5, 60  # inches, pixels per inch


class OpenLoopCallback(Interval):
    """Schedules open-loop predictions.

    Args:
        minutes: minimum interval; 0 for never.
        seconds: of training so far.
        environment: a single one, for rendering.
        clock: of training's seconds.
    """

    def __init__(self, minutes: float, seconds: float, environment: Any = None, clock: Clock = "wall") -> None:
        super().__init__(minutes, seconds, SHARE, ALLOWANCE, clock)
        self._environment = environment

    def look(
        self, world_model: WorldModel, batch: Batch, seconds: float, title: str = ""
    ) -> tuple[dict[str, float], np.ndarray | None]:
        """Returns metrics and a picture.

        Mean errors k steps ahead are "open_loop/MODALITY@k" and "open_loop/reward@k", none if all rows are short. The
        picture, uint8 (height, width, 3), shows the longest row; None without rows or matplotlib.
        """
        start = self.now()
        metrics, picture = {}, None
        longest = longest_episode(batch)
        context = CONTEXT if longest > CONTEXT else longest // 2
        if context:
            loop = open_loop(world_model, batch.steps(0, context + AHEAD[-1]), context)
            if bool(loop.valid[:, context].any()):
                metrics = errors_ahead(loop, world_model)
                picture = self._draw(loop, world_model, title)
        self.took(self.now() - start, seconds)
        return metrics, picture

    def _draw(self, loop: OpenLoop, world_model: WorldModel, title: str) -> np.ndarray | None:
        modalities = world_model.observation_spec.modalities
        found = ((name, renderer(modality, self._environment)) for name, modality in modalities.items())
        renderers = {name: drawn for name, drawn in found if drawn is not None}
        try:
            from worldmodel.pictures.bands import Panel
            from worldmodel.pictures.page import draw_png

            panel = Panel.of("", loop, int(loop.valid.sum(1).argmax()), modalities, renderers)
            return np.asarray(draw_png(title, [panel], None, _WIDTH, _DPI))
        except MissingPackage:
            return None


def longest_episode(batch: Batch) -> int:
    """Steps of the longest episode among those that rows begin with."""
    later = torch.zeros_like(batch.is_first)
    later[:, 1:] = batch.is_first[:, 1:]
    return int((batch.valid & (later.cumsum(1) == 0)).sum(1).max())


def errors_ahead(loop: OpenLoop, world_model: WorldModel) -> dict[str, float]:
    """Mean errors per modality, k steps after the context."""
    metrics = {}
    errors = loop.errors(world_model.observation_spec.modalities)
    # An observation's reward belongs to the previous step.
    first = loop.context - 1
    errors["reward"] = (loop.predicted_rewards[:, first:] - loop.rewards[:, first:]).abs()
    for name, error in errors.items():
        for ahead in AHEAD:
            step = loop.context + ahead - 1
            if step >= loop.valid.shape[1]:
                break
            rows = loop.valid[:, step]
            if name == "reward":
                rows = rows & loop.reward_mask[:, step - 1]
            if bool(rows.any()):
                metrics[f"open_loop/{name}@{ahead}"] = float(error[:, ahead - 1][rows].mean())
    return metrics
