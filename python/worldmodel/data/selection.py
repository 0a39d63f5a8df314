"""Chosen episodes of one or more files, with actions of one or more steps: what ``train --data`` learns from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from worldmodel.data.actions import ActionSpec
from worldmodel.data.datasets import Arrays, EpisodeFile, Episodes
from worldmodel.data.flat_episodes import FlatEpisodes
from worldmodel.runs.configuration import differences, to_json
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import RunError

_HDF5 = (".h5", ".hdf5")
_CHUNK = 2**16  # steps whose actions are checked at once


def open_episodes(path: Path, columns: Sequence[str] = ("pixels",)) -> list[Episodes]:
    """The files of ``path``: an .npz, an HDF5 file, or a folder of .npz.

    Args:
        path: .npz as ``record`` writes it, .h5 or .hdf5 of flat columns.
        columns: of HDF5, observed.

    Raises:
        RunError: no such file, other contents, actions that are missing, NaN or out of bounds, or files of different
            spaces.
        MissingPackage: HDF5 without h5py.
    """
    if path.suffix in _HDF5:
        return [FlatEpisodes.open(path, columns)]
    paths = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not paths:
        raise RunError(f"{path} has no .npz, expected recorded episodes, as `record` writes them")
    files = [EpisodeFile(each) for each in paths]
    for file in files:
        changed = files[0].observation_spec.differences(file.observation_spec)
        changed += differences(to_json(files[0].action_spec), to_json(file.action_spec))
        if changed:
            raise RunError(f"{file.path} has other spaces than {files[0].path}: {changed[0]}")
        for start in range(0, file.steps, _CHUNK):
            file.check_actions(start, start + _CHUNK)
    return list(files)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Episodes in the order of their steps.

    Attributes:
        file: index of each one's file.
        start: its first step there.
        steps: that it has here.
        first: its first step here; one more, the number of all steps.
    """

    file: np.ndarray
    start: np.ndarray
    steps: np.ndarray
    first: np.ndarray


