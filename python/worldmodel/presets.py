"""Presets: settings of the model and of learning that were tried together, by name."""

import dataclasses

from worldmodel.decision import DecisionConfig
from worldmodel.evaluation import EvaluationConfig
from worldmodel.learner import LearnerConfig
from worldmodel.memory import MemoryConfig
from worldmodel.networks import NumberConfig
from worldmodel.objectives import ObjectiveConfig
from worldmodel.perception import PerceptionConfig
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
    """Observations that say all, of numbers that matter to a hundredth: what the results on control were made with.

    Learned on CartPole-v1 and Pendulum-v1. What mattered, in the order of how much:

    - A latent that is not drawn. Eight variables of eight classes, drawn, say four numbers to no better than a tenth of
      their deviation, and what is imagined strays from the first step on.
    - Many updates: 16 for every 512 steps collected was all that the environments allowed before, of 32 that were
      needed by then. Learning from a step 512 times over costs the world model nothing here that could be measured.
    - No memory, which halves the time of an update. ``memory.kind="scan"`` brings it back where one observation does
      not say all.
    - Little entropy: a single action of hundreds changes a return by hundredths of its range, and a weight of 0.03
      outbids that.
    - Values over bins, which find a return of 100 within tens of updates; a squared error takes a thousand.
    - The policy itself when it counts: the look-ahead over one step compares values that differ by less than they err.
    """
    return Preset(
        WorldModelConfig(
            perception=PerceptionConfig(drawn=False),
            memory=MemoryConfig(kind="none"),
            evaluation=EvaluationConfig(value=NumberConfig("two_hot")),
            decision=DecisionConfig(entropy=3e-3, greedy="policy"),
        ),
        LearnerConfig(learning_rate=1e-3, objective=ObjectiveConfig(horizon=10, starts=8)),
        ReplayConfig(batch_size=16, window=64, burn_in=8),
        num_envs=8,
        train_ratio=512,
        prefill=500,
    )


PRESETS = {"popgym": popgym, "control": control}
