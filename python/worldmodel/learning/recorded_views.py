"""Views from recorded steps: from a file, or from an environment that is explored first."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.learning.view_sources import ViewBatch
from worldmodel.runs import files
from worldmodel.runs.files import RunError
from worldmodel.runs.memory import machine_memory

# Names in a file and dimensions after the first, None for any: a row per step, episodes one after the other.
_NEEDED: dict[str, int | None] = {"observations": None, "actions": 0, "is_first": 0}
_KNOWN: dict[str, int | None] = {"rewards": 0, "terminated": 0, "displacement": 1, "turn": 0, "elapsed": 0}
_ALL = {**_NEEDED, **_KNOWN}


class RecordedSource:
    """Random parts of recorded episodes.

    Args:
        steps: arrays (steps, ...) by name, as ``data.batch`` has them: observations, actions, is_first; and, if known,
            rewards, terminated, elapsed (since the observation before), displacement and turn (of each action, in the
            agent's own frame).
        generator: chooses the parts.

    Raises:
        RunError: a missing array, another shape, or no whole step.
    """

    def __init__(self, steps: Mapping[str, np.ndarray], generator: torch.Generator, name: str = "steps") -> None:
        length = len(steps.get("observations", ()))
        for key, dims in _ALL.items():
            if key in steps and (len(steps[key]) != length or (dims is not None and steps[key].ndim != dims + 1)):
                raise RunError(
                    f"{name}: {key} has shape {steps[key].shape}, expected a row per step, {length:,} in all"
                )
            if key in _NEEDED and key not in steps:
                raise RunError(f"{name} has no {key}, expected {', '.join(_NEEDED)}")
        if length < 2:
            raise RunError(f"{name} has {length} steps, expected at least 2")
        self.length, self.generator = length, generator
        self.arrays = {key: torch.from_numpy(np.ascontiguousarray(steps[key])) for key in steps if key in _ALL}

    def sample(self, batch_size: int, steps: int) -> ViewBatch:
        steps = min(steps, self.length - 1)
        start = torch.randint(0, self.length - steps, (batch_size,), generator=self.generator)
        rows = start[:, None] + torch.arange(steps + 1)
        part = {key: value[rows] for key, value in self.arrays.items()}
        known = {key: value[:, :-1] for key, value in part.items() if key in _KNOWN}
        if "elapsed" in part:
            known["elapsed"] = part["elapsed"][:, 1:].float()
        if "terminated" in known:
            known["terminated"] = known["terminated"].bool()
        first = part["is_first"].bool()
        return ViewBatch(part["observations"], part["actions"][:, :-1].long(), is_first=first, **known)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        self.generator.set_state(saved["generator"])


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file, none of them pickled.

    Raises:
        RunError: no such file, a link, or a damaged one.
    """
    try:
        os.close(files.open_file(path))
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > machine_memory():
            raise RunError(f"{path} has {size:,} bytes unpacked, more than this machine's memory")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files if name in _ALL}
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} is no .npz file of arrays: {files.shown(error)}") from error


def record(env: Any, steps: int, seed: int) -> dict[str, np.ndarray]:
    """``steps`` steps of an environment with a discrete action space, by its ``explore()`` or at random.

    An ``info["displacement"]`` is kept, in the agent's own frame.
    """
    env.action_space.seed(seed)
    explore = getattr(env.unwrapped, "explore", env.action_space.sample)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("observations", "actions", "is_first", "rewards", "terminated")
    }
    moved: list[Any] = []
    ended, observation = True, None
    for step in range(steps):
        first = ended
        if first:
            observation, _ = env.reset(seed=seed + step)
        action = explore()
        following, reward, terminated, truncated, info = env.step(action)
        row = (observation, action, first, reward, terminated)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
        if "displacement" in info:
            moved.append(info["displacement"])
        observation, ended = following, terminated or truncated
        if ended:  # the last observation, which no action follows
            for column, value in zip(columns.values(), (following, 0, False, 0.0, False), strict=True):
                column.append(value)
            if moved:
                moved.append(np.zeros_like(moved[-1]))
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    return arrays | ({"displacement": np.asarray(moved, np.float32)} if moved else {})
