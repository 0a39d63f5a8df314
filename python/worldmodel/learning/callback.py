"""Open-loop prediction while training: how far off the world model is, k steps after the last observation it was given.

It looks at the batch that was learned from last, takes the likeliest latents and so moves no random generator: a run is
the same, bit for bit, however often it is looked at. It looks rarely enough to take a hundredth of the time.
"""

import time
from typing import Any

import numpy as np

from worldmodel.data.batch import Batch
from worldmodel.model.open_loop import OpenLoop, open_loop
from worldmodel.model.world_model import WorldModel
from worldmodel.pictures.renderers import renderer
from worldmodel.runs.optional_dependencies import MissingPackage

SHARE = 0.01  # of the time of training
CONTEXT = 5  # observations that are given
AHEAD = (1, 2, 4, 8, 16)  # steps after them at which the error is told
_WIDTH, _DPI = 12.5, 60  # of the picture, inches and pixels an inch


class OpenLoopCallback:
    """Says when it is time to look, and looks.

    Args:
        minutes: between two looks, at least; 0 for never.
        seconds: of training so far.
        environment: that the observations come from, if there is a single one; it tells how they are drawn.
    """

    def __init__(self, minutes: float, seconds: float, environment: Any = None) -> None:
        self._minutes = minutes
        self._began = seconds
        self._next = seconds + 60 * minutes
        self._spent = 0.0
        self._environment = environment

    def is_time(self, seconds: float) -> bool:
        """Whether it is time to look, after ``seconds`` of training."""
        return self._minutes > 0 and seconds >= self._next

    def took(self, cost: float, seconds: float) -> None:
        """A look that began after ``seconds`` of training took ``cost`` of them."""
        self._spent += cost
        self._next = max(seconds + 60 * self._minutes, self._began + self._spent / SHARE)

    def look(
        self, world_model: WorldModel, batch: Batch, seconds: float, title: str = ""
    ) -> tuple[dict[str, float], np.ndarray | None]:
        """Predicts open-loop in ``batch``.

        Args:
            world_model: who predicts.
            batch: on its device.
            seconds: of training so far.
            title: stands above the picture.

        Returns:
            ``(metrics, picture)``. Metrics are mean errors, "open_loop/MODALITY@k" and "open_loop/reward@k", k steps
            after the last observation given; none if no row is long enough. The picture, uint8 (height, width, 3), is
            of the longest row; None if there is none, or if matplotlib is not installed.
        """
        start = time.perf_counter()
        metrics, picture = {}, None
        if batch.shape[1] > CONTEXT:
            loop = open_loop(world_model, batch.steps(0, CONTEXT + AHEAD[-1]), CONTEXT)
            if bool(loop.valid[:, CONTEXT].any()):
                metrics = errors_ahead(loop, world_model)
                picture = self._draw(loop, world_model, title)
        self.took(time.perf_counter() - start, seconds)
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


def errors_ahead(loop: OpenLoop, world_model: WorldModel) -> dict[str, float]:
    """Mean errors of the rows that are long enough, by modality and steps after the last observation given."""
    metrics = {}
    errors = loop.errors(world_model.observation_spec.modalities)
    # The reward that came with the observation k steps ahead is that of the step before.
    first = loop.context - 1
    errors["reward"] = (loop.predicted_rewards[:, first:] - loop.rewards[:, first:]).abs()
    for name, error in errors.items():
        for ahead in AHEAD:
            step = loop.context + ahead - 1
            if step < loop.valid.shape[1] and bool(loop.valid[:, step].any()):
                metrics[f"open_loop/{name}@{ahead}"] = float(error[:, ahead - 1][loop.valid[:, step]].mean())
    return metrics
