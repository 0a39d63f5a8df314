"""POPGym's RepeatPreviousMedium as a stream of cards, and a model of memory alone.

The task is to name the suit ``LAG`` steps ago. The reward, 1 or -1, has no further effect: Q_t(a) is its expectation.
"""

import torch
from torch import Tensor, nn

from worldmodel.data.batch import State
from worldmodel.model.memory import MemoryConfig, build_memory

SUITS = 4
DECK = 104  # cards per episode
LAG = 31


def deal(streams: int, steps: int, random: torch.Generator) -> Tensor:
    """Suits, int64 (streams, steps).

    Example:
        >>> cards = deal(2, 300, torch.Generator().manual_seed(0))
        >>> cards.shape, cards[0, :104].bincount().tolist()
        (torch.Size([2, 300]), [26, 26, 26, 26])
    """
    decks = -(-steps // DECK)
    order = torch.rand((streams, decks, DECK), generator=random).argsort(-1)
    return (order % SUITS).flatten(1)[:, :steps]


class Answerer(nn.Module):
    """Cards -> Q of every answer."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.entry = nn.Linear(SUITS, config.width)
        self.memory = build_memory(config)
        self.q = nn.Linear(config.width, SUITS)

    def forward(self, cards: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """One-hot ``cards`` and Q are (batch, time, suits); ``reset`` is bool (batch, time)."""
        features, state = self.memory(self.entry(cards), state, reset)
        return self.q(features), state

    def loss(self, cards: Tensor) -> Tensor:
        """Squared error over whole episodes; ``cards`` int64 (batch, 104)."""
        q, _ = self(one_hot(cards), None, first_step(cards))
        rewards = 2 * one_hot(cards[:, : DECK - LAG]) - 1  # (batch, steps with an answer, suits)
        return (q[:, LAG:] - rewards).square().mean()


def one_hot(cards: Tensor) -> Tensor:
    """(batch, time) -> (batch, time, suits)."""
    return torch.nn.functional.one_hot(cards, SUITS).to(torch.get_default_dtype())


def first_step(cards: Tensor) -> Tensor:
    """Resets, bool (batch, time): true at the first step."""
    return (torch.arange(cards.shape[1]) == 0).expand(cards.shape)
