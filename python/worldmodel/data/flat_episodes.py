"""Recorded episodes in the layout of latent-planning data sets, such as stable-worldmodel's: HDF5 of flat columns.

    ep_len, ep_offset   whole numbers (episodes,): steps of each episode, and its first row
    action              (rows, width), not read at an episode's last step, where it is NaN
    pixels, ...         (rows, ...): numbers, of each step

Episodes follow one another in the file's order. Rewards are not read: what they belong to differs between data sets.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import RunError, shown
from worldmodel.runs.optional_dependencies import missing, require

try:
    from gymnasium import spaces
except ImportError as error:
    raise missing(error, "describe what is seen and done") from error

_CHUNK = 2**16  # rows that are read at once


class Column(Protocol):
    """An array on disk; slices are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, index: Any) -> Any: ...


class FlatEpisodes:
    """Episodes of flat columns, for ``RecordedSource``; rows are read as they are asked for.

    Args:
        path: of the file, for errors.
        columns: by name.
        observations: names of the columns that are observed.

    Attributes:
        observation_spec: of the columns observed; uint8 are pixels.
        action_spec: numbers between the least and the largest ones recorded.

    Raises:
        RunError: missing columns, other shapes, an episode of one step, actions that are missing or infinite.

    Example:
        >>> columns = {"ep_len": np.array([3, 2]), "ep_offset": np.array([0, 3]), "place": np.zeros((5, 2))}
        >>> columns["action"] = np.array([[0.0], [4.0], [np.nan], [2.0], [np.nan]])
        >>> file = FlatEpisodes(Path("walks.h5"), columns, ["place"])
        >>> file.rows(np.array([0]), 5)["actions"][0, :, 0].tolist(), file.place(3)
        ([-1.0, 1.0, 0.0, 0.0, 0.0], 'episode 1, step 0')
    """

    def __init__(self, path: Path, columns: Mapping[str, Column], observations: Sequence[str] = ("pixels",)) -> None:
        self.path, self._columns, self._observed = path, columns, list(observations)
        for name in ("ep_len", "ep_offset", "action", *observations):
            if name not in columns:
                raise RunError(
                    f"{path} has no column {shown(name)}, expected ep_len, ep_offset, action and what is observed"
                )
        lengths, self._starts = (np.asarray(columns[name][:]) for name in ("ep_len", "ep_offset"))
        self._check_episodes(lengths)
        self.steps = int(lengths.sum())
        self.episodes = len(lengths)
        for name in ("action", *observations):
            shape, dtype = columns[name].shape, columns[name].dtype
            if shape[:1] != (self.steps,) or dtype.kind not in "biuf" or (name == "action" and len(shape) != 2):
                raise RunError(
                    f"{path}: {shown(name)} is {dtype} {shape}, expected numbers of {self.steps} rows"
                    f"{', (rows, width)' if name == 'action' else ''}"
                )
        self._first, self._last = np.zeros((2, self.steps), bool)
        self._first[self._starts] = self._last[self._starts + lengths - 1] = True
        try:
            self.observation_spec = ObservationSpec.from_space(
                spaces.Dict({name: _space(columns[name]) for name in observations})
            )
        except ConfigurationError as error:
            raise RunError(f"{path}: {error}") from error
        self._low, self._high = self._bounds()
        self.action_spec = ActionSpec.from_space(spaces.Box(self._low, self._high))

    @classmethod
    def open(cls, path: Path, observations: Sequence[str] = ("pixels",)) -> "FlatEpisodes":
        """An HDF5 file. Raises MissingPackage without h5py; RunError as the constructor, or for another file."""
        h5py = require("h5py", "read HDF5", "pip install h5py")
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise RunError(f"{path} cannot be read as HDF5: {shown(error, 300)}") from error
        return cls(path, {name: value for name, value in file.items() if isinstance(value, h5py.Dataset)}, observations)

    @property
    def episode_starts(self) -> np.ndarray:
        """The first step of each episode, (episodes,)."""
        return self._starts

    def place(self, step: int) -> str:
        """Where a row of the file is, as errors name it."""
        episode = int(np.searchsorted(self._starts, step, "right")) - 1
        return f"episode {episode}, step {step - self._starts[episode]}"

    def rows(self, starts: np.ndarray, window: int, every: int = 1) -> dict[str, np.ndarray]:
        """As ``EpisodeFile.rows``; rewards are 0.

        Raises:
            RunError: NaN and other values that the specs do not have, with their episode and step.
        """
        index = np.asarray(starts)[:, None] + np.arange(window)
        seen: dict[str, list[np.ndarray]] = {f"observations/{name}": [] for name in self._observed}
        for start in starts:
            for name, array in self._observations(int(start), window, every).items():
                seen[f"observations/{name}"].append(array)
        last = self._last[index]
        actions = np.stack([self._columns["action"][start : start + window] for start in starts])
        encoded = 2 * (actions.astype(np.float64) - self._low) / (self._high - self._low) - 1
        return {
            **{name: np.stack(arrays) for name, arrays in seen.items()},
            "actions": np.where(last[..., None], 0, encoded.clip(-1, 1)).astype(np.float32),
            "rewards": np.zeros(index.shape, np.float32),
            "terminated": np.zeros(index.shape, bool),
            "is_first": self._first[index],
            "is_last": last,
        }

    def _observations(self, start: int, window: int, every: int) -> dict[str, np.ndarray]:
        cut = {name: np.asarray(self._columns[name][start : start + window : every]) for name in self._observed}
        try:
            return self.observation_spec.encode_batch(cut)
        except ValueError as error:
            for index in range(-(-window // every)):
                try:
                    self.observation_spec.encode({name: array[index] for name, array in cut.items()})
                except ValueError as here:
                    raise RunError(f"{self.path}: {self.place(start + index * every)}: {here}") from here
            raise RunError(f"{self.path}: {error}") from error

    def _check_episodes(self, lengths: np.ndarray) -> None:
        starts = self._starts
        if lengths.ndim != 1 or lengths.shape != starts.shape or not len(lengths):
            raise RunError(f"{self.path}: ep_len is {lengths.shape} and ep_offset {starts.shape}, expected (episodes,)")
        if lengths.dtype.kind not in "iu" or starts.dtype.kind not in "iu":
            raise RunError(
                f"{self.path}: ep_len is {lengths.dtype} and ep_offset {starts.dtype}, expected whole numbers"
            )
        expected = np.cumsum(lengths) - lengths
        for wrong, said in (
            (lengths < 2, "it has {length} steps, expected two at least, one with an action"),
            (starts != expected, "it begins at row {start}, expected {expected}, where the one before ends"),
        ):
            if wrong.any():
                episode = int(wrong.argmax())
                values = {"length": lengths[episode], "start": starts[episode], "expected": expected[episode]}
                raise RunError(f"{self.path}: episode {episode}: {said.format(**values)}")

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest actions, a chunk at a time."""
        width = self._columns["action"].shape[1]
        low, high = np.full(width, np.inf), np.full(width, -np.inf)
        for start in range(0, self.steps, _CHUNK):
            actions = np.asarray(self._columns["action"][start : start + _CHUNK], np.float64)
            taken = ~self._last[start : start + _CHUNK]
            wrong = taken & ~np.isfinite(actions).all(1)
            if wrong.any():
                where = self.place(start + int(wrong.argmax()))
                raise RunError(f"{self.path}: {where}: the action is missing or infinite, expected finite numbers")
            low = np.minimum(low, actions[taken].min(0, initial=np.inf))
            high = np.maximum(high, actions[taken].max(0, initial=-np.inf))
        low, high = low.astype(np.float32), high.astype(np.float32)
        return low, np.where(high > low, high, low + 1)


def _space(column: Column) -> Any:
    if column.dtype == np.uint8:
        return spaces.Box(0, 255, column.shape[1:], np.uint8)
    return spaces.Box(-np.inf, np.inf, column.shape[1:], np.float32)
