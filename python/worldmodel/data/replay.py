"""Replay: a memory-limited store of transitions, packed into batches.

Whole episodes are packed into rows of ``window`` steps. Later chunks start a row, with stored state and burn-in.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch

from worldmodel.data.batch import Batch
from worldmodel.data.checks import check_replay
from worldmodel.data.chunks import Arrays, Chunk, TrajectoryWriter, cut_episode
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Count, Positive, Size
from worldmodel.runs.sequences import Record, Sequences

_MAX_WAITING = 32  # chunks without room that end a batch


@dataclasses.dataclass
class ReplayConfig(Checked):
    """Limits of replay, and the shape of its batches."""

    batch_size: Size = 16
    """Rows per batch."""
    window: Annotated[int, Bounds(2, 10**6)] = 256
    """Steps per row. Episodes of at most window - 1 actions are stored whole."""
    burn_in: Count = 32
    """Steps without a loss that warm up the stored state of a row."""
    max_steps: Count = 1_000_000
    """Most stored transitions; the oldest are removed first."""
    max_megabytes: Positive = 2048
    """Most memory, in MiB; the oldest transitions are removed first. Unfinished chunks, at most a window per
    environment, and the newest finished one stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.burn_in < self.window - 1:
            limits = f"at least 0 and below window - 1 = {self.window - 1}"
            raise ConfigurationError(f"ReplayConfig: burn_in is {self.burn_in}, expected {limits}")
        if self.max_steps < self.window:
            raise ConfigurationError(
                f"ReplayConfig: max_steps is {self.max_steps}, expected at least window = {self.window}"
            )


