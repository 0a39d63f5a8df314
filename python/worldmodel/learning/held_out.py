"""Recorded episodes to learn from, and those held out, on which a run is evaluated."""

from typing import Any

import numpy as np

from worldmodel.data.datasets import RecordedSource
from worldmodel.data.selection import SelectedEpisodes, held_out_split, open_episodes
from worldmodel.learning.callback import OpenLoopCallback
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import Evaluator, SourceTrainer
from worldmodel.runs.fields import ConfigurationError

_BATCHES = 4  # per evaluation, at most


def recorded_sources(config: TrainConfig) -> tuple[RecordedSource, RecordedSource | None]:
    """Batches of ``config.data``: of what is learned from, and of the episodes held out, None without any.

    Raises:
        ConfigurationError: too few episodes or steps.
        RunError, MissingPackage: as ``open_episodes`` and ``SelectedEpisodes``.
    """
    if config.data is None:
        raise ConfigurationError("recorded_sources: data is None, expected recorded episodes")
    files = open_episodes(config.data, config.data_columns)
    learned, held_out = held_out_split(sum(file.episodes for file in files), config.held_out, config.seed)
    rows, window, burn_in = config.replay.batch_size, config.replay.window, config.replay.burn_in
    episodes = SelectedEpisodes(files, learned, config.action_steps, phases=config.action_steps)
    source = RecordedSource(episodes, rows, window, config.seed, burn_in)
    if not len(held_out):
        return source, None
    others = SelectedEpisodes(files, held_out, config.action_steps)
    window = min(window, others.steps)
    return source, RecordedSource(others, rows, window, config.seed, min(burn_in, window - 2))


class HeldOutEvaluator:
    """Losses on held-out episodes, "held_out/...", every ``open_loop_minutes`` and at the end.

    Args:
        source: of the episodes held out, the same batches each time.
        also: evaluates as well.
    """

    def __init__(self, source: RecordedSource, also: Evaluator) -> None:
        self._source, self._also = source, also
        self._begin = source.state_dict()
        self._callback: OpenLoopCallback | None = None

    def __call__(self, trainer: SourceTrainer) -> tuple[dict[str, float], np.ndarray | None]:
        metrics, picture = self._also(trainer)
        if self._callback is None:
            self._callback = OpenLoopCallback(
                trainer.config.open_loop_minutes, trainer.seconds, None, trainer.config.clock
            )
        ended = trainer.finished and trainer.config.open_loop_minutes > 0
        if trainer.batch is None or not (ended or self._callback.is_time(trainer.seconds)):
            return metrics, picture
        start = self._callback.now()
        found = self._losses(trainer)
        self._callback.took(self._callback.now() - start, trainer.seconds)
        return {**metrics, **found}, picture

    def _losses(self, trainer: SourceTrainer) -> dict[str, float]:
        source = self._source
        source.load_state_dict(self._begin)
        count = min(_BATCHES, -(-len(source) // source.batch_size))
        batches = [source.sample()[0].to(trainer.device) for _ in range(count)]
        losses: list[dict[str, Any]] = [trainer.learner.held_out_losses(batch) for batch in batches]
        return {f"held_out/{name}": sum(each[name] for each in losses) / count for name in losses[0]}
