"""Pickles of environments that are not deterministic given seed and actions."""

import io
import pickle
from typing import Any

import numpy as np

from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.runs.optional_dependencies import require


class PickleRefused(ValueError):
    """Reading a pickle was not allowed."""


def dump(environments: Any, name: str) -> np.ndarray:
    """Pickles to uint8 (size,); ``name`` is for errors.

    Raises:
        EnvironmentFailed: they cannot be pickled with their state.
    """
    file = io.BytesIO()
    try:
        _Pickler(file).dump(environments)
    except Exception as error:
        raise EnvironmentFailed(f"{name} cannot be pickled: {error}") from error
    return np.frombuffer(file.getvalue(), np.uint8)


def load(content: np.ndarray, name: str, allowed: bool) -> Any:
    """Unpickles ``content``, which executes it, if ``allowed``.

    Raises:
        PickleRefused: not allowed; nothing has been read.
        EnvironmentFailed: it cannot be read.
    """
    if not allowed:
        raise PickleRefused(
            f"the checkpoint holds {name} as a pickle, and reading a pickle runs whatever is written in it"
        )
    try:
        return pickle.loads(content.tobytes())
    except Exception as error:
        raise EnvironmentFailed(f"{name} cannot be unpickled here: {error}") from error


class _Pickler(pickle.Pickler):
    """Refuses EzPickle, which pickles constructor arguments."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._ez_pickle = require("gymnasium.utils", "run environments").EzPickle

    def reducer_override(self, value: Any) -> Any:
        easy = self._ez_pickle
        if isinstance(value, easy) and type(value).__getstate__ is easy.__getstate__:
            raise pickle.PicklingError(f"the pickle of {type(value).__name__} says how it was made, not where it is")
        return NotImplemented
