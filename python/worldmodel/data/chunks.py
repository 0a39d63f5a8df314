"""Pieces of experience: episodes that are whole, and windows of episodes too long for one.

``Unfinished`` takes transitions as they happen and hands out a ``Piece`` whenever one is complete. All pieces of a long
episode but the first begin inside it. Such a piece carries the memory state that the acting agent had in front of its
first step, and repeats ``burn_in`` transitions of the piece before it, which warm that state up:

    transitions      0 ......................... window - 1
    first piece      |==========================|
    second piece              |-- burn_in ------|===============|
    state kept at             window - 1 - burn_in, and every so many transitions from there

So every transition is learned from in exactly one piece.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from worldmodel.data.spaces import ActionSpec, ObservationSpec

Arrays = Mapping[str, np.ndarray]

ARRAY_OVERHEAD = 128  # bytes that NumPy takes for an array beside its content


@dataclasses.dataclass
class Piece:
    """An episode, or a window of a long one: n transitions and n + 1 observations.

    Attributes:
        observations: leaf name -> (n + 1, ...).
        actions: (n, ...).
        rewards: float32 (n,).
        terminated: whether the last transition ended the episode for good.
        state: the memory state in front of the first step; None where an episode begins.
        burn_in: transitions at the start that another piece learns from.
        version: updates that the weights had seen which made ``state``.
    """

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    state: dict[str, np.ndarray] | None
    burn_in: int
    version: int

    @property
    def steps(self) -> int:
        """Steps that it takes in a row."""
        return len(self.rewards) + 1

    @property
    def transitions(self) -> int:
        """Transitions that are learned from."""
        return len(self.rewards) - self.burn_in

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        arrays = [*self.observations.values(), self.actions, self.rewards, *(self.state or {}).values()]
        return sum(array.nbytes + ARRAY_OVERHEAD for array in arrays)


@dataclasses.dataclass
class _Stored:
    """A memory state, and the updates that its weights had seen."""

    state: dict[str, np.ndarray]
    version: int


class Unfinished:
    """The pieces that environments are in the middle of, a row an environment.

    Args:
        observation_spec: the leaves of an observation.
        action_spec: shape and dtype of an action.
        num_envs: environments.
        window: steps of the longest piece, the last of which is an observation alone.
        burn_in: transitions that a piece repeats of the one before it.
        empty_state: the state of a piece for which the acting agent had none, one row: name -> (...).
    """

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        num_envs: int,
        window: int,
        burn_in: int,
        empty_state: Arrays,
    ) -> None:
        self.most = window - 1
        self.burn_in = burn_in
        self.stride = self.most - burn_in  # transitions between the first steps of an episode's pieces
        self._empty_state = dict(empty_state)
        self._observations = observation_spec.zeros(num_envs, window)  # (num_envs, window, ...)
        self._actions = action_spec.zeros(num_envs, self.most)  # (num_envs, window - 1, ...)
        self._rewards = np.zeros((num_envs, self.most), np.float32)
        self._length = np.zeros(num_envs, np.int64)  # transitions of the piece that are there
        self._episode_step = np.zeros(num_envs, np.int64)
        self._repeated = np.zeros(num_envs, np.int64)  # transitions at the start that the piece before learns from
        self._state: list[_Stored | None] = [None] * num_envs
        self._next_state: list[_Stored | None] = [None] * num_envs

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds, with every state there."""
        arrays = (*self._observations.values(), self._actions, self._rewards)
        states = sum(value.nbytes + ARRAY_OVERHEAD for value in self._empty_state.values())
        num_envs = len(self._length)
        return sum(array.nbytes + num_envs * ARRAY_OVERHEAD for array in arrays) + 2 * num_envs * states

    def begin(self, rows: np.ndarray, observations: Arrays) -> None:
        """Episodes begin in ``rows``, (n,), with ``observations``, (n, ...). What was unfinished there is dropped."""
        for counts in (self._length, self._episode_step, self._repeated):
            counts[rows] = 0
        for row in rows:
            self._state[row] = self._next_state[row] = None
        for name, array in self._observations.items():
            array[rows, 0] = observations[name]

    def add(
        self,
        rows: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        next_observations: Arrays,
        states: Mapping[str, Tensor] | None,
        version: int,
    ) -> list[Piece]:
        """One transition in each of ``rows``; arguments as for ``Replay.add``. Returns the pieces that it completed."""
        if states is not None:
            self._keep_states(rows, states, version)
        at = self._length[rows]
        self._actions[rows, at] = actions
        self._rewards[rows, at] = rewards
        for name, array in self._observations.items():
            array[rows, at + 1] = next_observations[name]
        self._length[rows] += 1
        self._episode_step[rows] += 1
        ended = terminated | truncated
        pieces = []
        for index in np.flatnonzero(ended | (self._length[rows] == self.most)):
            row = int(rows[index])
            pieces.append(self._piece(row, bool(terminated[index])))
            if not ended[index]:
                self._continue(row)
        return pieces

    def _keep_states(self, rows: np.ndarray, states: Mapping[str, Tensor], version: int) -> None:
        """Where a later piece will begin, the state in front of the step is kept for it."""
        step = self._episode_step[rows]
        for row in rows[(step > 0) & (step % self.stride == 0)]:
            stored = _Stored(
                {name: value[row].detach().cpu().numpy().copy() for name, value in states.items()}, version
            )
            begun = self._length[row] == 0  # without burn-in, the piece that needs it has just begun
            (self._state if begun else self._next_state)[row] = stored

    def _piece(self, row: int, terminated: bool) -> Piece:
        n = int(self._length[row])
        stored = None
        if self._episode_step[row] > n:
            stored = self._state[row] or _Stored({name: x.copy() for name, x in self._empty_state.items()}, 0)
        return Piece(
            {name: array[row, : n + 1].copy() for name, array in self._observations.items()},
            self._actions[row, :n].copy(),
            self._rewards[row, :n].copy(),
            terminated,
            None if stored is None else stored.state,
            int(self._repeated[row]),
            0 if stored is None else stored.version,
        )

    def _continue(self, row: int) -> None:
        """The next piece begins with the last transitions of the one just completed."""
        for array in self._observations.values():
            array[row, : self.burn_in + 1] = array[row, self.stride :].copy()
        for array in (self._actions, self._rewards):
            array[row, : self.burn_in] = array[row, self.stride :].copy()
        self._length[row] = self._repeated[row] = self.burn_in
        self._state[row], self._next_state[row] = self._next_state[row], None

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "observations": self._observations,
            **{name: getattr(self, f"_{name}") for name in _ARRAYS},
            **{name: [_plain(stored) for stored in getattr(self, f"_{name}")] for name in _STATES},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """What ``state_dict`` returned."""
        for name, array in self._observations.items():
            array[...] = saved["observations"][name]
        for name in _ARRAYS:
            getattr(self, f"_{name}")[...] = saved[name]
        for name in _STATES:
            setattr(self, f"_{name}", [None if stored is None else _Stored(*stored) for stored in saved[name]])


