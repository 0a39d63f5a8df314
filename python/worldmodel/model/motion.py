"""Motion: where the agent stands and looks, given or learned by localisation.

Consecutive views overlap. The move of a step is, among a few candidates, the one by which the view after it continues
the view before it (``posterior``). A small network learns to tell it beforehand from the view and the action
(``prior``): predictions are read where the prior leads, and the map follows the posterior once the next view is there.
The prior separates candidates that the views do not separate, so that an imagined view, which agrees with the prior,
follows it. No displacement is ever given.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.data.batch import State
from worldmodel.model.token_codecs import TokenCodec
from worldmodel.model.views import HEADINGS, places_of, turned, view_offsets

_MISMATCH = 4.0  # nats that a place speaks against a candidate: one edited cell does not outweigh a whole view
_CERTAIN = 1e4  # nats, for a move that is known


@dataclasses.dataclass
class Path:
    """A way through the map, in the frame of heading 0.

    Attributes:
        first: (batch, 2), move before the first step, known since its view is there.
        moves: (batch, time, 2), from each step to the next, as far as known.
        ahead: (batch, time, 2), from each step to where the next view is predicted; None if that is ``moves``.
        headings: int64 (batch, time).
        headings_ahead: int64 (batch, time), of the predicted view.
        prior: (batch, time, candidates), log probabilities; None for given motion.
        posterior: of the same shape, of the move that led to each step; None for given motion.
        state: for the next steps.
    """

    first: Tensor | None
    moves: Tensor
    ahead: Tensor | None
    headings: Tensor
    headings_ahead: Tensor
    prior: Tensor | None
    posterior: Tensor | None
    state: State


class GivenMotion(nn.Module):
    """Displacements (batch, time, 2) in the agent's own frame, and turns, come with the data.

    Without ``displacement``, each action always makes its one of ``moves``.
    """

    def __init__(self, moves: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__()
        self.register_buffer("moves", torch.tensor(moves, dtype=torch.float32).view(-1, 2), persistent=False)

    moves: Tensor

    def expected(self, values: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The move (batch, 2) and turn (batch,) that actions (batch,) make. Raises ValueError without moves."""
        if not len(self.moves):
            raise ValueError(
                "motion is given with the data, and actions have no moves: --model.place.moves, or learned"
            )
        return self.moves[actions], torch.zeros_like(actions)

    def init_state(self, batch_size: int) -> State:
        return {"heading": torch.zeros(batch_size, dtype=torch.long)}

    def forward(
        self,
        actions: Tensor,
        displacement: Tensor | None,
        turn: Tensor | None,
        ahead: Tensor | None,
        state: State,
        reset: Tensor | None,
    ) -> Path:
        """The path of the data. Raises ValueError without ``displacement`` where actions have no moves."""
        if displacement is None:
            if not len(self.moves):
                raise ValueError("TokenWorldModel: displacement is missing, expected (batch, time, 2) for given motion")
            displacement = self.moves[actions]
        turn = torch.zeros(displacement.shape[:2], dtype=torch.long) if turn is None else turn
        before = F.pad(turn[:, :-1], (1, 0))
        headings = _headings(before, state["heading"], reset)
        after = (headings + turn) % HEADINGS
        moves = turned(displacement, headings)
        ahead = None if ahead is None else turned(ahead, headings)
        return Path(None, moves, ahead, headings, after, None, None, {"heading": after[:, -1]})


