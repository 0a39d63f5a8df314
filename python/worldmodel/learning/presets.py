"""Presets: settings of the model and of learning that were tried together, by name."""

import dataclasses

from worldmodel.data.replay import ReplayConfig
from worldmodel.learning.learner import LearnerConfig
from worldmodel.learning.objectives import ObjectiveConfig
from worldmodel.model.blocks import ConvLSTMBlock, GatedConvBlock, RotaryScanBlock, ScanBlock
from worldmodel.model.decision import DecisionConfig
from worldmodel.model.evaluation import EvaluationConfig
from worldmodel.model.latents import CategoricalConfig
from worldmodel.model.memory import MemoryConfig
from worldmodel.model.networks import ScalarConfig
from worldmodel.model.perception import PerceptionConfig
from worldmodel.model.prediction import PredictionConfig
from worldmodel.model.world_model import WorldModelConfig


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
    them by heart first. With 16 states a channel three seeds of Medium came to between 0.92 and 1.00, and one of two of
    Hard was not learned in ten minutes; with 32, whose rates of turning lie half as far apart, all three of both were.
    """
    return Preset(
        WorldModelConfig(memory=MemoryConfig(blocks=(RotaryScanBlock(groups=8, d_state=32),))),
        LearnerConfig(policy_lr=3e-3),
        ReplayConfig(batch_size=8, window=312, burn_in=32),
        num_envs=32,
        train_ratio=8,
        prefill=10_000,
    )


def control() -> Preset:
    """Observations that say all, in numbers, and a few actions: what the results on CartPole-v1 were made with.

    - The latent is not drawn. After 300 updates on random play of CartPole, draws from eight variables of eight classes
      keep an observation to 0.4 of its deviation, their probabilities to 0.1.
    - An update for every two steps, since CartPole takes about a thousand of them. Batches of 512 steps did as well as
      those of 1,024, update for update, and take less time.
    - No memory: an update takes half the time that it takes with the scan. ``--memory rotary_scan`` brings it back
      where one observation does not say all.
    - Imagination of 25 steps from 64 states: to come back from an end of the track the cart has to lean first. With 15
      steps from 128, which cost the same, one seed of two learned to drift out of the track again after 3,500 updates;
      with 25 the same seed did not in 4,700. A third of the policy's rate ended that, too, but came to 500 after 2,000
      updates instead of 1,000.
    - Weights averaged over 200 updates act, for the newest ones waver: of 19 checkpoints that lie 250 updates
      apart, they passed 475 at 14 and their average at 18; of another run, with 15 steps, at 11 and at 16.
    - REINFORCE, which learns from every imagined step; ``all_action`` tries both actions, but in the first step alone.
      Of three seeds that had passed 475, none fell below again with it, and two did with ``all_action``, which passed
      it a little sooner. What is said above of horizon and average was tried with ``all_action``.
    - Little entropy: one action of hundreds changes a return by hundredths of its range. A weight of 0.003 kept the
      policy of CartPole half random.
    - A discount of 0.995: at 0.99, the end of the track is beyond the horizon until it is near. Not compared seed for
      seed.
    - Values over bins, since a squared error climbs to a return of a hundred step by step of Adam; this one was not
      compared.
    - The policy's own action when it counts. Of 20 checkpoints it did better than the look-ahead over one step at 11,
      and worse at 7: nothing is lost with the cheaper one.
    """
    return Preset(
        WorldModelConfig(
            perception=PerceptionConfig(CategoricalConfig(stochastic=False)),
            memory=MemoryConfig(blocks=(GatedConvBlock(d_conv=1),)),
            evaluation=EvaluationConfig(discount=0.995, value=ScalarConfig("two_hot")),
            decision=DecisionConfig(gradient="reinforce", entropy=1e-3, greedy="policy"),
        ),
        LearnerConfig(model_lr=1e-3, policy_lr=1e-3, ema=200, objective=ObjectiveConfig(horizon=25, starts=8)),
        ReplayConfig(batch_size=8, window=64, burn_in=8),
        num_envs=8,
        train_ratio=256,
        prefill=500,
    )


def continuous() -> Preset:
    """As ``control``, for continuous actions: what the results on Pendulum-v1 were made with.

    The gradient through the dynamics says more of an action than a sampled return does, and every imagined step has to
    be differentiated: imagination is shorter, and the policy's steps are smaller.
    """
    preset = control()
    decision = dataclasses.replace(preset.model.decision, gradient="pathwise", entropy=3e-4)
    learner = dataclasses.replace(
        preset.learner,
        policy_lr=3e-4,
        objective=dataclasses.replace(preset.learner.objective, horizon=10, starts=8),
    )
    return dataclasses.replace(preset, model=dataclasses.replace(preset.model, decision=decision), learner=learner)


def wander() -> Preset:
    """Small views of a place to find one's way in: every environment acts at random, and the world is what is learned.

    Tried on MiniGrid's MemoryS9. The window holds its longest episode whole, so that no gradient is cut between what
    was seen and where it is seen again. States that do not turn hold a fact for any time; the lag plays no part here.
    Steps are cheap: learned from more often, they are learned by heart before the cue is remembered. The latent is not
    drawn: with draws, perception tells a key from a ball late, and from one of two seeds not in 1,600 updates.
    """
    return Preset(
        WorldModelConfig(
            PerceptionConfig(CategoricalConfig(stochastic=False), hidden=64),
            MemoryConfig(blocks=(ScanBlock(groups=1),)),
            PredictionConfig(hidden=64),
        ),
        LearnerConfig(objective=ObjectiveConfig(horizon=2, starts=2)),
        ReplayConfig(batch_size=4, window=408, burn_in=32),
        num_envs=16,
        train_ratio=9,
        prefill=10_000,
        random_envs=16,
    )


def moving() -> Preset:
    """Small maps or images of things that move, remembered on a map, under random actions.

    Tried on HiddenBall. Small batches: perception takes more updates than steps to find the ball.
    """
    memory = MemoryConfig(width=128, blocks=(ConvLSTMBlock((4, 4)),))
    return Preset(
        WorldModelConfig(PerceptionConfig(CategoricalConfig(variables=12), hidden=64), memory),
        LearnerConfig(objective=ObjectiveConfig(horizon=2, starts=2)),
        ReplayConfig(batch_size=2, window=98, burn_in=0),
        num_envs=16,
        train_ratio=6,
        prefill=10_000,
        random_envs=16,
    )


PRESETS = {
    "popgym": popgym,
    "control": control,
    "continuous": continuous,
    "wander": wander,
    "moving": moving,
}
