"""Recorded episodes of a Minari data set (https://minari.farama.org): a folder with metadata.json and main_data.hdf5.

An episode of n actions has n + 1 observations. Spaces are the data set's; an action's bounds are the least and the
largest recorded ones where the space has none. Slices are read with h5py: whole episodes of pictures would not do.
"""

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

METADATA, DATA = "metadata.json", "main_data.hdf5"


def minari_folder(path: Path) -> Path | None:
    """The folder of ``path`` that a Minari data set is in, itself or its ``data``; None without."""
    return next((folder for folder in (path, path / "data") if (folder / METADATA).is_file()), None)


class MinariEpisodes(ReadEpisodes):
    """Episodes of a Minari data set on disk.

    Args:
        folder: with ``metadata.json``.

    Raises:
        MissingPackage: h5py or minari is not installed.
        RunError: another layout, an unsupported space, an episode without an action, or actions that are missing.
    """

    def __init__(self, folder: Path) -> None:
        about, path = read_json(folder / METADATA), folder / DATA
        kind = about.get("data_format") if isinstance(about, dict) else None
        if kind != "hdf5":
            raise RunError(f"{folder}: its data_format is {shown(kind)}, expected 'hdf5'")
        h5py = require("h5py", "read Minari's data sets", INSTALL)
        serialization = require("minari.serialization", "read Minari's data sets", INSTALL)
        try:
            seen, done = (serialization.deserialize_space(about[f"{name}_space"]) for name in ("observation", "action"))
            file = h5py.File(path, "r")
            self._parts = [file[f"episode_{episode}"] for episode in range(int(about["total_episodes"]))]
            actions = [_leaf(part["actions"], path) for part in self._parts]
        except RunError:
            raise
        except Exception as error:  # of many types for damaged files
            raise RunError(f"{path} is no data set of Minari, or damaged: {shown(error, 300)}") from error
        super().__init__(path, np.array([len(column) + 1 for column in actions]))
        self._acted = actions
        for episode, part in enumerate(self._parts):
            for name in ("rewards", "terminations"):
                if name not in part or len(part[name]) != len(actions[episode]):
                    count = len(part[name]) if name in part else "no"
                    raise RunError(f"{path}: episode {episode}: {count} {name} for {len(actions[episode])} actions")
        try:
            self.observation_spec = ObservationSpec.from_space(seen)
            self.action_spec = ActionSpec.from_space(self._bounded(done))
        except ConfigurationError as error:
            raise RunError(f"{path}: {error}") from error

    def _bounded(self, space: Any) -> Any:
        if isinstance(space, spaces.Box) and not space.is_bounded():
            return spaces.Box(*self.recorded_bounds())
        return space

    def _observations(self, episode: int, steps: range) -> Any:
        return _cut(self._parts[episode]["observations"], slice(steps.start, steps.stop, steps.step), self.path)

    def _actions(self, episode: int, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._acted[episode][start:stop])

    def _outcomes(self, episode: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        part = self._parts[episode]
        rewards = np.asarray(part["rewards"][start:stop], np.float32)
        wrong = ~np.isfinite(rewards)
        if wrong.any():
            raise self._wrong(episode, start + int(wrong.argmax()), "the reward is NaN or infinite, expected a number")
        return rewards, np.asarray(part["terminations"][start:stop], bool)


def _leaf(node: Any, path: Path) -> Any:
    if not hasattr(node, "shape"):
        raise RunError(f"{path}: actions are a Tuple or Dict, expected a Box or a discrete space")
    return node


def _cut(node: Any, steps: slice, path: Path) -> Any:
    """The steps of a column, or of a group of columns as a tuple or dict."""
    if hasattr(node, "shape"):
        return node[steps]
    parts = {name: _cut(child, steps, path) for name, child in node.items()}
    if all(name.startswith("_index_") for name in parts):
        return tuple(parts[f"_index_{index}"] for index in range(len(parts)))
    return parts
