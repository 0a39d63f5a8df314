"""Recorded episodes in the layouts of others, read a part at a time."""

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.datasets import OBSERVED, Arrays
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.runs.files import RunError, shown

INSTALL = "pip install 'wmkernels[data]'"
_CHUNK = 2**16  # steps whose actions are read at once


class ReadEpisodes(abc.ABC):
    """Episodes for ``RecordedSource``; steps are read as they are asked for.

    The last step of an episode has an observation and no action.

    Args:
        path: for errors.
        lengths: steps of each episode.

    Raises:
        RunError: no episode, or one of less than two steps.

    Attributes:
        observation_spec: set by the subclass, as ``action_spec``.
        steps: of all episodes.
        episodes: their number.
        episode_starts: the first step of each, (episodes,).
    """

    observation_spec: ObservationSpec
    action_spec: ActionSpec

    def __init__(self, path: Path, lengths: np.ndarray) -> None:
        self.path, self.lengths = path, np.asarray(lengths, np.int64)
        if not len(self.lengths):
            raise RunError(f"{path} has no episodes, expected one at least")
        if (self.lengths < 2).any():
            episode = int((self.lengths < 2).argmax())
            raise RunError(
                f"{path}: episode {episode}: it has {self.lengths[episode]} steps, expected two at least, one with an "
                "action"
            )
        self.episode_starts = np.cumsum(self.lengths) - self.lengths
        self.steps, self.episodes = int(self.lengths.sum()), len(self.lengths)

    @abc.abstractmethod
    def _observations(self, episode: int, steps: range) -> Any:
        """In the form of the observation's space, (steps, ...)."""

    @abc.abstractmethod
    def _actions(self, episode: int, start: int, stop: int) -> np.ndarray:
        """In the environment's form, (stop - start, *env_shape)."""

    def _outcomes(self, episode: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and whether the action terminated the episode, (stop - start,); none by default."""
        return np.zeros(stop - start, np.float32), np.zeros(stop - start, bool)

    def place(self, step: int) -> str:
        """Where a step is, as errors name it."""
        episode = int(np.searchsorted(self.episode_starts, step, "right")) - 1
        return f"episode {episode}, step {step - self.episode_starts[episode]}"

    def rows(self, starts: np.ndarray, window: int, every: int = 1) -> Arrays:
        """As ``EpisodeFile.rows``.

        Raises:
            RunError: NaN and other values that the specs do not have, with their episode and step.
        """
        found = [self._row(int(start), window, every) for start in starts]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}

    def _row(self, start: int, window: int, every: int) -> Arrays:
        row: Arrays = {"rewards": np.zeros(window, np.float32)}
        row |= {name: np.zeros(window, bool) for name in ("terminated", "is_first", "is_last")}
        row["actions"] = np.stack([self.action_spec.zeros()] * window)
        seen: list[Arrays] = []
        episode, at = int(np.searchsorted(self.episode_starts, start, "right")) - 1, 0
        while at < window:
            first = start + at - int(self.episode_starts[episode])
            length = int(self.lengths[episode])
            stop = min(first + window - at, length)
            observed = range(first + -at % every, stop, every)
            if len(observed):
                seen.append(self._encoded(episode, observed))
            acting = min(stop, length - 1)
            here = slice(at, at + acting - first)
            row["actions"][here] = self._encoded_actions(episode, first, acting)
            row["rewards"][here], row["terminated"][here] = self._outcomes(episode, first, acting)
            row["is_first"][at], row["is_last"][at + stop - first - 1] = first == 0, stop == length
            at, episode = at + stop - first, episode + 1
        return row | {OBSERVED + name: np.concatenate([part[name] for part in seen]) for name in seen[0]}

    def _encoded(self, episode: int, steps: range) -> Arrays:
        raw = self._observations(episode, steps)
        try:
            return self.observation_spec.encode_batch(raw)
        except ValueError as error:
            for step in steps:
                try:
                    self.observation_spec.encode_batch(self._observations(episode, range(step, step + 1)))
                except ValueError as here:
                    raise self._wrong(episode, step, here) from here
            raise self._wrong(episode, steps[0], error) from error

    def _encoded_actions(self, episode: int, start: int, stop: int) -> np.ndarray:
        encoded = np.zeros((stop - start, *self.action_spec.shape), self.action_spec.dtype)
        for index, action in enumerate(self._actions(episode, start, stop)):
            try:
                encoded[index] = self.action_spec.from_env(action)
            except ValueError as error:
                raise self._wrong(episode, start + index, error) from error
        return encoded

    def _wrong(self, episode: int, step: int, error: object) -> RunError:
        return RunError(f"{self.path}: episode {episode}, step {step}: {shown(error, 300)}")

    def recorded_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest actions, float32 (*env_shape); RunError where one is missing or infinite."""
        low: Any = np.inf
        high: Any = -np.inf
        for episode, start, actions in self._all_actions():
            wrong = ~np.isfinite(actions.reshape(len(actions), -1)).all(1)
            if wrong.any():
                said = "the action is missing or infinite, expected finite numbers"
                raise self._wrong(episode, start + int(wrong.argmax()), said)
            low, high = np.minimum(low, actions.min(0)), np.maximum(high, actions.max(0))
        low, high = (np.asarray(bound, np.float32) for bound in (low, high))
        return low, np.where(high > low, high, low + 1)

    def _all_actions(self) -> Iterator[tuple[int, int, np.ndarray]]:
        for episode, length in enumerate(self.lengths):
            for start in range(0, int(length) - 1, _CHUNK):
                stop = min(start + _CHUNK, int(length) - 1)
                yield episode, start, np.asarray(self._actions(episode, start, stop), np.float64)
