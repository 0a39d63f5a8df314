"""Presets: settings of the model and of learning that were tried together, by name."""

import dataclasses

from worldmodel.learner import LearnerConfig
from worldmodel.memory import MemoryConfig
from worldmodel.objectives import ObjectiveConfig
from worldmodel.perception import PerceptionConfig
from worldmodel.prediction import PredictionConfig
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
        random_envs: environments that go on acting at random.
    """

    model: WorldModelConfig
    learner: LearnerConfig
    replay: ReplayConfig
    num_envs: int
    train_ratio: float
    prefill: int
    random_envs: int = 0


def popgym() -> Preset:
    """Small observations, long memory: what the results on POPGym were made with.

    A window of 312 steps holds 6, 3 or 2 episodes of RepeatPrevious Easy, Medium or Hard, and nothing is padding. What
    is collected is learned from few times over: steps are cheap here, and a memory that has seen too few of them learns
    them by heart first.
    """
    return Preset(
        WorldModelConfig(memory=MemoryConfig(groups=8)),
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


def wander() -> Preset:
    """Small views of a place to find one's way in: every environment acts at random, and the world is what is learned.

    Tried on MiniGrid's MemoryS9. The window holds its longest episode whole, so that no gradient is cut between what
    was seen and where it is seen again. States that do not turn hold a fact for any time; the lag plays no part here.
    Steps are cheap: learned from more often, they are learned by heart before the cue is remembered.
    """
    return Preset(
        WorldModelConfig(
            PerceptionConfig(hidden=64), MemoryConfig(rotated=False, groups=1), PredictionConfig(hidden=64)
        ),
        LearnerConfig(objective=ObjectiveConfig(horizon=2, starts=2)),
        ReplayConfig(batch_size=4, window=408, burn_in=32),
        num_envs=16,
        train_ratio=9,
        prefill=10_000,
        random_envs=16,
    )


def moving() -> Preset:
    """Small maps of things that move, remembered on a map, under random actions.

    Tried on worldmodel.hidden_ball. Small batches: perception takes more updates than steps to find the ball.
    """
    memory = MemoryConfig(kind="conv_lstm", width=128, map_size=(4, 4))
    return Preset(
        WorldModelConfig(PerceptionConfig(variables=12, hidden=64), memory),
        LearnerConfig(objective=ObjectiveConfig(horizon=2, starts=2)),
        ReplayConfig(batch_size=2, window=98, burn_in=0),
        num_envs=16,
        train_ratio=6,
        prefill=10_000,
        random_envs=16,
    )


PRESETS = {"popgym": popgym, "control": control, "wander": wander, "moving": moving}
