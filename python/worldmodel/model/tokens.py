"""A world model of views: p(o_{t+1} | o_<=t, a_<=t), where an observation is a grid of tokens.

    values = embed(tokens)
    x = what the place memory holds where the next view will be, or values without one
    x = memory blocks over (batch, time, tokens, width), with the action and each token's place in the view
    outputs = head(x), per token: logits of classes, or pixels of a patch

Either part may be left out. A place memory alone is a map; blocks alone are a recurrent video model.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.data.batch import State
from worldmodel.model.blocks import BlockConfig
from worldmodel.model.memory import MemoryConfig, build_memory
from worldmodel.model.motion import GivenMotion, LearnedMotion, Path
from worldmodel.model.place_map import PlaceConfig, PlaceMap
from worldmodel.model.token_codecs import CodebookTokens, IndexTokens, PatchTokens
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Size

STARTS = 32


@dataclasses.dataclass(frozen=True)
class TokenConfig(Checked):
    """A ``TokenWorldModel``.

    Attributes:
        grid: rows and columns of tokens in a view; the agent is in the middle.
        classes: of index grids; of pictures, kinds of patches that are told apart, or 0 to predict pixels as numbers.
        patch: pixels per side of a token; 0 for index grids.
        actions: number of actions.
        width: features per token.
        hidden: units of the heads.
        place: the place memory, if any.
        blocks: memory blocks after it, in order.
        pooled: features per view, if ``blocks`` get one vector per view and not one per token.
        rewards: whether reward, continuation and value are predicted as well.

    Example:
        >>> sum(p.numel() for p in TokenWorldModel(TokenConfig()).parameters())
        1817
    """

    grid: tuple[Size, Size] = (5, 5)
    classes: Annotated[int, Bounds(0, 2**16)] = 9
    patch: Annotated[int, Bounds(0, 256)] = 0
    actions: Size = 4
    width: Size = 16
    hidden: Size = 64
    place: PlaceConfig | None = dataclasses.field(default_factory=PlaceConfig)
    blocks: tuple[BlockConfig, ...] = ()
    pooled: Annotated[int, Bounds(0, 2**16)] = 0
    rewards: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.classes and not self.patch:
            raise ConfigurationError("TokenConfig: classes and patch are 0, expected one of them not to be")
        if self.place is None and not self.blocks:
            raise ConfigurationError("TokenConfig: place is None and blocks is empty, expected a memory")
        if self.place is not None:
            shortest, longest = self.place.period, max(self.grid)
            if shortest < longest:
                raise ConfigurationError(
                    f"TokenConfig: place.period is {shortest}, expected at least the view, {longest}"
                )
            if len(self.place.moves) not in (0, self.actions):
                raise ConfigurationError(
                    f"TokenConfig: place.moves has {len(self.place.moves)} moves, expected one for each of the "
                    f"{self.actions} actions, or none"
                )
            if self.width % max(1, len(self.place.velocities)):
                raise ConfigurationError(
                    f"TokenConfig: width is {self.width}, expected a multiple of the {len(self.place.velocities)} "
                    "velocities"
                )

    @property
    def places(self) -> int:
        """Tokens of a view."""
        return math.prod(self.grid)


@dataclasses.dataclass
class TokenPrediction:
    """What is known of the next view at each step.

    Attributes:
        outputs: (batch, time, places, outputs), of the codec: logits or pixels.
        features: (batch, time, width), pooled.
        path: where views were, of a place memory.
    """

    outputs: Tensor
    features: Tensor
    path: Path | None


class TokenWorldModel(nn.Module):
    """Predicts the next view of a token grid.

    Attributes:
        codec: observations as tokens.
        place: the map of places, or None.
        starts: views that episodes began with, for worlds to begin with: (``STARTS``, places, *token).

    Example:
        >>> model = TokenWorldModel(TokenConfig(actions=4))
        >>> views, actions = torch.randint(0, 9, (2, 6, 25)), torch.randint(0, 4, (2, 6))
        >>> prediction, state = model(views, actions, displacement=torch.zeros(2, 6, 2))
        >>> prediction.outputs.shape, sorted(state)
        (torch.Size([2, 6, 25, 9]), ['place.angle', 'place.heading', 'place.map'])
    """

    starts: Tensor

    def __init__(self, config: TokenConfig) -> None:
        super().__init__()
        self.config = config
        width, places = config.width, config.places
        self.codec: IndexTokens | PatchTokens
        if config.patch and config.classes:
            self.codec = CodebookTokens(config.classes, config.patch, config.grid, width)
        elif config.patch:
            self.codec = PatchTokens(config.patch, config.grid, width)
        else:
            self.codec = IndexTokens(config.classes, config.grid, width)
        self.place = self.stack = None
        if config.place is not None:
            self.place = PlaceMap(config.place, self.codec, config.grid, width, config.actions, config.hidden)
        if config.blocks:
            pooled = config.pooled or width
            self.stack = build_memory(MemoryConfig(pooled, config.blocks, 1 if config.pooled else places))
            self.position = nn.Parameter(torch.randn(places, width) * 0.5)
            self.action = nn.Embedding(config.actions, width)
            self.into = nn.Linear(places * width, pooled) if config.pooled else nn.Identity()
            self.out = nn.Linear(pooled, places * width) if config.pooled else nn.Identity()
        self.head = nn.Sequential(
            nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, self.codec.outputs)
        )
        self.register_buffer("starts", self.codec.empty(STARTS))
        names = ("reward", "continues", "value") if config.rewards else ()
        self.scalars = nn.ModuleDict({name: nn.Linear(width, 1) for name in names})

    def init_state(self, batch_size: int) -> State:
        """A flat dict, batch first."""
        parts = {"place": self.place, "blocks": self.stack}
        waited = {} if self.stack is None else {"elapsed": torch.ones(batch_size)}
        return waited | {
            f"{name}.{key}": value
            for name, part in parts.items()
            if part is not None
            for key, value in part.init_state(batch_size).items()
        }

    @property
    def motion(self) -> GivenMotion | LearnedMotion | None:
        """Of the place memory."""
        return None if self.place is None else self.place.motion

    def forward(
        self,
        observations: Tensor,
        actions: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        displacement: Tensor | None = None,
        turn: Tensor | None = None,
        ahead: Tensor | None = None,
        elapsed: Tensor | None = None,
        hindsight: bool = False,
    ) -> tuple[TokenPrediction, State]:
        """Predicts the view after each step.

        Args:
            observations: (batch, time, ...) of the codec.
            actions: int64 (batch, time), chosen after the observations.
            state: of ``init_state`` or of the last call.
            reset: bool (batch, time), true at an episode's first step.
            displacement: (batch, time, 2), of each step in the agent's own frame, for given motion; by default what the
                actions always do.
            turn: int64 (batch, time), quarter turns clockwise of each step.
            ahead: (batch, time, 2), where to predict, from each view, if that is not where the next one is: of several
                agents in a map, each sees another's step next. For given motion.
            elapsed: (batch, time), from each view to the next in steps, which moves what drifts and scales the steps of
                blocks that take it; 1 by default.
            hindsight: with learned motion, predict where the next view shows that a step led. For training.

        Raises:
            ValueError: no ``displacement`` for given motion, or ``ahead`` with learned motion.
        """
        begins = state is None
        state = self.init_state(len(actions)) if state is None else state
        tokens = self.codec.tokens(observations)
        values = self.codec.embed(tokens)  # (batch, time, places, width)
        carried: State = {}
        path, x = None, values
        if self.place is not None:
            x, path, place = self.place(
                tokens,
                values,
                actions,
                _part(state, "place"),
                reset,
                displacement=displacement,
                turn=turn,
                ahead=ahead,
                elapsed=elapsed,
                hindsight=hindsight,
            )
            carried |= _named("place", place)
        x, memory = self._stacked(x, actions, state, reset, elapsed, begins)
        return TokenPrediction(self.head(x), x.mean(-2), path), carried | memory

    def _stacked(
        self,
        x: Tensor,
        actions: Tensor,
        state: Mapping[str, Tensor],
        reset: Tensor | None,
        elapsed: Tensor | None,
        begins: bool = False,
    ) -> tuple[Tensor, State]:
        """The blocks, which are told the time since the view before.

        ``begins``: ``state`` is the initial one; attention then computes no scores of an empty past.
        """
        if self.stack is None:
            return x, {}
        to_next = torch.ones(actions.shape) if elapsed is None else elapsed.float()
        since = torch.cat([state["elapsed"][:, None], to_next[:, :-1]], 1)
        x = x + self.position + self.action(actions)[:, :, None]
        carried = None if begins else _part(state, "blocks")
        s, memory = self.stack(self.into(x.flatten(2)), carried, reset, elapsed=since)
        return self.out(s.flatten(2)).view_as(x), _named("blocks", memory) | {"elapsed": to_next[:, -1]}

    def imagine(
        self, tokens: Tensor, actions: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None, State]:
        """A step whose next view is imagined; the map of places is read where the action is expected to lead.

        Args:
            tokens: (batch, places, *token), the present views, which the map has already.
            actions: int64 (batch,).
            state: of ``init_state`` or of the last call.

        Returns:
            Outputs (batch, places, outputs) and features (batch, width) of the next views, the move (batch, 2) on the
            map or None, and the state, in which it is made.
        """
        x, moved, carried = self.codec.embed(tokens), None, dict(state)
        if self.place is not None:
            x, moved, place = self.place.imagine(x, actions, _part(state, "place"))
            carried |= _named("place", place)
        stacked, memory = self._stacked(x[:, None], actions[:, None], state, None, None)
        x = stacked[:, 0]
        return self.head(x), x.mean(-2), moved, carried | memory

    @torch.no_grad()
    def begin(self, views: Tensor) -> None:
        """Before training: chooses the codebook, if there is one, and keeps first views; (batch, time, ...)."""
        if isinstance(self.codec, CodebookTokens):
            self.codec.choose(views)
        tokens = self.codec.tokens(views[:, 0])
        self.starts.copy_(tokens[torch.arange(STARTS) % len(tokens)])

    def step(
        self,
        observation: Tensor,
        action: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        displacement: Tensor | None = None,
        turn: Tensor | None = None,
        ahead: Tensor | None = None,
        elapsed: Tensor | None = None,
    ) -> tuple[TokenPrediction, State]:
        """``forward`` of one step; the prediction keeps its dimension of time."""
        rest = {"displacement": displacement, "turn": turn, "ahead": ahead, "elapsed": elapsed}
        given = {name: None if value is None else value[:, None] for name, value in rest.items()}
        return self(observation[:, None], action[:, None], state, None if reset is None else reset[:, None], **given)

    def scalar_losses(
        self, features: Tensor, rewards: Tensor, terminated: Tensor, follows: Tensor, discount: float = 0.99
    ) -> dict[str, Tensor]:
        """Losses of reward, continuation and value.

        Args:
            features: (batch, time, width).
            rewards: (batch, time), of each step.
            terminated: bool (batch, time), whether the step ended the episode.
            follows: (batch, time), 0 where the next view belongs to another episode.
            discount: of the value, whose target is the return of what follows in the batch, then the value itself.
        """
        predicted = {name: head(features).squeeze(-1) for name, head in self.scalars.items()}
        goes_on = (~terminated).to(features.dtype) * follows
        returns, following = [], predicted["value"][:, -1].detach()
        for t in reversed(range(rewards.shape[1])):
            following = rewards[:, t] + discount * goes_on[:, t] * following
            returns.append(following)
        errors = {
            "reward": (predicted["reward"] - rewards).square(),
            "continues": F.binary_cross_entropy_with_logits(
                predicted["continues"], 1 - terminated.float(), reduction="none"
            ),
            "value": (predicted["value"] - torch.stack(returns[::-1], 1)).square(),
        }
        return {name: error.mean() for name, error in errors.items()}


def _part(state: Mapping[str, Tensor], name: str) -> State:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _named(name: str, state: Mapping[str, Tensor]) -> State:
    return {f"{name}.{key}": value for key, value in state.items()}