class SelectedEpisodes:
    """Episodes of ``files``, for ``RecordedSource``; an action is those of ``action_steps`` steps, one after another.

    With ``action_steps`` k, every k-th observation is one, the reward is the sum of the steps' rewards, and what an
    episode has beyond a multiple of k actions is left out.

    Args:
        files: of equal spaces.
        episodes: indices over all files, in their order; all if None.
        action_steps: k.

    Raises:
        RunError: an episode of fewer than k actions.
        ConfigurationError: k above 1 for actions of a Tuple or Dict.

    Attributes:
        path: of the first file.
        observation_spec: of the files.
        action_spec: of k actions.
    """

    def __init__(self, files: Sequence[Episodes], episodes: np.ndarray | None = None, action_steps: int = 1) -> None:
        self._files, self.action_steps = list(files), action_steps
        self.path = files[0].path
        self.observation_spec = files[0].observation_spec
        self.action_spec = repeated(files[0].action_spec, action_steps)
        starts = [file.episode_starts for file in files]
        lengths = np.concatenate(
            [np.diff(np.append(first, file.steps)) for first, file in zip(starts, files, strict=True)]
        )
        of_file = np.repeat(np.arange(len(files)), [len(first) for first in starts])
        short = lengths <= action_steps
        if short.any():
            episode = int(short.argmax())
            own = episode - int(np.flatnonzero(of_file == of_file[episode])[0])
            raise RunError(
                f"{files[of_file[episode]].path}: episode {own}, step 0: the episode has {lengths[episode]} steps, "
                f"expected {action_steps + 1} at least, as an action is of {action_steps}"
            )
        chosen = np.arange(len(lengths)) if episodes is None else np.asarray(episodes)
        steps = (lengths[chosen] - 1) // action_steps + 1
        first = np.concatenate([[0], np.cumsum(steps)])
        self._chosen = _Chosen(of_file[chosen], np.concatenate(starts)[chosen], steps, first)

    @property
    def steps(self) -> int:
        return int(self._chosen.first[-1])

    @property
    def episodes(self) -> int:
        return len(self._chosen.steps)

    @property
    def episode_starts(self) -> np.ndarray:
        return self._chosen.first[:-1]

    def rows(self, starts: np.ndarray, window: int) -> Arrays:
        """As ``EpisodeFile.rows``, without displacement and heading. Raises RunError with file, episode and step."""
        rows = [self._row(int(start), window) for start in starts]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, start: int, window: int) -> Arrays:
        chosen, parts = self._chosen, []
        episode = int(np.searchsorted(chosen.first, start, "right")) - 1
        while window:
            offset = start - int(chosen.first[episode])
            count = min(window, int(chosen.steps[episode]) - offset)
            parts.append(self._part(episode, offset, count))
            start, window, episode = start + count, window - count, episode + 1
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _part(self, episode: int, offset: int, count: int) -> Arrays:
        """``count`` steps of an episode."""
        chosen, k = self._chosen, self.action_steps
        file = self._files[chosen.file[episode]]
        ends = offset + count == chosen.steps[episode]
        acted = count - 1 if ends else count  # steps with an action
        first = int(chosen.start[episode]) + offset * k
        found = {name: array[0] for name, array in file.rows(np.array([first]), acted * k + ends).items()}
        seen = {name: array[::k] for name, array in found.items() if name.startswith("observations/")}
        actions = np.zeros((count, *self.action_spec.shape), self.action_spec.dtype)
        actions[:acted] = found["actions"][: acted * k].reshape(acted, *self.action_spec.shape)
        rewards, terminated = np.zeros(count, np.float32), np.zeros(count, bool)
        rewards[:acted] = found["rewards"][: acted * k].reshape(acted, k).sum(1)
        terminated[:acted] = found["terminated"][: acted * k].reshape(acted, k).any(1)
        is_first, is_last = np.zeros(count, bool), np.zeros(count, bool)
        is_first[0], is_last[-1] = offset == 0, ends
        row = {**seen, "actions": actions, "rewards": rewards, "terminated": terminated}
        row |= {"is_first": is_first, "is_last": is_last}
        if "elapsed" in found:
            row["elapsed"] = self._elapsed(file, found["elapsed"], first, offset)
        return row

    def _elapsed(self, file: Episodes, elapsed: np.ndarray, first: int, offset: int) -> np.ndarray:
        """Time since the observation before, in actions."""
        k = self.action_steps
        before = file.rows(np.array([first - k + 1]), k - 1)["elapsed"][0] if offset and k > 1 else np.ones(k - 1)
        return np.concatenate([before, elapsed])[: len(elapsed[::k]) * k].reshape(-1, k).mean(1).astype(np.float32)


def repeated(action_spec: ActionSpec, count: int) -> ActionSpec:
    """The spec of ``count`` actions, one after another. Raises ConfigurationError for a Tuple or Dict.

    Example:
        >>> from gymnasium import spaces
        >>> spec = repeated(ActionSpec.from_space(spaces.Box(-2, 2, (2,))), 3)
        >>> spec.shape, spec.env_shape
        ((6,), (3, 2))
    """
    if count == 1:
        return action_spec
    if action_spec.parts:
        raise ConfigurationError(f"action_steps is {count} and actions are a Tuple or Dict, expected action_steps 1")
    entries = count * max(1, len(action_spec.sizes) + len(action_spec.low))
    joined = {name: getattr(action_spec, name) * count for name in ("sizes", "starts", "low", "high")}
    return dataclasses.replace(action_spec, shape=(entries,), env_shape=(count, *action_spec.env_shape), **joined)


def held_out_split(episodes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of episodes to learn from, and of a random ``share`` held out: none for 0, else one at least.

    Raises:
        ConfigurationError: no episode is left to learn from.

    Example:
        >>> learned, held_out = held_out_split(20, 0.1, seed=0)
        >>> len(learned), len(held_out)
        (18, 2)
    """
    count = max(1, round(share * episodes)) if share else 0
    if count >= episodes:
        raise ConfigurationError(
            f"held_out is {share:g} of {episodes} episodes, expected one at least that is learned from"
        )
    order = np.random.default_rng(seed).permutation(episodes)
    return np.sort(order[count:]), np.sort(order[:count])
