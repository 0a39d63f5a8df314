"""Calls of environments: what they return is checked and copied; what they raise is told with its place."""

import copy
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from worldmodel.data.actions import MASK
from worldmodel.runs.configuration import ConfigurationError

if TYPE_CHECKING:
    import gymnasium

ELAPSED = "elapsed"
_OWN = str(Path(__file__).resolve().parents[1])
_LIBRARY = (sysconfig.get_paths()["stdlib"], "<")
_INSTALLED = {"site-packages", "dist-packages"}


class Misbehaviour(ValueError):
    """A return value that is not of gymnasium's interface."""


def reset(environment: "gymnasium.Env[Any, Any]", seed: int) -> tuple[Any, Any]:
    """The first observation and its mask, or None, copied. Raises what the environment raises, or Misbehaviour."""
    try:
        result = environment.reset(seed=seed)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise Misbehaviour(
                f"its reset has other arguments than gymnasium's reset(self, *, seed=None, options=None): {error}"
            ) from error
        raise
    if not (isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[1], Mapping | None)):
        raise Misbehaviour(
            f"reset returned {_kind(result)}, expected (observation, info), as in gymnasium; environments of gym "
            "before 0.26 return the observation alone and need a wrapper"
        )
    return own(result[0]), _mask(result[1])


def step(environment: "gymnasium.Env[Any, Any]", action: Any) -> tuple[Any, float, bool, bool, Any, float]:
    """Observation, copied, reward, terminated, truncated, the mask, copied, or None, and the time that has passed.

    Raises as ``reset``.
    """
    result = environment.step(action)
    if not (isinstance(result, tuple | list) and len(result) == 5):
        raise Misbehaviour(
            f"step returned {_kind(result)}, expected (observation, reward, terminated, truncated, info), as in "
            "gymnasium; environments of gym before 0.26 return one flag, done, and need a wrapper"
        )
    observation, reward, terminated, truncated, info = result
    number = scalar("reward", reward)
    if not np.isfinite(np.float32(number)):
        raise Misbehaviour(f"a reward is NaN or infinite: {number}")
    ended, cut = (bool(scalar(name, flag)) for name, flag in (("terminated", terminated), ("truncated", truncated)))
    passed = elapsed(info.get(ELAPSED, 1.0)) if isinstance(info, Mapping) else 1.0
    return own(observation), number, ended, cut, _mask(info), passed


def elapsed(value: Any) -> float:
    """``info["elapsed"]``: time since the observation before, in steps. Raises Misbehaviour."""
    number = scalar(f"info[{ELAPSED!r}]", value)
    if not 0 <= number < np.inf:
        raise Misbehaviour(f"info[{ELAPSED!r}] is {number}, expected a finite time of at least 0")
    return number


def _mask(info: Any) -> Any:
    return own(info[MASK]) if isinstance(info, Mapping) and info.get(MASK) is not None else None


def own(value: Any) -> Any:
    """``value`` with arrays that the environment cannot change later."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {name: own(part) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(own(part) for part in value)
    return value.detach().clone() if hasattr(value, "detach") else copy.deepcopy(value)


def told(error: BaseException) -> str:
    """Type, message and place of ``error``, on one line."""
    if isinstance(error, Misbehaviour | ConfigurationError):
        return str(error)
    text = " ".join(str(error).split())
    where = place(error.__traceback__)
    return f"{type(error).__name__}{': ' if text else ''}{text}{f' ({where})' if where else ''}"


def place(trace: TracebackType | None) -> str:
    """``file:line, in function`` of the deepest frame outside this package and installed ones, else of the deepest."""
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith(_OWN)]
    users = [f for f in frames if not f.filename.startswith(_LIBRARY) and not _INSTALLED & set(Path(f.filename).parts)]
    for frame in (users or frames)[-1:]:
        return f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return ""


def scalar(name: str, value: Any) -> float:
    """``value``, of any type and shape with one entry. Raises Misbehaviour."""
    if isinstance(value, int | float | np.bool_ | np.integer | np.floating):
        return float(value)
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except Exception as error:
        raise Misbehaviour(f"{name} is {_kind(value)}, expected one number") from error
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise Misbehaviour(f"{name} is {_kind(value)}, expected one number")
    return float(array.item())


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    shape = getattr(value, "shape", None)
    of_shape = "" if shape is None else f" of shape {tuple(shape)}"
    return "None" if value is None else f"{type(value).__name__}{of_shape}"
