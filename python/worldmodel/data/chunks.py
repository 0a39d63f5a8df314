"""Sequence chunks: whole episodes, and windows of longer ones.

Later chunks of an episode hold the agent's memory state before their first step, and repeat ``burn_in`` transitions
without a loss (Kapturowski et al. 2019, "Recurrent experience replay"):

    transitions      0 ......................... window - 1
    first chunk      |==========================|
    second chunk              |-- burn_in ------|===============|
    state stored at           multiples of window - 1 - burn_in
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from worldmodel.data.spaces import ActionSpec, ObservationSpec

Arrays = Mapping[str, np.ndarray]

ARRAY_OVERHEAD = 128  # bytes per NumPy array


@dataclasses.dataclass
class Chunk:
    """An episode or a window of one: n transitions and n + 1 observations.

    Attributes:
        observations: key -> (n + 1, ...).
        actions: (n, ...).
        rewards: float32 (n,).
        terminated: at the last transition.
        state: memory state before the first step, key -> (...); None at an episode's start.
        burn_in: leading transitions without a loss.
        version: weight updates behind ``state``.
        reward_mask: bool (n,); None if all true.
        elapsed: float32 (n + 1,); None for 1.
    """

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    state: dict[str, np.ndarray] | None
    burn_in: int
    version: int
    reward_mask: np.ndarray | None = None
    elapsed: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return len(self.rewards) + 1

    @property
    def transitions(self) -> int:
        """Number of transitions with a loss."""
        return len(self.rewards) - self.burn_in

    @property
    def nbytes(self) -> int:
        optional = [array for array in (self.reward_mask, self.elapsed) if array is not None]
        arrays = [*self.observations.values(), self.actions, self.rewards, *(self.state or {}).values(), *optional]
        return sum(array.nbytes + ARRAY_OVERHEAD for array in arrays)


def cut_episode(
    whole: Chunk, window: int, burn_in: int, states: Sequence[Arrays] | Arrays, version: int = 0
) -> list[Chunk]:
    """Cuts an episode into chunks of at most ``window`` steps.

    ``states``, key -> (...), are those before later chunks, or one for all.
    """
    n, most = len(whole.rewards), window - 1
    chunks: list[Chunk] = []
    start = stop = 0
    while stop < n:
        stop = min(start + most, n)
        steps, transitions = slice(start, stop + 1), slice(start, stop)
        state = None
        if chunks:
            given = states if isinstance(states, Mapping) else states[len(chunks) - 1]
            state = {name: value.copy() for name, value in given.items()}
        chunks.append(
            Chunk(
                {name: array[steps].copy() for name, array in whole.observations.items()},
                whole.actions[transitions].copy(),
                whole.rewards[transitions].copy(),
                whole.terminated and stop == n,
                state,
                burn_in if chunks else 0,
                version if chunks else 0,
                _unless_all(True, None if whole.reward_mask is None else whole.reward_mask[transitions]),
                _unless_all(1.0, None if whole.elapsed is None else whole.elapsed[steps]),
            )
        )
        start += most - burn_in
    return chunks


@dataclasses.dataclass
class _Stored:
    state: dict[str, np.ndarray]
    version: int


class TrajectoryWriter:
    """Unfinished chunks, one per environment."""

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        num_envs: int,
        window: int,
        burn_in: int,
        empty_state: Arrays,
    ) -> None:
        self.max_transitions = window - 1
        self.burn_in = burn_in
        self.stride = self.max_transitions - burn_in
        self.empty_state = {name: value.copy() for name, value in empty_state.items()}
        self._observations = observation_spec.zeros(num_envs, window)  # (num_envs, window, ...)
        self._elapsed = np.ones((num_envs, window), np.float32)
        self._actions = action_spec.zeros(num_envs, self.max_transitions)
        self._rewards = np.zeros((num_envs, self.max_transitions), np.float32)
        self._reward_mask = np.ones((num_envs, self.max_transitions), bool)
        self._length = np.zeros(num_envs, np.int64)
        self._episode_step = np.zeros(num_envs, np.int64)
        self._repeated = np.zeros(num_envs, np.int64)  # burn-in
        self._state: list[_Stored | None] = [None] * num_envs
        self._next_state: list[_Stored | None] = [None] * num_envs

    @property
    def nbytes(self) -> int:
        arrays = (*self._observations.values(), self._elapsed, self._actions, self._rewards, self._reward_mask)
        states = sum(value.nbytes + ARRAY_OVERHEAD for value in self.empty_state.values())
        num_envs = len(self._length)
        return sum(array.nbytes + num_envs * ARRAY_OVERHEAD for array in arrays) + 2 * num_envs * states

    def begin(self, rows: np.ndarray, observations: Arrays) -> None:
        for counts in (self._length, self._episode_step, self._repeated):
            counts[rows] = 0
        for row in rows:
            self._state[row] = self._next_state[row] = None
        for name, array in self._observations.items():
            array[rows, 0] = observations[name]
        self._elapsed[rows, 0] = 1.0

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
        reward_mask: np.ndarray | bool = True,
        elapsed: np.ndarray | float = 1.0,
    ) -> list[Chunk]:
        """As ``Replay.add``; returns completed chunks."""
        if states is not None:
            self._store_states(rows, states, version)
        at = self._length[rows]
        self._actions[rows, at] = actions
        self._rewards[rows, at] = np.where(reward_mask, rewards, 0)
        self._reward_mask[rows, at] = reward_mask
        for name, array in self._observations.items():
            array[rows, at + 1] = next_observations[name]
        self._elapsed[rows, at + 1] = elapsed
        self._length[rows] += 1
        self._episode_step[rows] += 1
        ended = terminated | truncated
        chunks = []
        for index in np.flatnonzero(ended | (self._length[rows] == self.max_transitions)):
            row = int(rows[index])
            chunks.append(self._chunk(row, bool(terminated[index])))
            if not ended[index]:
                self._continue(row)
        return chunks

    def _store_states(self, rows: np.ndarray, states: Mapping[str, Tensor], version: int) -> None:
        step = self._episode_step[rows]
        for row in rows[(step > 0) & (step % self.stride == 0)]:
            stored = _Stored(
                {name: value[row].detach().cpu().numpy().copy() for name, value in states.items()}, version
            )
            begun = self._length[row] == 0  # only without burn-in
            (self._state if begun else self._next_state)[row] = stored

    def _chunk(self, row: int, terminated: bool) -> Chunk:
        n = int(self._length[row])
        stored = None
        if self._episode_step[row] > n:
            stored = self._state[row] or _Stored({name: x.copy() for name, x in self.empty_state.items()}, 0)
        return Chunk(
            {name: array[row, : n + 1].copy() for name, array in self._observations.items()},
            self._actions[row, :n].copy(),
            self._rewards[row, :n].copy(),
            terminated,
            None if stored is None else stored.state,
            int(self._repeated[row]),
            0 if stored is None else stored.version,
            _unless_all(True, self._reward_mask[row, :n]),
            _unless_all(1.0, self._elapsed[row, : n + 1]),
        )

    def _continue(self, row: int) -> None:
        for array in (*self._observations.values(), self._elapsed):
            array[row, : self.burn_in + 1] = array[row, self.stride :].copy()
        for array in (self._actions, self._rewards, self._reward_mask):
            array[row, : self.burn_in] = array[row, self.stride :].copy()
        self._length[row] = self._repeated[row] = self.burn_in
        self._state[row], self._next_state[row] = self._next_state[row], None

    def state_dict(self) -> dict[str, Any]:
        return {
            "observations": self._observations,
            **{name: getattr(self, f"_{name}") for name in _ARRAYS},
            **{name: [_plain(stored) for stored in getattr(self, f"_{name}")] for name in _STATES},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        for name, array in self._observations.items():
            array[...] = saved["observations"][name]
        for name in _ARRAYS:
            getattr(self, f"_{name}")[...] = saved[name]
        for name in _STATES:
            setattr(self, f"_{name}", [None if stored is None else _Stored(*stored) for stored in saved[name]])


_ARRAYS = ("elapsed", "actions", "rewards", "reward_mask", "length", "episode_step", "repeated")
_STATES = ("state", "next_state")


def _plain(stored: _Stored | None) -> tuple[dict[str, np.ndarray], int] | None:
    return None if stored is None else (stored.state, stored.version)


def _unless_all(value: float | bool, array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None or (array == value).all() else array.copy()


def pack_chunks(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Chunks as a few long arrays."""
    if not chunks:
        return {}
    states = [chunk.state for chunk in chunks if chunk.state is not None]
    names = states[0] if states else ()
    packed: dict[str, Any] = {
        "observations": {
            name: np.concatenate([chunk.observations[name] for chunk in chunks]) for name in chunks[0].observations
        },
        "actions": np.concatenate([chunk.actions for chunk in chunks]),
        "rewards": np.concatenate([chunk.rewards for chunk in chunks]),
        "states": {name: np.stack([state[name] for state in states]) for name in names},
        "length": np.array([len(chunk.rewards) for chunk in chunks]),
        "terminated": np.array([chunk.terminated for chunk in chunks]),
        "inside": np.array([chunk.state is not None for chunk in chunks]),
        "burn_in": np.array([chunk.burn_in for chunk in chunks]),
        "version": np.array([chunk.version for chunk in chunks]),
    }
    if any(chunk.reward_mask is not None for chunk in chunks):
        masks = [np.ones(len(c.rewards), bool) if c.reward_mask is None else c.reward_mask for c in chunks]
        packed["reward_mask"] = np.concatenate(masks)
    if any(chunk.elapsed is not None for chunk in chunks):
        times = [np.ones(c.steps, np.float32) if c.elapsed is None else c.elapsed for c in chunks]
        packed["elapsed"] = np.concatenate(times)
    return packed


def unpack_chunks(packed: Mapping[str, Any]) -> list[Chunk]:
    """Inverts ``pack_chunks``."""
    chunks: list[Chunk] = []
    start = used_states = 0
    for index in range(len(packed.get("length", ()))):
        n, state = int(packed["length"][index]), None
        if packed["inside"][index]:
            state = {name: array[used_states].copy() for name, array in packed["states"].items()}
            used_states += 1
        first = start + index  # each earlier chunk has one extra observation
        steps, transitions = slice(first, first + n + 1), slice(start, start + n)
        chunks.append(
            Chunk(
                {name: array[steps].copy() for name, array in packed["observations"].items()},
                packed["actions"][transitions].copy(),
                packed["rewards"][transitions].copy(),
                bool(packed["terminated"][index]),
                state,
                int(packed["burn_in"][index]),
                int(packed["version"][index]),
                _unless_all(True, packed["reward_mask"][transitions] if "reward_mask" in packed else None),
                _unless_all(1.0, packed["elapsed"][steps] if "elapsed" in packed else None),
            )
        )
        start += n
    return chunks
