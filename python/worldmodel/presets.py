"""Presets: settings of the model and of learning that were tried together, by name."""

import dataclasses

from worldmodel.learner import LearnerConfig
from worldmodel.world_model import WorldModelConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A world model and how it learns."""

    model: WorldModelConfig
    learner: LearnerConfig


def popgym() -> Preset:
    """Small observations, long memory: what the results on POPGym were made with."""
    return Preset(WorldModelConfig(), LearnerConfig())


PRESETS = {"popgym": popgym}
