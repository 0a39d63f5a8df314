"""Replay: what was seen and done, kept up to a limit of memory and packed into batches.

An episode that fits into a window is kept whole. A batch is rows of ``window`` steps into which whole episodes are
packed one behind the other, each with a reset, so that training on them needs no stored state and cuts no gradient.
Only episodes longer than a window are cut, and only their later pieces use stored states, with burn-in (see
``pieces.py``). States grow old while the weights change: their age, in updates, comes with every batch.

A pass draws every piece once, in random order; the next pass begins when all have been drawn. What arrives during a
pass takes a random place in what is left of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from worldmodel.data.batch import Batch
from worldmodel.data.chunks import Arrays, Piece, Unfinished, joined, split
from worldmodel.data.spaces import ActionSpec, ObservationSpec

_LOOK_AHEAD = 32  # episodes that found no room before a batch counts as full


@dataclasses.dataclass
class ReplayConfig:
    """What replay keeps and how it is packed."""

    batch_size: int = 16
    """Rows of a batch."""
    window: int = 256
    """Steps of a row. Episodes of at most window - 1 actions are kept whole."""
    burn_in: int = 32
    """Steps that warm up the stored state of a row that begins inside an episode. They carry no loss."""
    max_steps: int = 1_000_000
    """Most transitions that are kept; the oldest go first."""
    max_megabytes: float = 1024
    """Most memory that replay takes, in MiB; the oldest go first."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that cannot work."""
        if self.batch_size < 1:
            raise ValueError(f"ReplayConfig: batch_size is {self.batch_size}, expected at least 1")
        if not 0 <= self.burn_in < self.window - 1:
            limits = f"at least 0 and below window - 1 = {self.window - 1}"
            raise ValueError(f"ReplayConfig: burn_in is {self.burn_in}, expected {limits}")
        if self.max_steps < self.window:
            raise ValueError(f"ReplayConfig: max_steps is {self.max_steps}, expected at least window = {self.window}")


