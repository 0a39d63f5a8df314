"""Chosen episodes of one or more files, with actions of one or more steps: what ``train --data`` learns from."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from worldmodel.data.actions import ActionSpec
from worldmodel.data.datasets import OBSERVED, Arrays, EpisodeFile, Episodes
from worldmodel.data.flat_episodes import FlatEpisodes
from worldmodel.data.lerobot_episodes import INFO, LeRobotEpisodes
from worldmodel.data.minari_episodes import MinariEpisodes, minari_folder
from worldmodel.runs.configuration import differences, to_json
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import RunError

_HDF5 = (".h5", ".hdf5")
_CHUNK = 2**16  # steps whose actions are checked at once


def open_episodes(path: Path, columns: Sequence[str] = ()) -> list[Episodes]:
    """The files of ``path``: an .npz, an HDF5 file, or a folder: of .npz, of Minari, or of LeRobot.

    Args:
        path: .npz as ``record`` writes it, .h5 or .hdf5 of flat columns.
        columns: observed ones of HDF5, or features of LeRobot; pixels or all observations if empty.

    Raises:
        ConfigurationError: columns of other files, which say themselves what is observed.
        RunError: no such file, other contents, actions that are missing, NaN or out of bounds, or files of different
            spaces.
        MissingPackage: a layout without the package that reads it.
    """
    if path.suffix in _HDF5:
        return [FlatEpisodes.open(path, columns or ("pixels",))]
    if (path / INFO).is_file():
        return [LeRobotEpisodes(path, columns)]
    if columns:
        raise ConfigurationError(
            f"data_columns is {', '.join(columns)}, which chooses among columns of HDF5 or features of LeRobot, and "
            f"{path} is neither: leave it out"
        )
    if (folder := minari_folder(path)) is not None:
        return [MinariEpisodes(folder)]
    paths = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not paths:
        raise RunError(
            f"{path} has no .npz, expected recorded episodes, as `record` writes them, or a folder of Minari or LeRobot"
        )
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
    """Episodes in the order of their steps, once per phase.

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
        phases: how often each episode counts, from its first step, its second, ...; with k, every step is seen.

    Raises:
        RunError: an episode of fewer than k actions.
        ConfigurationError: k above 1 for actions of a Tuple or Dict.

    Attributes:
        path: of the first file.
        observation_spec: of the files.
        action_spec: of k actions.
    """

    def __init__(
        self, files: Sequence[Episodes], episodes: np.ndarray | None = None, action_steps: int = 1, phases: int = 1
    ) -> None:
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
        chosen = np.repeat(np.arange(len(lengths)) if episodes is None else np.asarray(episodes), phases)
        phase = np.arange(len(chosen)) % phases
        steps = (lengths[chosen] - 1 - phase) // action_steps + 1
        acts = steps > 1  # all in the first phase
        chosen, phase, steps = chosen[acts], phase[acts], steps[acts]
        first = np.concatenate([[0], np.cumsum(steps)])
        self._chosen = _Chosen(of_file[chosen], np.concatenate(starts)[chosen] + phase, steps, first)

    @property
    def steps(self) -> int:
        return int(self._chosen.first[-1])

    @property
    def episodes(self) -> int:
        return len(self._chosen.steps)

    @property
    def episode_starts(self) -> np.ndarray:
        return self._chosen.first[:-1]

    def rows(self, starts: np.ndarray, window: int, every: int = 1) -> Arrays:
        """As ``EpisodeFile.rows``, without displacement and heading. Raises RunError with file, episode and step."""
        if every > 1:
            raise ValueError(f"SelectedEpisodes.rows: every is {every}, expected 1: action_steps leaves steps out")
        alike: dict[tuple[int, int, bool], list[_Piece]] = {}  # pieces of one file and length are read at once
        for row, start in enumerate(starts):
            for piece in self._pieces(row, int(start), window):
                alike.setdefault((piece.file, piece.steps, piece.ends), []).append(piece)
        rows: Arrays = {}
        for (file, _, _), pieces in alike.items():
            for name, array in self._read(self._files[file], pieces).items():
                if name not in rows:
                    rows[name] = np.empty((len(starts), window, *array.shape[2:]), array.dtype)
                for piece, values in zip(pieces, array, strict=True):
                    rows[name][piece.row, piece.at : piece.at + piece.steps] = values
        return rows

    def _pieces(self, row: int, start: int, window: int) -> Iterator["_Piece"]:
        """The parts of episodes that ``window`` steps from ``start`` are."""
        chosen, at = self._chosen, 0
        episode = int(np.searchsorted(chosen.first, start, "right")) - 1
        while at < window:
            offset = start + at - int(chosen.first[episode])
            steps = min(window - at, int(chosen.steps[episode]) - offset)
            first = int(chosen.start[episode]) + offset * self.action_steps
            ends = offset + steps == chosen.steps[episode]
            yield _Piece(row, at, int(chosen.file[episode]), first, steps, not offset, bool(ends))
            at, episode = at + steps, episode + 1

    def _read(self, file: Episodes, pieces: Sequence["_Piece"]) -> Arrays:
        """Arrays (pieces, steps, ...) of pieces of one length, all or none of which end an episode."""
        k, count, steps, ends = self.action_steps, len(pieces), pieces[0].steps, pieces[0].ends
        firsts, begin = np.array([piece.first for piece in pieces]), np.array([piece.begins for piece in pieces])
        acted = steps - ends  # steps with an action
        found = file.rows(firsts, acted * k + ends, k)
        rows = {name: array for name, array in found.items() if name.startswith(OBSERVED)}
        rows["actions"] = np.zeros((count, steps, *self.action_spec.shape), self.action_spec.dtype)
        rows["rewards"] = np.zeros((count, steps), np.float32)
        rows |= {name: np.zeros((count, steps), bool) for name in ("terminated", "is_first", "is_last")}
        actions, rewards, terminated = (found[name][:, : acted * k] for name in ("actions", "rewards", "terminated"))
        rows["actions"][:, :acted] = actions.reshape(count, acted, *self.action_spec.shape)
        rows["rewards"][:, :acted] = rewards.reshape(count, acted, k).sum(2)
        rows["terminated"][:, :acted] = terminated.reshape(count, acted, k).any(2)
        rows["is_first"][:, 0], rows["is_last"][:, -1] = begin, ends
        rows["elapsed"] = np.ones((count, steps), np.float32)
        if "elapsed" in found:
            before = np.ones((count, k - 1), np.float32)
            if k > 1 and not begin.all():
                before[~begin] = file.rows(firsts[~begin] - k + 1, k - 1, k)["elapsed"]
            elapsed = np.concatenate([before, found["elapsed"]], 1)[:, : steps * k]
            rows["elapsed"] = elapsed.reshape(count, steps, k).mean(2, dtype=np.float32)
        return rows


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Steps of one episode in a row.

    Attributes:
        row: of what is read.
        at: first step there.
        file: index.
        first: step of the file.
        steps: of k of the file's each.
        begins: whether the episode does.
        ends: whether the episode does.
    """

    row: int
    at: int
    file: int
    first: int
    steps: int
    begins: bool
    ends: bool


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
