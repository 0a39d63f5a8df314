"""An agent with a memory for the game of channels: the radar's, or a jammer's.

    inputs → memory → decision: a policy over channels (× waveforms)
                    → prediction: the channel that the other side uses in the same interval

Source of the scheme that memory has to find: induction, the next element after what matched before, Olsson et al.,
"In-context learning and induction heads" (2022). What a look-back jammer does is a late copy of what the radar did.
"""

import dataclasses

import torch
from torch import Tensor, nn

from worldmodel.data.batch import State
from worldmodel.environments.radar.game import RadarGameConfig, RadarGames
from worldmodel.model.blocks import DeltaBlock, GatedConvBlock, GRUBlock, RotaryScanBlock
from worldmodel.model.memory import MemoryConfig, build_memory
from worldmodel.model.networks import mlp
from worldmodel.model.token_blocks import LocalAttentionBlock
from worldmodel.runs.fields import Checked, Size

_SPARE = 8  # intervals that attention sees beyond the longest look-back


def memories(longest: int) -> dict[str, MemoryConfig]:
    """Kinds of memory for look-backs of up to ``longest`` intervals, by name.

    A convolution puts a few intervals together, so that attention can find the same few channels further back, by
    content alone or with the positions of intervals; a window is enough. The others keep a state of fixed size.
    """

    def attention(time_positions: bool) -> MemoryConfig:
        block = LocalAttentionBlock(frames=longest + _SPARE, heads=2, time_positions=time_positions)
        return MemoryConfig(blocks=(GatedConvBlock(), block))

    return {
        "attention": attention(time_positions=False),
        "attention with positions": attention(time_positions=True),
        "rotary scan": MemoryConfig(blocks=(RotaryScanBlock(d_state=32, groups=8),)),
        "delta": MemoryConfig(blocks=(GatedConvBlock(), DeltaBlock(heads=2, d_head=64))),
        "GRU": MemoryConfig(blocks=(GRUBlock(),)),
        "no memory": MemoryConfig(blocks=(GatedConvBlock(d_conv=1),)),
    }


@dataclasses.dataclass(frozen=True)
class ChannelAgentConfig(Checked):
    """An agent's networks.

    Attributes:
        memory: of what happened.
        hidden: width of the heads' hidden layer.
    """

    memory: MemoryConfig = MemoryConfig()  # noqa: RUF009
    hidden: Size = 128


class ChannelAgent(nn.Module):
    """Logits of choices, and of the channel that the other side uses, from a memory of observations.

    Args:
        inputs: numbers of an observation.
        choices: to choose from.
        channels: of the game.
        config: of the networks.

    Example:
        >>> agent = radar_agent(RadarGameConfig(channels=4))
        >>> (choices, other), state = agent(torch.zeros(2, 10, 15))
        >>> choices.shape, other.shape
        (torch.Size([2, 10, 4]), torch.Size([2, 10, 4]))
    """

    def __init__(self, inputs: int, choices: int, channels: int, config: ChannelAgentConfig | None = None) -> None:
        super().__init__()
        config = config or ChannelAgentConfig()
        width = config.memory.width
        self.entry = nn.Linear(inputs, width)
        self.memory = build_memory(config.memory)
        self.decision = mlp(width, config.hidden, 1, choices)
        self.prediction = mlp(width, config.hidden, 1, channels)

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[tuple[Tensor, Tensor], State]:
        """``inputs`` (batch, time, inputs) → logits of choices and channels, (batch, time, ...), and the state."""
        features, state = self.memory(self.entry(inputs), state)
        return (self.decision(features), self.prediction(features)), state

    def step(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits of choices alone, without the time dimension."""
        features, state = self.memory.step(self.entry(inputs), state)
        return self.decision(features), state


def radar_agent(game: RadarGameConfig, config: ChannelAgentConfig | None = None) -> ChannelAgent:
    """Of a radar: chooses actions, and predicts the jammer's channel."""
    return ChannelAgent(game.features, game.actions, game.channels, config)


def jammer_agent(game: RadarGameConfig, config: ChannelAgentConfig | None = None) -> ChannelAgent:
    """Of a jammer: chooses the channel that it jams, and predicts the radar's."""
    return ChannelAgent(2 * game.channels + 1, game.channels, game.channels, config)


class Player:
    """Plays an agent in ``RadarGames``; its memory begins anew in their first interval.

    Args:
        agent: of the side that it plays.
        greedy: takes the most probable choice; otherwise one sampled with the games' generator.
    """

    def __init__(self, agent: ChannelAgent, greedy: bool = True) -> None:
        self.agent, self.greedy = agent, greedy
        self._state: State = {}

    @torch.no_grad()
    def __call__(self, games: RadarGames) -> Tensor:
        if games.time == 0:
            self._state = self.agent.memory.init_state(games.batch)
        logits, self._state = self.agent.step(self.inputs(games), self._state)
        logits = logits.masked_fill(~self.legal(games), -torch.inf)
        if not self.greedy:  # the largest of logits with Gumbel noise is a sample
            uniform = torch.rand(logits.shape, generator=games.generator)
            logits = logits - (-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
        return logits.argmax(-1)

    def inputs(self, games: RadarGames) -> Tensor:
        """What the agent observes, (batch, inputs)."""
        raise NotImplementedError

    def legal(self, games: RadarGames) -> Tensor:
        """Choices that there are now, bool (batch, choices)."""
        raise NotImplementedError


class RadarPlayer(Player):
    """A policy of ``RadarGames``."""

    def inputs(self, games: RadarGames) -> Tensor:
        return games.observations

    def legal(self, games: RadarGames) -> Tensor:
        return games.available.repeat_interleave(games.config.waveforms, 1)


class JammerPlayer(Player):
    """A jammer of ``RadarGames``."""

    def inputs(self, games: RadarGames) -> Tensor:
        return games.heard

    def legal(self, games: RadarGames) -> Tensor:
        return torch.ones_like(games.available)