class Replay:
    """Transitions of ``num_envs`` environments, as batches.

    Args:
        observation_spec: the leaves of an observation.
        action_spec: shape and dtype of an action.
        num_envs: environments that write at the same time.
        config: sizes and limits.
        empty_state: one row of ``WorldModel.init_state``: names, shapes and dtypes of stored states, and what stands
            in for one where none was given.
        seed: of the order in which pieces are drawn.

    Attributes:
        passes: passes completed, the first of which began with the first piece.
        added: transitions ever added.
        transitions: transitions that are stored and can be drawn.

    Raises:
        ValueError: a memory limit that the unfinished pieces would exceed.
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
        self.passes = 0
        self.added = 0
        self.transitions = 0
        self._random = np.random.default_rng(seed)
        self._unfinished = Unfinished(
            observation_spec, action_spec, num_envs, config.window, config.burn_in, empty_state or {}
        )
        self._pieces: dict[int, Piece] = {}  # number -> piece, oldest first
        self._next_number = 0
        # What is left of this pass, by "begins inside an episode". Evicted pieces stay in the lists, passed over.
        self._left: dict[bool, list[int]] = {False: [], True: []}
        self._undrawn: set[int] = set()
        self._left_transitions = {False: 0, True: 0}
        self._piece_bytes = 0
        self._limit = int(config.max_megabytes * 2**20)
        least = self._unfinished.nbytes * (1 + 1 / num_envs)
        if self._limit < least:
            raise ValueError(
                f"Replay: max_megabytes is {config.max_megabytes}, expected at least {least / 2**20:.3g}, the "
                f"unfinished windows of {num_envs} environments and a finished one; lower window ({config.window}) or "
                "num_envs"
            )

    def __len__(self) -> int:
        """Pieces that can be drawn."""
        return len(self._pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are held."""
        return self._unfinished.nbytes + self._piece_bytes

    def begin(self, rows: np.ndarray, observations: Arrays) -> None:
        """Episodes begin in the environments ``rows``, (n,), with ``observations``, (n, ...) each.

        What those environments left unfinished is dropped.
        """
        self._unfinished.begin(rows, observations)

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
    ) -> None:
        """One transition in each of the environments ``rows``, (n,); everything but ``states`` is (n, ...).

        Args:
            rows: the environments that acted.
            actions: what they did.
            rewards: what it brought.
            terminated: whether it ended the episode for good.
            truncated: whether the episode was cut off there.
            next_observations: what came after it, of the same episode: the last one where the episode ended.
            states: memory states of all environments, (num_envs, ...), as they were in front of this step.
            version: updates of the weights that made ``states``.
        """
        self.added += len(rows)
        for piece in self._unfinished.add(
            rows, actions, rewards, terminated, truncated, next_observations, states, version
        ):
            self._store(piece)
        while self._pieces and (self.transitions > self.config.max_steps or self.nbytes > self._limit):
            number = next(iter(self._pieces))
            self._forget_to_draw(number)
            oldest = self._pieces.pop(number)
            self._piece_bytes -= oldest.nbytes
            self.transitions -= oldest.transitions

    def _store(self, piece: Piece) -> None:
        number, self._next_number = self._next_number, self._next_number + 1
        self._keep(number, piece)
        left = self._left[piece.state is not None]
        left.append(number)
        place = int(self._random.integers(len(left)))
        left[place], left[-1] = left[-1], left[place]
        self._plan_to_draw(number)

    def _plan_to_draw(self, number: int) -> None:
        piece = self._pieces[number]
        self._undrawn.add(number)
        self._left_transitions[piece.state is not None] += piece.transitions

    def _forget_to_draw(self, number: int) -> None:
        if number in self._undrawn:
            piece = self._pieces[number]
            self._undrawn.remove(number)
            self._left_transitions[piece.state is not None] -= piece.transitions

    def _keep(self, number: int, piece: Piece) -> None:
        self._pieces[number] = piece
        self._piece_bytes += piece.nbytes
        self.transitions += piece.transitions

    def sample(self, version: int = 0) -> tuple[Batch, dict[str, float]]:
        """The next batch of the pass.

        Either all rows begin with an episode, or all begin inside one with a stored state; which, is drawn by how much
        of each is left. Whole episodes follow in a row where they fit. A batch of the second kind may have fewer rows
        than ``batch_size``.

        Args:
            version: updates that the weights have seen, from which the age of stored states is counted.

        Returns:
            ``(batch, figures)``: figures to log are ``filled``, the share of the rows that is no padding, and, where
            the batch has stored states, ``state_age`` and ``state_age_max`` in updates.

        Raises:
            RuntimeError: nothing is stored yet.
        """
        if not self._pieces:
            raise RuntimeError("Replay: nothing is stored yet; an episode, or a window of one, has to be there first")
        rows = self._pack(self._begin_inside())
        figures = {"filled": sum(p.steps for row in rows for p in row) / (len(rows) * self.config.window)}
        if rows[0][0].state is not None:
            ages = [version - row[0].version for row in rows]
            figures |= {"state_age": float(np.mean(ages)), "state_age_max": float(max(ages))}
        return self._batch(rows), figures

    def _begin_inside(self) -> bool:
        """Whether the rows of the next batch begin inside an episode."""
        if not self._undrawn:
            self._next_pass()
        whole, inside = self._left_transitions[False], self._left_transitions[True]
        return bool(self._random.random() * (whole + inside) < inside)

    def _next_pass(self) -> None:
        self.passes += 1
        self._left = {False: [], True: []}
        for number in self._random.permutation(list(self._pieces)).tolist():
            self._left[self._pieces[number].state is not None].append(number)
            self._plan_to_draw(number)

    def _draw(self, inside: bool) -> int:
        """The next piece of that kind; there must be one."""
        while (number := self._left[inside].pop()) not in self._undrawn:
            pass
        self._forget_to_draw(number)
        return number

    def _pack(self, inside: bool) -> list[list[Piece]]:
        """The pieces of each row."""
        size, window = self.config.batch_size, self.config.window
        rows: list[list[Piece]] = [[] for _ in range(0 if inside else size)]
        while inside and len(rows) < size and self._left_transitions[True]:
            rows.append([self._pieces[self._draw(True)]])
        room = [window - sum(piece.steps for piece in row) for row in rows]
        waiting: list[int] = []
        while len(waiting) < _LOOK_AHEAD and max(room) > 1:
            if not self._left_transitions[False]:
                # The next pass must not overtake what is left of this one.
                if inside or waiting or self._left_transitions[True]:
                    break
                self._next_pass()
                continue
            number = self._draw(False)
            piece = self._pieces[number]
            row = next((index for index, space in enumerate(room) if space >= piece.steps), None)
            if row is None:
                waiting.append(number)
            else:
                rows[row].append(piece)
                room[row] -= piece.steps
        for number in reversed(waiting):
            self._left[False].append(number)
            self._plan_to_draw(number)
        return [row for row in rows if row]

    def _batch(self, rows: Sequence[Sequence[Piece]]) -> Batch:
        size, window = len(rows), self.config.window
        observations = self.observation_spec.zeros(size, window)  # (batch, time, ...)
        actions = self.action_spec.zeros(size, window)  # (batch, time, ...)
        rewards = np.zeros((size, window), np.float32)
        terminated, has_action, reset, valid = (np.zeros((size, window), bool) for _ in range(4))
        for index, row in enumerate(rows):
            start = 0
            for piece in row:
                last = start + piece.steps - 1
                for name, array in piece.observations.items():
                    observations[name][index, start : last + 1] = array
                actions[index, start:last] = piece.actions
                rewards[index, start:last] = piece.rewards
                terminated[index, last - 1] = piece.terminated
                has_action[index, start:last] = True
                reset[index, start] = piece.state is None
                valid[index, start : last + 1] = True
                start = last + 1
        states = [row[0].state for row in rows if row[0].state is not None]
        names = states[0] if states else ()
        return Batch(
            observations=self.observation_spec.to_tensors(observations),
            actions=torch.from_numpy(actions),
            rewards=torch.from_numpy(rewards),
            terminated=torch.from_numpy(terminated),
            has_action=torch.from_numpy(has_action),
            reset=torch.from_numpy(reset),
            valid=torch.from_numpy(valid),
            state={name: torch.from_numpy(np.stack([state[name] for state in states])) for name in names} or None,
            burn_in=self.config.burn_in if states else 0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later batches depend on."""
        return {
            "unfinished": self._unfinished.state_dict(),
            "pieces": joined(list(self._pieces.values())),
            "numbers": list(self._pieces),
            "next_number": self._next_number,
            "left": [self._left[False], self._left[True]],
            "undrawn": sorted(self._undrawn),
            "passes": self.passes,
            "added": self.added,
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """What ``state_dict`` returned, of a replay with the same configuration."""
        self._unfinished.load_state_dict(saved["unfinished"])
        self._pieces, self._piece_bytes, self.transitions = {}, 0, 0
        for number, piece in zip(saved["numbers"], split(saved["pieces"]), strict=True):
            self._keep(number, piece)
        self._next_number = saved["next_number"]
        self._left = {False: list(saved["left"][0]), True: list(saved["left"][1])}
        self._undrawn, self._left_transitions = set(), {False: 0, True: 0}
        for number in saved["undrawn"]:
            self._plan_to_draw(number)
        self.passes, self.added = saved["passes"], saved["added"]
        self._random.bit_generator.state = saved["random"]
