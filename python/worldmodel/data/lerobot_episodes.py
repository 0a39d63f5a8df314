"""Recorded episodes of a LeRobot folder, format 2 or 3 (https://huggingface.co/docs/lerobot).

    meta/info.json          features with dtype and shape, paths of the other files, frames per second
    meta/episodes*          length of each episode, and in format 3 where it is: JSON lines, or parquet
    data/...parquet         a row per step: numbers, and pictures of dtype "image"
    videos/...mp4           pictures of dtype "video"

What is observed are the features that begin with "observation."; the action at an episode's last step is not read.
Row groups and frames are read as they are asked for.
"""

import collections
import dataclasses
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.read_episodes import INSTALL, ReadEpisodes
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import RunError, read_json, shown
from worldmodel.runs.optional_dependencies import missing, require

try:
    from gymnasium import spaces
except ImportError as error:
    raise missing(error, "describe what is seen and done") from error

INFO = Path("meta") / "info.json"
_PREFIX = "observation."
_PICTURES = ("image", "video")
_INDICES = ("chunk_index", "file_index")
_MOST_GROUPS, _MOST_VIDEOS = 64, 8  # row groups and open videos that are kept
_PURPOSE = "read LeRobot's folders"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Of an episode.

    Attributes:
        data: its parquet file.
        row: its first row there.
        videos: of each feature, the file and the seconds at which it begins.
    """

    data: Path
    row: int
    videos: Mapping[str, tuple[Path, float]]


class LeRobotEpisodes(ReadEpisodes):
    """Episodes of a LeRobot folder.

    Args:
        folder: with ``meta/info.json``.
        features: observed ones, by their names there; all that begin with "observation." if empty.

    Raises:
        MissingPackage: pyarrow, or av for videos, is not installed.
        RunError: another layout or version, no such feature, an episode of one step, or actions that are missing.
    """

    def __init__(self, folder: Path, features: Sequence[str] = ()) -> None:
        self._parquet = require("pyarrow.parquet", _PURPOSE, INSTALL)
        info = read_json(folder / INFO)
        try:
            self._about = {name: _Feature(**_known(given)) for name, given in info["features"].items()}
            self._fps, version = float(info["fps"]), str(info["codebase_version"])
            found = _episodes(folder, info, version, self._parquet)
        except RunError:
            raise
        except Exception as error:  # of many types for damaged files
            raise RunError(f"{folder / INFO} is not of LeRobot's format 2 or 3, or damaged: {error!r:.200}") from error
        super().__init__(folder, np.array([length for length, _ in found]))
        self._places = [place for _, place in found]
        observed = list(features) or [name for name in self._about if name.startswith(_PREFIX)]
        for name in [*observed, "action"]:
            if name not in self._about:
                raise RunError(f"{folder} has no feature {shown(name)}, expected one of {', '.join(self._about)}")
        self._names = {name.removeprefix(_PREFIX).replace(".", "_"): name for name in observed}
        self._group = functools.lru_cache(_MOST_GROUPS)(self._read_group)
        self._file = functools.lru_cache(_MOST_GROUPS)(self._opened)
        self._videos: collections.OrderedDict[Path, _Video] = collections.OrderedDict()
        try:
            seen = spaces.Dict({name: self._about[feature].space for name, feature in self._names.items()})
            self.observation_spec = ObservationSpec.from_space(seen)
            self.action_spec = ActionSpec.from_space(spaces.Box(*self.recorded_bounds()))
        except ConfigurationError as error:
            raise RunError(f"{folder}: {error}") from error

    def _observations(self, episode: int, steps: range) -> Any:
        return {name: self._seen(feature, episode, steps) for name, feature in self._names.items()}

    def _actions(self, episode: int, start: int, stop: int) -> np.ndarray:
        return self._numbers("action", episode, range(start, stop))

    def _seen(self, name: str, episode: int, steps: range) -> np.ndarray:
        feature = self._about[name]
        if feature.dtype == "video":
            path, begin = self._places[episode].videos[name]
            pictures = self._video(path).frames([begin + step / self._fps for step in steps])
        elif feature.dtype == "image":
            image = require("imageio.v3", "read pictures")
            column = self._column(name, episode, steps)
            pictures = [image.imread(io.BytesIO(cell["bytes"]), extension=".png") for cell in column]
        else:
            return self._numbers(name, episode, steps)
        stacked = np.stack(pictures)[..., : feature.picture[2]]
        if stacked.shape[1:] != feature.picture:
            raise self._wrong(episode, steps[0], f"{name} is {stacked.shape[1:]}, expected {feature.picture}")
        return stacked

    def _numbers(self, name: str, episode: int, steps: range) -> np.ndarray:
        shape = self._about[name].shape
        cells = self._column(name, episode, steps)
        for step, cell in zip(steps, cells, strict=True):
            if cell is None or np.size(cell) != int(np.prod(shape)):
                has = "is missing" if cell is None else f"has {np.size(cell)} numbers"
                raise self._wrong(episode, step, f"{name} {has}, expected {shape}")
        return np.array([np.reshape(cell, shape) for cell in cells], np.float32)

    def _column(self, name: str, episode: int, steps: range) -> list[Any]:
        """Cells of a column, of the row groups that hold these steps."""
        place, cells = self._places[episode], []
        file, row = self._file(place.data), place.row
        if row + self.lengths[episode] > file.metadata.num_rows:
            raise RunError(
                f"{place.data}: episode {episode}: it ends at row {row + self.lengths[episode]} of "
                f"{file.metadata.num_rows}"
            )
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        for step in steps:
            group = int(np.searchsorted(ends, row + step, "right"))
            cells.append(self._group(place.data, group, name)[row + step - int(ends[group] - sizes[group])].as_py())
        return cells

    def _opened(self, path: Path) -> Any:
        try:
            return self._parquet.ParquetFile(path)
        except Exception as error:  # of many types for damaged files
            raise RunError(f"{path} cannot be read as parquet: {shown(error, 200)}") from error

    def _read_group(self, path: Path, group: int, name: str) -> Any:
        try:
            return self._file(path).read_row_group(group, columns=[name]).column(name)
        except Exception as error:  # of many types for damaged files
            raise RunError(f"{path} has no column {shown(name)}, or is damaged: {shown(error, 200)}") from error

    def _video(self, path: Path) -> "_Video":
        if path not in self._videos:
            self._videos[path] = _Video(path, self._fps)
            if len(self._videos) > _MOST_VIDEOS:
                self._videos.popitem(last=False)[1].close()
        self._videos.move_to_end(path)
        return self._videos[path]


@dataclasses.dataclass(frozen=True)
class _Feature:
    """``shape`` of pictures is (height, width, channels), or (channels, height, width) by ``names``."""

    dtype: str
    shape: tuple[int, ...]
    names: Any = None

    @property
    def picture(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        first = str(self.names[0]) if isinstance(self.names, list | tuple) and self.names else ""
        return (*self.shape[1:], self.shape[0]) if first.startswith("c") else self.shape

    @property
    def space(self) -> Any:
        if self.dtype in _PICTURES:
            return spaces.Box(0, 255, self.picture, np.uint8)
        return spaces.Box(-np.inf, np.inf, self.shape, np.float32)


def _known(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"dtype": given["dtype"], "shape": tuple(given["shape"]), "names": given.get("names")}


def _episodes(folder: Path, info: Mapping[str, Any], version: str, parquet: Any) -> list[tuple[int, _Place]]:
    """Length and place of each episode, in their order. Raises what damaged files raise."""
    videos = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    if version.startswith("v2"):
        lines = (folder / "meta" / "episodes.jsonl").read_text().splitlines()
        told = sorted((json.loads(line) for line in lines if line.strip()), key=lambda one: one["episode_index"])
        chunk = int(info.get("chunks_size", 1000))
        found = []
        for one in told:
            number = int(one["episode_index"])
            where = {"episode_chunk": number // chunk, "episode_index": number}
            shown_in = {name: (_inside(folder, info["video_path"], video_key=name, **where), 0.0) for name in videos}
            found.append((int(one["length"]), _Place(_inside(folder, info["data_path"], **where), 0, shown_in)))
        return found
    if not version.startswith("v3"):
        raise RunError(f"{folder / INFO}: its version is {shown(version)}, expected 2 or 3")
    wanted = ["episode_index", "length", *(f"data/{what}" for what in _INDICES)]
    wanted += [f"videos/{name}/{what}" for name in videos for what in (*_INDICES, "from_timestamp")]
    paths = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
    told = [one for path in paths for one in parquet.read_table(path, columns=wanted).to_pylist()]
    rows: collections.Counter[Path] = collections.Counter()
    found = []
    for one in sorted(told, key=lambda one: one["episode_index"]):
        data = _inside(folder, info["data_path"], **{what: one[f"data/{what}"] for what in _INDICES})
        shown_in = {}
        for name in videos:
            path = _inside(
                folder, info["video_path"], video_key=name, **{what: one[f"videos/{name}/{what}"] for what in _INDICES}
            )
            shown_in[name] = (path, float(one[f"videos/{name}/from_timestamp"]))
        found.append((int(one["length"]), _Place(data, rows[data], shown_in)))
        rows[data] += int(one["length"])
    return found


def _inside(folder: Path, template: str, **where: Any) -> Path:
    path = Path(template.format(**where))
    if path.is_absolute() or ".." in path.parts:
        raise RunError(f"{folder / INFO} names {shown(path)}, expected a file in the folder")
    return folder / path


class _Video:
    """Frames of a video by their times."""

    def __init__(self, path: Path, fps: float) -> None:
        av = require("av", "read videos", INSTALL)
        self._path, self._slack = path, 0.5 / fps
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except Exception as error:
            raise RunError(f"{path} cannot be read as a video: {shown(error, 200)}") from error

    def frames(self, times: Sequence[float]) -> list[np.ndarray]:
        """uint8 (height, width, 3) at rising ``times``, seconds."""
        base = self._stream.time_base
        self._container.seek(max(0, int(times[0] / base)), stream=self._stream, backward=True)
        found: list[np.ndarray] = []
        for frame in self._container.decode(self._stream):
            while len(found) < len(times) and abs(float(frame.pts * base) - times[len(found)]) <= self._slack:
                found.append(frame.to_ndarray(format="rgb24"))
            if len(found) == len(times):
                return found
        raise RunError(f"{self._path} has no frame at {times[len(found)]:.3f} s")

    def close(self) -> None:
        self._container.close()
