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

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, as a checkpoint has it: name -> (rows, ...)."""
        transitions = len(self.rewards)
        return {
            **{f"observations.{name}": array for name, array in self.observations.items()},
            "actions": self.actions,
            "rewards": self.rewards,
            "reward_mask": np.ones(transitions, bool) if self.reward_mask is None else self.reward_mask,
            "elapsed": np.ones(transitions + 1, np.float32) if self.elapsed is None else self.elapsed,
            **{f"state.{name}": value[None] for name, value in (self.state or {}).items()},
            "inside": np.array([self.state is not None]),
            "terminated": np.array([self.terminated]),
            "burn_in": np.array([self.burn_in]),
            "version": np.array([self.version]),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "Chunk":
        """Inverts ``arrays``."""
        state = {name: value[0] for name, value in _under("state.", arrays).items()}
        return cls.from_timed_arrays(
            arrays,
            bool(arrays["terminated"][0]),
            state if arrays["inside"][0] else None,
            int(arrays["burn_in"][0]),
            int(arrays["version"][0]),
        )

    @classmethod
    def from_timed_arrays(
        cls, arrays: Arrays, terminated: bool, state: dict[str, np.ndarray] | None, burn_in: int, version: int
    ) -> "Chunk":
        """A chunk of ``arrays`` with names as of ``arrays()``; they are not copied."""
        return cls(
            _under("observations.", arrays),
            arrays["actions"],
            arrays["rewards"],
            terminated,
            state,
            burn_in,
            version,
            _unless_all(True, arrays["reward_mask"]),
            _unless_all(1.0, arrays["elapsed"]),
        )


def _under(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


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


class Trajectory:
    """An unfinished chunk; the room of its arrays grows by half as steps come, up to a window.

    Attributes:
        id: of the chunk.
        arrays: as of ``Chunk.arrays``, with room for more: (at least length + 1, ...).
        length: transitions.
        episode_step: transitions of the episode.
        burn_in: transitions repeated from the chunk before.
        state: memory state before the first step.
        later: memory states before the first steps of later chunks of the episode, by the step of the episode. More
            than one where burn-in is longer than what a chunk adds: several chunks have begun then.
        nbytes: of the arrays.
    """

    def __init__(self, chunk_id: int, empty: Arrays, window: int) -> None:
        self.id = chunk_id
        self.arrays = dict(empty)
        self.length = self.episode_step = self.burn_in = self.nbytes = 0
        self.state: _Stored | None = None
        self.later: dict[int, _Stored] = {}
        self._window = window

    def reserve(self, steps: int) -> None:
        """Room for ``steps`` observations, which depends on them alone: a loaded trajectory takes what it took."""
        if steps <= len(self.arrays["elapsed"]):
            return
        room = _LEAST_ROOM
        while room < steps:
            room += room // 2
        for name, array in self.arrays.items():
            self.arrays[name] = np.empty((min(room, self._window), *array.shape[1:]), array.dtype)
            self.arrays[name][: len(array)] = array
        self.nbytes = sum(array.nbytes + ARRAY_OVERHEAD for array in self.arrays.values())

    def view(self) -> dict[str, np.ndarray]:
        """The rows that are there."""
        return {name: array[: self.length + _has_last(name)] for name, array in self.arrays.items()}


class TrajectoryWriter:
    """Unfinished chunks, one per environment.

    Attributes:
        next_id: of the next chunk.
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
        self.window = window
        self.burn_in = burn_in
        self.stride = window - 1 - burn_in
        self.empty_state = {name: value.copy() for name, value in empty_state.items()}
        self.num_envs = num_envs
        self.next_id = 0
        self._empty = {
            **{f"observations.{name}": array for name, array in observation_spec.zeros(0).items()},
            "actions": action_spec.zeros(0),
            "rewards": np.zeros(0, np.float32),
            "reward_mask": np.zeros(0, bool),
            "elapsed": np.zeros(0, np.float32),
        }  # no step yet
        self._trajectories: list[Trajectory | None] = [None] * num_envs

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    @property
    def running(self) -> dict[int, Trajectory]:
        """By id."""
        return {each.id: each for each in self._trajectories if each is not None}

    @property
    def nbytes(self) -> int:
        num_envs = len(self._trajectories)
        states = sum(value.nbytes + ARRAY_OVERHEAD for value in self.empty_state.values())
        begun = 1 + -(-(self.burn_in + 1) // self.stride)  # chunks of an episode at once
        return sum(each.nbytes for each in self._trajectories if each is not None) + begun * num_envs * states

    @property
    def window_bytes(self) -> int:
        """Of a full window and its memory state."""
        step = sum(array.itemsize * int(np.prod(array.shape[1:])) for array in self._empty.values())
        state = sum(value.nbytes + ARRAY_OVERHEAD for value in self.empty_state.values())
        return self.window * step + len(self._empty) * ARRAY_OVERHEAD + state

    def begin(self, rows: np.ndarray, observations: Arrays) -> None:
        for index, row in enumerate(rows.tolist()):
            begun = self._trajectories[row] = self._new()
            begun.reserve(1)
            for name in observations:
                begun.arrays[f"observations.{name}"][0] = observations[name][index]
            begun.arrays["elapsed"][0] = 1.0

    def _new(self) -> Trajectory:
        return Trajectory(self.new_id(), self._empty, self.window)

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
    ) -> list[tuple[int, Chunk]]:
        """As ``Replay.add``; returns completed chunks and their ids."""
        steps: dict[str, np.ndarray] = {
            **{f"observations.{name}": array for name, array in next_observations.items()},
            "actions": actions,
            "rewards": np.where(reward_mask, rewards, 0),
            "reward_mask": np.broadcast_to(reward_mask, rows.shape),
            "elapsed": np.broadcast_to(elapsed, rows.shape),
        }
        trajectories = [self._running(row) for row in rows.tolist()]
        for row, trajectory in zip(rows.tolist(), trajectories, strict=True):
            if states is not None and trajectory.episode_step and trajectory.episode_step % self.stride == 0:
                self._store_state(trajectory, {name: value[row] for name, value in states.items()}, version)
            trajectory.reserve(trajectory.length + 2)
        for name, array in steps.items():
            following = _has_last(name)
            for trajectory, value in zip(trajectories, array, strict=True):
                trajectory.arrays[name][trajectory.length + following] = value
        chunks = []
        ends = terminated.tolist()
        for row, trajectory, end, cut in zip(rows.tolist(), trajectories, ends, truncated.tolist(), strict=True):
            trajectory.length += 1
            trajectory.episode_step += 1
            if end or cut or trajectory.length == self.window - 1:
                chunks.append((trajectory.id, self._chunk(trajectory, end)))
                self._trajectories[row] = None if end or cut else self._continued(trajectory)
        return chunks

    def _running(self, row: int) -> Trajectory:
        trajectory = self._trajectories[row]
        if trajectory is None:
            raise RuntimeError(f"Replay.add: environment {row} has no first observation; Replay.begin takes it")
        return trajectory

    def _store_state(self, trajectory: Trajectory, state: Mapping[str, Tensor], version: int) -> None:
        stored = _Stored({name: value.detach().cpu().numpy().copy() for name, value in state.items()}, version)
        if trajectory.length == 0:  # only without burn-in
            trajectory.state = stored
        else:
            trajectory.later[trajectory.episode_step] = stored

    def _chunk(self, trajectory: Trajectory, terminated: bool) -> Chunk:
        stored = None
        if trajectory.episode_step > trajectory.length:
            stored = trajectory.state or _Stored({name: x.copy() for name, x in self.empty_state.items()}, 0)
        arrays = {name: array.copy() for name, array in trajectory.view().items()}
        return Chunk.from_timed_arrays(
            arrays,
            terminated,
            None if stored is None else stored.state,
            trajectory.burn_in,
            0 if stored is None else stored.version,
        )

    def _continued(self, trajectory: Trajectory) -> Trajectory:
        following = self._new()
        following.reserve(self.burn_in + 1)
        for name, array in trajectory.view().items():
            repeated = array[self.stride :]
            following.arrays[name][: len(repeated)] = repeated
        following.length = following.burn_in = self.burn_in
        following.episode_step = trajectory.episode_step
        following.later = trajectory.later
        following.state = following.later.pop(trajectory.episode_step - self.burn_in, None)
        return following

    def state_dict(self) -> dict[str, Any]:
        """All but the arrays."""
        return {
            "running": [
                None if each is None else {name: getattr(each, name) for name in ("id", "episode_step", "burn_in")}
                for each in self._trajectories
            ],
            "state": [
                None if each is None or each.state is None else (each.state.state, each.state.version)
                for each in self._trajectories
            ],
            "later": [
                [] if each is None else [(step, stored.state, stored.version) for step, stored in each.later.items()]
                for each in self._trajectories
            ],
            "next_id": self.next_id,
        }

    def load_state_dict(self, saved: Mapping[str, Any], sequences: Mapping[int, Arrays]) -> None:
        self.next_id = saved["next_id"]
        for row, fields in enumerate(saved["running"]):
            self._trajectories[row] = None
            if fields is not None:
                loaded = Trajectory(fields["id"], self._empty, self.window)
                arrays = sequences[fields["id"]]
                loaded.length = len(arrays["elapsed"]) - 1
                loaded.reserve(loaded.length + 1)
                for name, array in arrays.items():
                    loaded.arrays[name][: len(array)] = array
                loaded.episode_step, loaded.burn_in = fields["episode_step"], fields["burn_in"]
                stored = saved["state"][row]
                loaded.state = None if stored is None else _Stored(*stored)
                next_start = loaded.episode_step - loaded.length + self.stride
                for step, state, version in saved["later"][row]:
                    loaded.later[next_start if step is None else step] = _Stored(state, version)
                self._trajectories[row] = loaded


_LEAST_ROOM = 8


def _has_last(name: str) -> bool:
    """Whether an array has a row more than there are transitions: the last observation's."""
    return name == "elapsed" or name.startswith("observations.")


def _unless_all(value: float | bool, array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None or (array == value).all() else array.copy()
