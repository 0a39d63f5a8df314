"""POPGym's RepeatPreviousMedium as a stream of cards, and a model that answers it from its memory alone.

Two decks of cards are shuffled and dealt, one suit a step. The task is to name the suit of ``LAG`` steps ago; an
episode has 103 answers. An answer that is right brings 1, a wrong one -1, and changes nothing of what comes, so
Q_t(a) is the expected reward of answer a. Here the decks follow each other without end where more steps are asked for.
"""

import torch
from torch import Tensor, nn

from worldmodel.data.batch import State
from worldmodel.model.memory import MemoryConfig, build_memory

SUITS = 4
DECK = 104  # cards dealt in an episode
LAG = 31


def deal(streams: int, steps: int, random: torch.Generator) -> Tensor:
    """Suits, int64 (streams, steps): one shuffled pair of decks after the other.

    Example:
        >>> cards = deal(2, 300, torch.Generator().manual_seed(0))
        >>> cards.shape, cards[0, :104].bincount().tolist()
        (torch.Size([2, 300]), [26, 26, 26, 26])
    """
    decks = -(-steps // DECK)
    order = torch.rand((streams, decks, DECK), generator=random).argsort(-1)
    return (order % SUITS).flatten(1)[:, :steps]


class Answerer(nn.Module):
    """Reads a card, remembers, and says what each answer would bring.

    Args:
        config: of the memory.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.entry = nn.Linear(SUITS, config.width)
        self.memory = build_memory(config)
        self.q = nn.Linear(config.width, SUITS)

    def forward(self, cards: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Q of every answer.

        Args:
            cards: one-hot, (batch, time, suits).
            state: of the memory.
            reset: bool (batch, time), true where an episode begins.

        Returns:
            ``(q, state)``: (batch, time, suits), and the memory after the last card.
        """
        features, state = self.memory(self.entry(cards), state, reset)
        return self.q(features), state

    def loss(self, cards: Tensor) -> Tensor:
        """Squared error of Q over whole episodes, ``cards`` int64 (batch, 104)."""
        q, _ = self(one_hot(cards), None, first_step(cards))
        rewards = 2 * one_hot(cards[:, : DECK - LAG]) - 1  # (batch, steps with an answer, suits)
        return (q[:, LAG:] - rewards).square().mean()


def one_hot(cards: Tensor) -> Tensor:
    """(batch, time) -> (batch, time, suits) in the default dtype."""
    return torch.nn.functional.one_hot(cards, SUITS).to(torch.get_default_dtype())


def first_step(cards: Tensor) -> Tensor:
    """A reset at the first step alone."""
    return (torch.arange(cards.shape[1]) == 0).expand(cards.shape)
