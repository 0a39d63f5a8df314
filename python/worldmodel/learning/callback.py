"""Open-loop validation during training, in at most 1% of its time.

It uses the newest batch and the likeliest latents, so no random generator moves.
"""

import time
from typing import Any

import numpy as np

from worldmodel.data.batch import Batch
from worldmodel.model.open_loop import OpenLoop, open_loop
from worldmodel.model.world_model import WorldModel
from worldmodel.pictures.renderers import renderer
from worldmodel.runs.optional_dependencies import MissingPackage

SHARE = 0.01  # of training time
CONTEXT = 5  # observed steps
AHEAD = (1, 2, 4, 8, 16)
_WIDTH, _DPI = 12.5, 60  # inches, pixels per inch


class OpenLoopCallback:
    """Schedules open-loop predictions.

    Args:
        minutes: minimum interval; 0 for never.
        seconds: of training so far.
        environment: a single one, for rendering.
    """

    def __init__(self, minutes: float, seconds: float, environment: Any = None) -> None:
        self._minutes = minutes
        self._began = seconds
        self._next = seconds + 60 * minutes
        self._spent = 0.0
        self._environment = environment

    def is_time(self, seconds: float) -> bool:
        return self._minutes > 0 and seconds >= self._next

    def took(self, cost: float, seconds: float) -> None:
        """Records a run of ``cost`` seconds that began at ``seconds``."""
        self._spent += cost
        self._next = max(seconds + 60 * self._minutes, self._began + self._spent / SHARE)

    def look(
        self, world_model: WorldModel, batch: Batch, seconds: float, title: str = ""
    ) -> tuple[dict[str, float], np.ndarray | None]:
        """Returns metrics and a picture.

        Mean errors k steps ahead are "open_loop/MODALITY@k" and "open_loop/reward@k", none if all rows are short. The
        picture, uint8 (height, width, 3), shows the longest row; None without rows or matplotlib.
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
    """Mean errors per modality, k steps after the context."""
    metrics = {}
    errors = loop.errors(world_model.observation_spec.modalities)
    # An observation's reward belongs to the previous step.
    first = loop.context - 1
    errors["reward"] = (loop.predicted_rewards[:, first:] - loop.rewards[:, first:]).abs()
    for name, error in errors.items():
        for ahead in AHEAD:
            step = loop.context + ahead - 1
            if step < loop.valid.shape[1] and bool(loop.valid[:, step].any()):
                metrics[f"open_loop/{name}@{ahead}"] = float(error[:, ahead - 1][loop.valid[:, step]].mean())
    return metrics