_ARRAYS = ("actions", "rewards", "length", "episode_step", "repeated")
_STATES = ("state", "next_state")


def _plain(stored: _Stored | None) -> tuple[dict[str, np.ndarray], int] | None:
    return None if stored is None else (stored.state, stored.version)


def joined(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Pieces as few long arrays, which a checkpoint holds better than many short ones."""
    if not pieces:
        return {}
    states = [piece.state for piece in pieces if piece.state is not None]
    names = states[0] if states else ()
    return {
        "observations": {
            name: np.concatenate([piece.observations[name] for piece in pieces]) for name in pieces[0].observations
        },
        "actions": np.concatenate([piece.actions for piece in pieces]),
        "rewards": np.concatenate([piece.rewards for piece in pieces]),
        "states": {name: np.stack([state[name] for state in states]) for name in names},
        "length": np.array([len(piece.rewards) for piece in pieces]),
        "terminated": np.array([piece.terminated for piece in pieces]),
        "inside": np.array([piece.state is not None for piece in pieces]),
        "burn_in": np.array([piece.burn_in for piece in pieces]),
        "version": np.array([piece.version for piece in pieces]),
    }


def split(saved: Mapping[str, Any]) -> list[Piece]:
    """The pieces that ``joined`` joined."""
    pieces: list[Piece] = []
    start = used_states = 0
    for index in range(len(saved.get("length", ()))):
        n, state = int(saved["length"][index]), None
        if saved["inside"][index]:
            state = {name: array[used_states].copy() for name, array in saved["states"].items()}
            used_states += 1
        first = start + index  # every piece before this one has one observation more than it has transitions
        pieces.append(
            Piece(
                {name: array[first : first + n + 1].copy() for name, array in saved["observations"].items()},
                saved["actions"][start : start + n].copy(),
                saved["rewards"][start : start + n].copy(),
                bool(saved["terminated"][index]),
                state,
                int(saved["burn_in"][index]),
                int(saved["version"][index]),
            )
        )
        start += n
    return pieces
