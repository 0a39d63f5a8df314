"""Training of agents in the game of channels, by what each of their choices would bring.

In training the simulator tells what every action would have brought: exactly, ``RadarGames.expected``, or where
detections are sampled by one sample of the chain, ``RadarGames.tried``. So the gradient of Σ_a π(a) · E[reward | a]
runs from the probability of detection through the policy into the memory. What is sent now decides where a look-back
jammer is L intervals later, but another free channel is then as good, so no value beyond the next reward is learned.
The agent also predicts the other side's channel, which it observes one interval later.
"""

import dataclasses
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.environments.radar.game import SILENT, Policy, RadarGameConfig, RadarGames
from worldmodel.environments.radar.policies import random
from worldmodel.learning.channel_agent import ChannelAgent, ChannelAgentConfig, RadarPlayer, radar_agent
from worldmodel.learning.timed import Rate, ScheduledConfig, Timed, scheduled_step
from worldmodel.runs.fields import (
    Bounds,
    Limit,
    Share,
    Size,
    Weight,
)

EASY = 8  # intervals: a look-back with which training begins


@dataclasses.dataclass(frozen=True)
class ChannelTrainConfig(ScheduledConfig):
    """How an agent is trained.

    Attributes:
        agent: its networks.
        batch_size: games played at once.
        steps: intervals of each that carry a loss, after as many as the longest look-back takes.
        curriculum: first share of the training in which the longest look-back grows from ``EASY`` to the game's.
        passes: updates with the same games.
        entropy: weight of the policy's entropy, which keeps equally good channels equally probable.
        prediction: weight of the prediction of the other side's channel.

    The others are of ``ScheduledConfig``.
    """

    agent: ChannelAgentConfig = ChannelAgentConfig()  # noqa: RUF009
    batch_size: Size = 64
    steps: Annotated[int, Bounds(1, 2**20)] = 40
    curriculum: Share = 0.5
    passes: Limit = 2
    entropy: Weight = 0.01
    prediction: Weight = 1.0
    lr: Rate = dataclasses.field(default=3e-3, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Played:
    """What one side learns from in games.

    Attributes:
        inputs: what it observed before each choice, (batch, time, inputs).
        legal: its choices, bool (batch, time, choices).
        gain: what each of them brings, exactly or in one sample, (batch, time, choices).
        other: the channel of the other side, or ``SILENT`` where it is never told: int64 (batch, time).
        burn_in: first intervals, which carry no loss.
    """

    inputs: Tensor
    legal: Tensor
    gain: Tensor
    other: Tensor
    burn_in: int


def play(games: RadarGames, steps: int, radar: Policy) -> tuple[Played, Played]:
    """Games from their first interval, as the radar and the jammer learn from them.

    The ``steps`` intervals that carry a loss come after as many as the longest look-back. The radar's gain is the
    detection probability, or in ``sampled`` games a soft detection of the sampled chain. The jammer's is a hit; it
    observes the channel that was used.
    """
    config, burn_in, rows = games.config, games.config.look_back[1], []
    for _ in range(burn_in + steps):
        legal = games.available.repeat_interleave(config.waveforms, 1)
        before = [games.observations, legal, games.tried() if config.sampled else games.expected, games.heard]
        games.step(radar(games))
        told = games.last_jammed if config.sensed else torch.full_like(games.last_jammed, SILENT)
        rows.append([*before, told, games.last_sent])
    observations, legal, expected, heard, jammed, sent = (torch.stack(x, 1) for x in zip(*rows, strict=True))
    hits = F.one_hot(sent + 1, config.channels + 1)[..., 1:].float()
    every = torch.ones_like(hits, dtype=torch.bool)
    return Played(observations, legal, expected, jammed, burn_in), Played(heard, every, hits, sent, burn_in)


class ChannelLearner:
    """Updates an agent.

    Args:
        agent: that learns.
        config: of the training.
    """

    def __init__(self, agent: ChannelAgent, config: ChannelTrainConfig) -> None:
        self.agent, self.config, self.updates = agent, config, 0
        self.optimizer = torch.optim.AdamW(
            agent.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        )

    def update(self, played: Played, progress: float = 0.0) -> dict[str, float]:
        """One step of the optimizer; returns metrics.

        Args:
            played: of the agent's side.
            progress: share of the training that is over, for the learning rate.

        Raises:
            ArithmeticError: a gradient that is not finite.
        """
        config, burn_in = self.config, played.burn_in
        outputs, _ = self.agent(played.inputs)
        choices, other = (logits[:, burn_in:] for logits in outputs)
        legal, gains, channels = (x[:, burn_in:] for x in (played.legal, played.gain, played.other))
        log_policy = choices.masked_fill(~legal, -torch.inf).log_softmax(-1)
        policy = log_policy.exp()
        gain = (policy * gains).sum(-1).mean()
        entropy = -(policy * log_policy.masked_fill(~legal, 0)).sum(-1).mean()
        loss = -gain - config.entropy * entropy
        metrics = {"gain": float(gain.detach()), "entropy": float(entropy.detach())}
        told = channels != SILENT
        if config.prediction and told.any():
            prediction_loss = F.cross_entropy(other[told], channels[told])
            metrics |= {
                "prediction_loss": float(prediction_loss.detach()),
                "prediction_accuracy": float((other.argmax(-1) == channels)[told].float().mean()),
            }
            loss = loss + config.prediction * prediction_loss
        self.optimizer.zero_grad()
        loss.backward()
        scheduled_step(self.optimizer, config, self.updates, progress)
        self.updates += 1
        return metrics


class RadarTrainer(Timed):
    """Trains a radar against the jammer of a configuration.

    It learns from random play at first, more and more from its own; and from short look-backs first.

    Attributes:
        agent: what is trained.
        seconds: of training, by ``config.clock``.
    """

    def __init__(self, game: RadarGameConfig, config: ChannelTrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.game, self.config = game, config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.agent = radar_agent(game, config.agent)
        self.learner = ChannelLearner(self.agent, config)
        super().__init__(config)

    @property
    def updates(self) -> int:
        """Of the agent, so far."""
        return self.learner.updates

    @updates.setter
    def updates(self, updates: int) -> None:
        self.learner.updates = updates

    @property
    def stage(self) -> RadarGameConfig:
        """The games that it learns from now."""
        shortest, longest = self.game.look_back
        easy = min(max(EASY, shortest), longest)
        share = min(1.0, self.progress / self.config.curriculum) if self.config.curriculum else 1.0
        return dataclasses.replace(self.game, look_back=(shortest, round(easy * (longest / easy) ** share)))

    def iterate(self) -> dict[str, float]:
        """Plays games and learns from them; returns metrics of the last update."""
        with self.timing():
            own = float(torch.rand((), generator=self.generator)) < self.progress
            policy = RadarPlayer(self.agent, greedy=False) if own else random
            games = RadarGames(self.config.batch_size, self.stage, self.generator)
            played, _ = play(games, self.config.steps, policy)
            for _ in range(self.config.passes):
                metrics = self.learner.update(played, self.progress)
        return metrics
