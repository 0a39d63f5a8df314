"""Presets: settings of the model and of learning that were tried together, by name."""

import dataclasses

from worldmodel.learner import LearnerConfig
from worldmodel.memory import MemoryConfig
from worldmodel.objectives import ObjectiveConfig
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

    A window of 312 steps holds 6, 3 or 2 episodes of RepeatPrevious Easy, Medium or Hard, and nothing is padding. What
    is collected is learned from few times over: steps are cheap here, and a memory that has seen too few of them learns
    them by heart first. A memory of 16 states learned Medium as quickly, but Hard, 63 steps back, with one seed of two
    in ten minutes; with 32, whose 128 rates of turning stand half as far apart, both learned it in four.
    """
    return Preset(
        WorldModelConfig(memory=MemoryConfig(groups=8, states=32)),
        LearnerConfig(policy_rate=3e-3),
        ReplayConfig(batch_size=8, window=312, burn_in=32),
        num_envs=32,
        train_ratio=8,
        prefill=10_000,
    )


def control() -> Preset:
    """Observations that say nearly all: shorter windows, slower learning, longer imagination. Tried on CartPole-v1."""
    return Preset(
        WorldModelConfig(),
        LearnerConfig(learning_rate=1e-3, objective=ObjectiveConfig(horizon=10, starts=6)),
        ReplayConfig(batch_size=16, window=64, burn_in=8),
        num_envs=8,
        train_ratio=64,
        prefill=500,
    )


PRESETS = {"popgym": popgym, "control": control}
