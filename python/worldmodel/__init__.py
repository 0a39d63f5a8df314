"""A world model on the kernels of wmkernels: memory, perception, prediction, evaluation and decision in one loop.

``python -m worldmodel --help`` trains one, evaluates it, and shows what its memory does. From Python:

    WorldModel, Learner          the five functions, and how they learn
    VectorEnvironment, Replay    the source of experience
    TrainConfig, Run             the configuration of a run, and its folder; ``commands.train.train`` makes one
    Agent                        a trained world model that acts

Importing the package registers its environments, ``worldmodel/HiddenBall-v0`` and others, and imports neither torch nor
gymnasium: names are looked up at their first use. The dependencies of the world model alone are the extra
``worldmodel``.
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
    "GymnasiumVectorEnvironment": "environments.vector",
    "Learner": "learning.learner",
    "LearnerConfig": "learning.learner",
    "Replay": "data.replay",
    "ReplayConfig": "data.replay",
    "Run": "runs.run",
    "TrainConfig": "learning.settings",
    "VectorEnvironment": "environments.vector",
    "WorldModel": "model.world_model",
    "WorldModelConfig": "model.world_model",
}

_RENAMED = {"Episodes": "VectorEnvironment", "VectorEpisodes": "GymnasiumVectorEnvironment"}

__all__ = sorted(_PLACES)

moved.install()
ids.install()


def __getattr__(name: str) -> Any:
    """The public names, from the files that define them."""
    if name in _RENAMED:
        warnings.warn(f"worldmodel.{name} is worldmodel.{_RENAMED[name]} now", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _PLACES:
        raise AttributeError(f"module 'worldmodel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"worldmodel.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