class Replay:
    """Transitions of ``num_envs`` environments, or recorded episodes: a ``data.source.Source``.

    ``empty_state``, a row of ``WorldModel.init_state``, is a chunk's default state.

    Attributes:
        added: transitions ever added.

    Raises:
        ConfigurationError: the memory limit is below two windows.
    """

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        num_envs: int,
        config: ReplayConfig,
        empty_state: Arrays | None = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.observation_spec = observation_spec
        self.action_spec = action_spec
        self._num_envs = num_envs
        self.epochs = 0
        self.added = 0
        self.transitions = 0
        self._random = np.random.default_rng(seed)
        self._writer = TrajectoryWriter(
            observation_spec, action_spec, num_envs, config.window, config.burn_in, empty_state or {}
        )
        self._chunks: dict[int, Chunk] = {}  # oldest first
        self._record = Record()  # of what checkpoints have
        # Evicted chunks stay listed.
        self._remaining: dict[bool, list[int]] = {False: [], True: []}
        self._unsampled: set[int] = set()
        self._remaining_transitions = {False: 0, True: 0}
        self._chunk_bytes = 0
        self._limit = int(config.max_megabytes * 2**20)
        least = 2 * self._writer.window_bytes
        if self._limit < least:
            raise ConfigurationError(
                f"Replay: max_megabytes is {config.max_megabytes}, expected at least {least / 2**20:.3g}, "
                f"an unfinished window of {config.window} steps and a finished one; lower window"
            )

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def nbytes(self) -> int:
        return self._writer.nbytes + self._chunk_bytes

    @property
    def capacity(self) -> tuple[int, int]:
        """Steps that fit, and their bytes, where episodes are longer than a window."""
        window, new = self._writer.window_bytes, self._writer.stride
        steps = min(self.config.max_steps, self._limit * new // window)
        return steps, min(self._limit, -(-steps * window // new))

    def most_bytes(self, steps: int | None = None) -> int:
        """Most memory, after at most ``steps``: the limit, or all unfinished windows and a finished one."""
        window = self._writer.window_bytes
        most = max(self.capacity[1], (self._num_envs + 1) * window)
        if steps is None:
            return most
        whole = -(-steps // self._writer.stride) + self._num_envs  # at most half of a window's room is not used
        return min(most, 2 * whole * window)

    def begin(self, rows: np.ndarray, observations: Arrays) -> None:
        """Starts episodes in ``rows``, (n,), with ``observations``, (n, ...)."""
        self._writer.begin(rows, observations)

    def add(
        self,
        rows: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        next_observations: Arrays,
        states: Mapping[str, torch.Tensor] | None = None,
        version: int = 0,
        *,
        reward_mask: np.ndarray | bool = True,
        elapsed: np.ndarray | float = 1.0,
    ) -> None:
        """One transition per environment in ``rows``, (n,); arrays are (n, ...), masks and times as in ``Batch``.

        ``next_observations`` belong to the same episode, even where it ended. ``states``, (num_envs, ...), precede the
        step; their weights had ``version`` updates.
        """
        self.added += len(rows)
        for chunk_id, chunk in self._writer.add(
            rows, actions, rewards, terminated, truncated, next_observations, states, version, reward_mask, elapsed
        ):
            self._store(chunk_id, chunk)
        self._evict()

    def add_episode(
        self,
        observations: Arrays,
        actions: np.ndarray,
        rewards: np.ndarray,
        *,
        terminated: bool,
        reward_mask: np.ndarray | None = None,
        elapsed: np.ndarray | None = None,
    ) -> None:
        """A recorded episode of n actions; cut if longer than a window.

        Args:
            observations: key -> (n + 1, ...), from ``ObservationSpec.encode_batch``.
            actions: (n, *ActionSpec.shape).
            rewards: (n,), in the environment's units; arbitrary where unknown.
            terminated: false if truncated.
            reward_mask: bool (n,); None if all rewards are known.
            elapsed: (n + 1,), as in ``Batch``; None for 1.

        Raises:
            ValueError: no action, NaN, infinity, negative ``elapsed``, or a mismatch with the specs.

        Example:
            >>> from gymnasium import spaces
            >>> specs = ObservationSpec.from_space(spaces.Discrete(4)), ActionSpec.from_space(spaces.Discrete(2))
            >>> replay = Replay(*specs, num_envs=1, config=ReplayConfig(batch_size=1, window=8, burn_in=0))
            >>> seen = {"observation": np.array([[0], [3], [1]])}
            >>> replay.add_episode(seen, np.array([1, 0]), np.array([0.0, 1.0]), terminated=True)
            >>> replay.sample()[0].rewards[0, :3]
            tensor([0., 1., 0.])
        """
        n = len(actions)
        if n < 1:
            raise ValueError("Replay.add_episode: actions is empty, expected at least one")
        mask = np.ones(n, bool) if reward_mask is None else np.asarray(reward_mask)
        times = np.ones(n + 1, np.float32) if elapsed is None else np.asarray(elapsed)
        if mask.dtype != bool:
            raise ValueError(f"Replay.add_episode: reward_mask has dtype {mask.dtype}, expected bool")
        for name, array, length in (
            ("rewards", np.asarray(rewards), n),
            ("reward_mask", mask, n),
            ("elapsed", times, n + 1),
        ):
            if array.shape != (length,):
                raise ValueError(f"Replay.add_episode: {name} has shape {array.shape}, expected ({length},)")
        known = np.where(mask, rewards, 0).astype(np.float32)
        if not np.isfinite(known).all():
            raise ValueError(
                "Replay.add_episode: rewards holds NaN or infinity, expected finite numbers where they are known"
            )
        if not (np.isfinite(times).all() and (times >= 0).all()):
            raise ValueError("Replay.add_episode: elapsed holds NaN, infinity or a negative time, expected at least 0")
        whole = Chunk(
            self.observation_spec.check(observations, n + 1, "Replay.add_episode"),
            self.action_spec.check(actions, n, "Replay.add_episode"),
            known,
            bool(terminated),
            None,
            0,
            0,
            mask,
            times.astype(np.float32),
        )
        self.added += n
        config = self.config
        for chunk in cut_episode(whole, config.window, config.burn_in, self._writer.empty_state):
            self._store(self._writer.new_id(), chunk)
        self._evict()

    def _evict(self) -> None:
        while len(self._chunks) > 1 and (self.transitions > self.config.max_steps or self.nbytes > self._limit):
            oldest_id = next(iter(self._chunks))
            self._mark_sampled(oldest_id)
            oldest = self._chunks.pop(oldest_id)
            self._chunk_bytes -= oldest.nbytes
            self.transitions -= oldest.transitions

    def _store(self, chunk_id: int, chunk: Chunk) -> None:
        self._insert(chunk_id, chunk)
        remaining = self._remaining[chunk.state is not None]
        remaining.append(chunk_id)
        index = int(self._random.integers(len(remaining)))
        remaining[index], remaining[-1] = remaining[-1], remaining[index]
        self._mark_unsampled(chunk_id)

    def _insert(self, chunk_id: int, chunk: Chunk) -> None:
        self._chunks[chunk_id] = chunk
        self._chunk_bytes += chunk.nbytes
        self.transitions += chunk.transitions

    def _mark_unsampled(self, chunk_id: int) -> None:
        chunk = self._chunks[chunk_id]
        self._unsampled.add(chunk_id)
        self._remaining_transitions[chunk.state is not None] += chunk.transitions

    def _mark_sampled(self, chunk_id: int) -> None:
        if chunk_id in self._unsampled:
            chunk = self._chunks[chunk_id]
            self._unsampled.remove(chunk_id)
            self._remaining_transitions[chunk.state is not None] -= chunk.transitions

    def sample(self, version: int = 0) -> tuple[Batch, dict[str, float]]:
        """The next batch of the epoch, ``version`` updates into training.

        Metrics are ``filled``, the fraction of steps without padding, and ``state_age``, ``state_age_max`` of stored
        states, in updates.

        Raises:
            RuntimeError: nothing is stored yet.
        """
        if not self._chunks:
            raise RuntimeError("Replay: nothing is stored yet; an episode, or a window of one, has to be there first")
        if not self._unsampled:
            self._next_epoch()
        rows = self._pack(self._rows_inside())
        metrics = {"filled": sum(c.steps for row in rows for c in row) / (len(rows) * self.config.window)}
        ages = [version - row[0].version for row in rows if row[0].state is not None]
        if ages:
            metrics |= {"state_age": float(np.mean(ages)), "state_age_max": float(max(ages))}
        return self._batch(rows), metrics

    def _rows_inside(self) -> int:
        whole, inside = self._remaining_transitions[False], self._remaining_transitions[True]
        return int(self.config.batch_size * inside / (whole + inside) + self._random.random())

    def _next_epoch(self) -> None:
        self.epochs += 1
        self._remaining = {False: [], True: []}
        for chunk_id in self._random.permutation(list(self._chunks)).tolist():
            self._remaining[self._chunks[chunk_id].state is not None].append(chunk_id)
            self._mark_unsampled(chunk_id)

    def _draw(self, inside: bool) -> int:
        while (chunk_id := self._remaining[inside].pop()) not in self._unsampled:
            pass
        self._mark_sampled(chunk_id)
        return chunk_id

    def _pack(self, inside: int) -> list[list[Chunk]]:
        size, window = self.config.batch_size, self.config.window
        rows: list[list[Chunk]] = [[] for _ in range(size)]
        for row in rows[: min(inside, size)]:
            if self._remaining_transitions[True]:
                row.append(self._chunks[self._draw(True)])
        room = [window - sum(chunk.steps for chunk in row) for row in rows]
        waiting: list[int] = []
        while len(waiting) < _MAX_WAITING and max(room) > 1:
            if self._remaining_transitions[False]:
                chunk_id = self._draw(False)
            elif self._remaining_transitions[True] and window in room:
                chunk_id = self._draw(True)
            elif waiting or self._remaining_transitions[True]:
                break
            else:
                self._next_epoch()
                continue
            chunk = self._chunks[chunk_id]
            needed = chunk.steps if chunk.state is None else window
            index = next((index for index, space in enumerate(room) if space >= needed), None)
            if index is None:
                waiting.append(chunk_id)
            else:
                rows[index].append(chunk)
                room[index] -= chunk.steps
        for chunk_id in reversed(waiting):
            self._remaining[False].append(chunk_id)
            self._mark_unsampled(chunk_id)
        return [row for row in rows if row]

    def _batch(self, rows: Sequence[Sequence[Chunk]]) -> Batch:
        size, window = len(rows), self.config.window
        observations = self.observation_spec.zeros(size, window)  # (batch, time, ...)
        actions = self.action_spec.zeros(size, window)
        rewards = np.zeros((size, window), np.float32)
        terminated, is_first, valid = (np.zeros((size, window), bool) for _ in range(3))
        is_last, loss_mask, reward_mask = (np.ones((size, window), bool) for _ in range(3))
        elapsed = np.ones((size, window), np.float32)
        for index, row in enumerate(rows):
            start = 0
            for chunk in row:
                last = start + chunk.steps - 1
                for name, array in chunk.observations.items():
                    observations[name][index, start : last + 1] = array
                actions[index, start:last] = chunk.actions
                rewards[index, start:last] = chunk.rewards
                terminated[index, last - 1] = chunk.terminated
                is_last[index, start:last] = False
                is_first[index, start] = chunk.state is None
                valid[index, start : last + 1] = True
                loss_mask[index, start : start + chunk.burn_in] = False
                if chunk.reward_mask is not None:
                    reward_mask[index, start:last] = chunk.reward_mask
                if chunk.elapsed is not None:
                    elapsed[index, start : last + 1] = chunk.elapsed
                start = last + 1
        return Batch(
            observations=self.observation_spec.to_tensors(observations),
            actions=torch.from_numpy(actions),
            rewards=torch.from_numpy(rewards),
            terminated=torch.from_numpy(terminated),
            is_last=torch.from_numpy(is_last),
            is_first=torch.from_numpy(is_first),
            valid=torch.from_numpy(valid),
            state=self._states([row[0].state for row in rows]),
            loss_mask=torch.from_numpy(loss_mask),
            reward_mask=torch.from_numpy(reward_mask),
            elapsed=torch.from_numpy(elapsed),
        )

    def _states(self, states: Sequence[dict[str, np.ndarray] | None]) -> dict[str, torch.Tensor] | None:
        if all(state is None for state in states):
            return None
        empty = self._writer.empty_state
        given = [empty if state is None else state for state in states]
        return {name: torch.from_numpy(np.stack([state[name] for state in given])) for name in empty} or None

    def state_dict(self) -> dict[str, Any]:
        running = self._writer.running
        return {
            "sequences": Sequences([*self._chunks, *running], running.keys(), self._arrays, self._record),
            "writer": self._writer.state_dict(),
            "chunk_ids": list(self._chunks),
            "remaining": [self._remaining[False], self._remaining[True]],
            "unsampled": sorted(self._unsampled),
            "epochs": self.epochs,
            "added": self.added,
            "random": self._random.bit_generator.state,
        }

    def _arrays(self, chunk_id: int) -> Arrays:
        return self._chunks[chunk_id].arrays() if chunk_id in self._chunks else self._writer.running[chunk_id].view()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        empty, num_envs = self._writer.empty_state, self._writer.num_envs
        check_replay(saved, self.observation_spec, self.action_spec, self.config.window, num_envs, empty)
        sequences = saved["sequences"]
        self._record = Record(sequences.saved)
        self._writer.load_state_dict(saved["writer"], sequences)
        self._chunks, self._chunk_bytes, self.transitions = {}, 0, 0
        for chunk_id in saved["chunk_ids"]:
            self._insert(chunk_id, Chunk.from_arrays(sequences[chunk_id]))
        self._remaining = {False: list(saved["remaining"][0]), True: list(saved["remaining"][1])}
        self._unsampled, self._remaining_transitions = set(), {False: 0, True: 0}
        for chunk_id in saved["unsampled"]:
            self._mark_unsampled(chunk_id)
        self.epochs, self.added = saved["epochs"], saved["added"]
        self._random.bit_generator.state = saved["random"]