class LearnedMotion(nn.Module):
    """Moves among ``candidates``: to every place within ``reach``, with every turn if ``turns``.

    Attributes:
        candidates: float32 (candidates, 2), in the agent's own frame.
        turns: int64 (candidates,), quarter turns clockwise.
    """

    candidates: Tensor
    turns: Tensor
    source: Tensor
    around: Tensor

    def __init__(
        self, codec: TokenCodec, grid: tuple[int, int], width: int, actions: int, reach: int, turns: bool, hidden: int
    ) -> None:
        super().__init__()
        self.codec, self.actions = [codec], actions  # in a list: its weights are another module's
        offsets, moves = view_offsets(grid), view_offsets((2 * reach + 1, 2 * reach + 1))
        moves = moves[moves.abs().sum(-1).argsort(stable=True)]  # to stay comes first
        candidates = moves.repeat(HEADINGS if turns else 1, 1)
        headings = torch.arange(HEADINGS if turns else 1).repeat_interleave(len(moves))
        shown = turned(offsets, headings[:, None]) + candidates[:, None]  # (candidates, places, 2)
        around = places_of(moves, offsets)
        for name, value in (
            ("candidates", candidates.float()),
            ("turns", headings),
            ("source", places_of(shown, offsets)),  # place before the move of each place after it
            ("around", around[around >= 0]),
        ):
            self.register_buffer(name, value, persistent=False)
        last = nn.Linear(hidden, actions * len(candidates))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(len(self.around) * width, hidden), nn.GELU(), last)

    def init_state(self, batch_size: int) -> State:
        """No step is pending, as if one had certainly stayed."""
        tokens = self.codec[0].empty(batch_size)
        return {
            "heading": torch.zeros(batch_size, dtype=torch.long),
            "view": tokens,
            "prior": self.certain(torch.zeros(batch_size, dtype=torch.long)),
        }

    def certain(self, index: Tensor) -> Tensor:
        """Log probabilities of a move that is known, (..., candidates) for int64 (...)."""
        return (F.one_hot(index, len(self.candidates)).float() - 1) * _CERTAIN

    def prior(self, values: Tensor, actions: Tensor) -> Tensor:
        """Log probabilities (..., candidates), by embeddings (..., places, width) of a view and actions (...)."""
        logits = self.network(values[..., self.around, :].flatten(-2)).unflatten(-1, (self.actions, -1))
        chosen = actions[..., None, None].expand(*actions.shape, 1, logits.shape[-1])
        return logits.gather(-2, chosen).squeeze(-2).log_softmax(-1)

    def expected(self, values: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest move (batch, 2), in the agent's own frame, and turn (batch,), by ``prior``."""
        likeliest = self.prior(values, actions).argmax(-1)
        return self.candidates[likeliest], self.turns[likeliest]

    @torch.no_grad()
    def evidence(self, before: Tensor, after: Tensor) -> Tensor:
        """Log likelihood (batch, time, candidates) of views ``after`` (batch, time, places, *token) those ``before``.

        A candidate is judged by the share of places in both views that differ, so that how many there are is no
        argument for it.
        """
        both = self.source >= 0  # (candidates, places)
        shown = before[:, :, self.source.clamp(min=0)]  # (batch, time, candidates, places, *token)
        differ = ~self.codec[0].same(shown, after[:, :, None]) & both
        share = differ.sum(-1) / both.sum(-1).clamp(min=1)
        return share * -(_MISMATCH * self.source.shape[1])

    def forward(
        self, tokens: Tensor, values: Tensor, actions: Tensor, state: State, reset: Tensor | None, hindsight: bool
    ) -> Path:
        """The path that views show.

        Args:
            tokens: (batch, time, places, *token).
            values: (batch, time, places, width), their embeddings.
            actions: int64 (batch, time).
            state: of the steps before.
            reset: bool (batch, time), or None.
            hindsight: predict where the next view shows that the step led, where there is one: for training.
        """
        prior = self.prior(values, actions)
        pending = torch.cat([state["prior"][:, None].to(prior), prior[:, :-1].detach()], 1)
        before = torch.cat([state["view"][:, None].to(tokens), tokens[:, :-1]], 1)
        posterior = (pending + self.evidence(before, tokens)).log_softmax(-1)
        arrived = posterior.argmax(-1)  # (batch, time), candidate that led to each step
        headings = _headings(self.turns[arrived], state["heading"], reset)
        left = (headings - self.turns[arrived]) % HEADINGS
        led = turned(self.candidates[arrived], left)  # (batch, time, 2)
        guess = prior.argmax(-1)
        if hindsight:
            guess = torch.cat([arrived[:, 1:], guess[:, -1:]], 1)
        ahead = turned(self.candidates[guess], headings)
        after = (headings + self.turns[guess]) % HEADINGS
        carried = {"heading": headings[:, -1], "view": tokens[:, -1], "prior": prior[:, -1].detach()}
        path = Path(led[:, 0], ahead, None, headings, after, prior, posterior, carried)
        if hindsight:  # the last move is made as expected
            path.state |= {"heading": after[:, -1], "prior": self.certain(torch.zeros_like(guess[:, -1]))}
            return path
        moves = torch.cat([led[:, 1:], torch.zeros_like(led[:, :1])], 1)
        return dataclasses.replace(path, moves=moves, ahead=ahead)


def _headings(turns: Tensor, start: Tensor, reset: Tensor | None) -> Tensor:
    """Headings (batch, time) after the ``turns`` that led to each step, from ``start`` (batch,) or 0 at a reset."""
    total = start[:, None] + turns.cumsum(1)
    if reset is not None:
        time = torch.arange(turns.shape[1], device=turns.device)
        last = torch.where(reset, time, -1).cummax(1).values  # the last reset so far
        total = total - torch.where(last >= 0, total.gather(1, last.clamp(min=0)), 0)
    return total % HEADINGS
