"""A world model on wmkernels: memory, perception, prediction, evaluation and decision.

``python -m worldmodel --help`` lists the commands. From Python:

    World                        an imagined world that stays
    WorldModel, Learner          the five functions, and their training
    VectorEnvironment, Replay    experience
    TrainConfig, Run             a run's configuration and folder
    Agent                        a trained world model that acts
"""

import importlib
import warnings
from typing import Any

from worldmodel import moved
from worldmodel.environments import ids

_PLACES = {
    "Agent": "acting.agent",
    "Batch": "data.batch",
    "Collector": "learning.collector",
    "GymnasiumVectorEnvironment": "environments.batched",
    "Learner": "learning.learner",
    "LearnerConfig": "learning.learner",
    "Replay": "data.replay",
    "ReplayConfig": "data.replay",
    "Run": "runs.run",
    "TrainConfig": "learning.settings",
    "VectorEnvironment": "environments.vector",
    "World": "acting.world",
    "WorldModel": "model.world_model",
    "WorldModelConfig": "model.world_model",
}

_RENAMED = {"Episodes": "VectorEnvironment", "VectorEpisodes": "GymnasiumVectorEnvironment"}

__all__ = sorted(_PLACES)

moved.install()
ids.install()


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"worldmodel.{name} is worldmodel.{_RENAMED[name]} now", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _PLACES:
        raise AttributeError(f"module 'worldmodel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"worldmodel.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
