"""A map of places beside the agent's own position on it: a place memory, motion, and views that turn."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from torch import Tensor, nn

from wmkernels.nn import PlaceMemory, lattice
from worldmodel.data.batch import State
from worldmodel.model.motion import GivenMotion, LearnedMotion, Path
from worldmodel.model.token_codecs import TokenCodec
from worldmodel.model.views import HEADINGS, TurnedView, turned
from worldmodel.runs.fields import Bounds, Checked

_OPEN = 2.0  # of an untrained gate, before the sigmoid


@dataclasses.dataclass(frozen=True)
class PlaceConfig(Checked):
    """A memory of places.

    Attributes:
        period: places per side of the lattice, after which places repeat; at least what can be seen of a world. The
            weights do not depend on it.
        motion: "given" with the data, or "learned" by localisation.
        moves: rows and columns of each action, of given motion where the data has no displacement.
        reach: places per step at most, of learned motion.
        turns: whether views turn with the agent.
        velocities: of groups of channels, in places per step, for what moves while unseen; none: all stays.
        gated: whether each token says which groups it writes to, learned: what hides a block tells nothing of it.
        write: "delta" replaces what a place holds, "sum" adds to it.
    """

    period: Annotated[int, Bounds(1, 4096)] = 16
    motion: Literal["given", "learned"] = "given"
    moves: tuple[tuple[int, int], ...] = ()
    reach: Annotated[int, Bounds(1, 16)] = 1
    turns: bool = False
    velocities: tuple[tuple[float, float], ...] = ()
    gated: bool = False
    write: Literal["delta", "sum"] = "delta"


class PlaceMap(nn.Module):
    """Writes views where they are, and reads where the next ones will be.

    Attributes:
        memory: the map, ``wmkernels.nn.PlaceMemory``.
        motion: where views are.
        view: what turns do to them.
    """

    motion: GivenMotion | LearnedMotion

    def __init__(
        self, config: PlaceConfig, codec: TokenCodec, grid: tuple[int, int], width: int, actions: int, hidden: int
    ) -> None:
        super().__init__()
        self.config = config
        self.view = TurnedView(grid, config.turns)
        frequencies, velocities = lattice(config.period), config.velocities or None
        self.memory = PlaceMemory(width, self.view.offsets, frequencies, velocities, config.write)
        self.gate = nn.Linear(width, self.memory.groups) if config.gated else None
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, _OPEN)
        if config.motion == "given":
            self.motion = GivenMotion(config.moves)
        else:
            self.motion = LearnedMotion(codec, grid, width, actions, config.reach, config.turns, hidden)

    def init_state(self, batch_size: int) -> State:
        return {**self.memory.init_state(batch_size), **self.motion.init_state(batch_size)}

    def forward(
        self,
        tokens: Tensor,
        values: Tensor,
        actions: Tensor,
        state: Mapping[str, Tensor],
        reset: Tensor | None,
        *,
        displacement: Tensor | None = None,
        turn: Tensor | None = None,
        ahead: Tensor | None = None,
        elapsed: Tensor | None = None,
        hindsight: bool = False,
    ) -> tuple[Tensor, Path, State]:
        """What the map holds of each next view.

        Args:
            tokens: (batch, time, places, *token).
            values: (batch, time, places, width), to write.
            actions: int64 (batch, time), as all below as ``TokenWorldModel.forward`` has them.
            state: of the steps before.
            reset: first steps.
            displacement: of given motion.
            turn: of given motion.
            ahead: of given motion.
            elapsed: to the next views.
            hindsight: of learned motion.

        Returns:
            (batch, time, places, width), the path and the state.

        Raises:
            ValueError: ``ahead`` with learned motion, or no ``displacement`` for given motion.
        """
        if isinstance(self.motion, LearnedMotion):
            if ahead is not None:
                raise ValueError(
                    "TokenWorldModel: ahead is of given motion; learned motion compares an agent's consecutive views, "
                    "so views of several agents in turn need --model.place.motion given"
                )
            path = self.motion(tokens, values, actions, state, reset, hindsight)
        else:
            path = self.motion(actions, displacement, turn, ahead, state, reset)
        memory = _memory(state)
        if path.first is not None:
            memory = self.memory.move(memory, path.first)
        framed, gate = self.view.to_frame(values, path.headings)
        if self.gate is not None:
            written = self.gate(framed).sigmoid()  # (batch, time, frame places, groups)
            gate = written if gate is None else written * gate[..., None]
        read, memory = self.memory(framed, path.moves, memory, reset, gate=gate, elapsed=elapsed, ahead=path.ahead)
        return self.view.from_frame(read, path.headings_ahead), path, {**memory, **path.state}

    def imagine(self, values: Tensor, actions: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, State]:
        """A step that is not observed: it leads where it is expected to, and nothing is written.

        Args:
            values: (batch, places, width), embeddings of the present views.
            actions: int64 (batch,).
            state: of the steps before.

        Returns:
            What the map holds of the next view, (batch, places, width), the move (batch, 2), and the state after it.
        """
        moved, turn = self.motion.expected(values, actions)
        moved = turned(moved, state["heading"])
        after = {**state, **self.memory.move(_memory(state), moved, 1), "heading": (state["heading"] + turn) % HEADINGS}
        return self.recall(after), moved, after

    def commit(self, state: Mapping[str, Tensor], values: Tensor, write: Tensor) -> State:
        """The state with the places of a view (batch, places, width) written where ``write`` (batch, places) is 1."""
        framed, _ = self.view.to_frame(values, state["heading"])
        write, _ = self.view.to_frame(write[..., None], state["heading"])
        return {**state, **self.write(state, self.view.offsets, framed, write)}

    def write(self, state: Mapping[str, Tensor], offsets: Tensor, values: Tensor, write: Tensor) -> State:
        """The memory's state with ``values`` (batch, places, width) written to the groups that they tell of.

        Args:
            state: of the steps before.
            offsets: (places, 2) from the agent, in the map's frame.
            values: to write.
            write: (batch, places, 1), 0 for places that stay as they are.
        """
        gate = write.squeeze(-1) if self.gate is None else write * self.gate(values).sigmoid()
        return self.memory.write(_memory(state), offsets, values, gate)

    def recall(self, state: Mapping[str, Tensor]) -> Tensor:
        """What the map holds of the present view, (batch, places, width)."""
        return self.view.from_frame(self.memory.read(_memory(state), self.view.offsets), state["heading"])


def _memory(state: Mapping[str, Tensor]) -> State:
    return {"map": state["map"], "angle": state["angle"]}
