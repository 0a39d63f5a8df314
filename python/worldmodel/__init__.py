"""A world model on the kernels of wmkernels: memory, perception, prediction, evaluation and decision in one loop.

``python -m worldmodel --help`` trains one, evaluates it, and shows what its memory does. From Python:

    WorldModel, Learner    the five functions, and how they learn
    Episodes, Replay       what they learn from
    TrainConfig, Run       what a run is told, and the folder that it leaves; ``commands.train.train`` makes one
    Agent                  what was trained, ready to act

Names are looked up when they are asked for, so that importing the package is light. What only the world model needs is
the extra ``worldmodel``.
"""

import importlib
from typing import Any

_PLACES = {
    "Agent": "acting.agent",
    "Batch": "data.batch",
    "Collector": "learning.collector",
    "Episodes": "environments.vector",
    "Learner": "learning.learner",
    "LearnerConfig": "learning.learner",
    "Replay": "data.replay",
    "ReplayConfig": "data.replay",
    "Run": "runs.run",
    "TrainConfig": "learning.settings",
    "VectorEpisodes": "environments.vector",
    "WorldModel": "model.world_model",
    "WorldModelConfig": "model.world_model",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    """The public names, from the files that define them."""
    if name not in _PLACES:
        raise AttributeError(f"module 'worldmodel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"worldmodel.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
