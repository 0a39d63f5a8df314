"""Presets: settings of the model and of learning that were tried together, by name."""

import dataclasses

from worldmodel.learner import LearnerConfig
from worldmodel.memory import MemoryConfig
from worldmodel.replay import ReplayConfig
from worldmodel.world_model import WorldModelConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A world model, how it learns, and what it learns from.

    Attributes:
        model: the five functions.
        learner: losses and optimisers.
        replay: what is kept, and how batches are packed.
        num_envs: environments that are stepped side by side.
        train_ratio: steps learned from for each step collected.
        prefill: steps of random actions before learning begins.
    """

    model: WorldModelConfig
    learner: LearnerConfig
    replay: ReplayConfig
    num_envs: int
    train_ratio: float
    prefill: int


def popgym() -> Preset:
    """Small observations, long memory: what the results on POPGym were made with.

    A window of 312 steps holds 6, 3 or 2 episodes of RepeatPrevious Easy, Medium or Hard, and nothing is padding.
    """
    return Preset(
        WorldModelConfig(memory=MemoryConfig(groups=8)),
        LearnerConfig(),
        ReplayConfig(batch_size=8, window=312, burn_in=32),
        num_envs=32,
        train_ratio=16,
        prefill=4000,
    )


PRESETS = {"popgym": popgym}
