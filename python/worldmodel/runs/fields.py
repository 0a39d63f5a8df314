"""Checks of a configuration's fields against their annotations.

An annotation says the type, ``Bounds`` the limits and ``Unit`` the unit: ``hidden: Annotated[int, Bounds(1, 65_536)] =
128``. The constructor of a ``Checked`` dataclass and ``configuration.from_json`` read the same annotations by
``checked_value``.
"""

import dataclasses
import functools
import json
import math
import operator
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import numpy as np


class ConfigurationError(ValueError):
    """An invalid configuration."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of a number, or of the length of text, a tuple or a dict.

    Attributes:
        low: smallest value.
        high: largest value.
        above: whether ``low`` itself is excluded.
        below: whether ``high`` itself is excluded.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def hold(self, value: float) -> bool:
        """False for NaN, too."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {self.low:,}"
        return f"{low} and {'below' if self.below else 'at most'} {self.high:,}"


@dataclasses.dataclass(frozen=True)
class Unit:
    """Unit of a number; errors name it after the field.

    Attributes:
        name: such as "m" or "dB".
    """

    name: str


Size = Annotated[int, Bounds(1, 2**16)]
"""Width of a layer, rows of a batch."""
Layers = Annotated[int, Bounds(0, 256)]
Count = Annotated[int, Bounds(0, 10**15)]
"""Steps, updates, transitions."""
Limit = Annotated[int, Bounds(1, 10**15)]
"""Steps or updates, at least one."""
Share = Annotated[float, Bounds(0, 1)]
Weight = Annotated[float, Bounds(0, 10**9)]
"""Weight of a loss."""
Positive = Annotated[float, Bounds(0, 10**9, above=True)]
"""Times, ratios."""
Text = Annotated[str, Bounds(0, 4096)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]
"""First of the seeds of several episodes or streams."""
Threads = Annotated[int, Bounds(1, 4096)]

_MOST_TEXT = 1 << 16  # characters of ``Any`` as JSON


class Checked:
    """Base of dataclasses whose constructor checks every field. An override of ``__post_init__`` calls this one first.

    Raises:
        ConfigurationError: a value of another type or outside its bounds, named with what is expected.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Network(Checked):
        ...     hidden: Annotated[int, Bounds(1, 4096)] = 128
        >>> Network(hidden=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        worldmodel...ConfigurationError: Network: hidden is 0, expected a whole number, at least 1 and at most 4,096
    """

    def __post_init__(self) -> None:
        for name, hint in field_hints(type(self)).items():
            value = getattr(self, name)
            checked = checked_value(hint, value, f"{type(self).__name__}: {name}")
            if checked is not value:  # a list became a tuple, a NumPy number a plain one
                object.__setattr__(self, name, checked)


def check_writable(option: str, path: Path, parents: bool = False) -> None:
    """Raises ConfigurationError if no file can be written to ``path``; leaves all as it was.

    With ``parents``, folders that do not exist would be made first.
    """
    while parents and not path.parent.exists():
        path = path.parent
    there = os.path.lexists(path)
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigurationError(f"{option} is {str(path)!r}, which cannot be written: {error.strerror}") from error
    if not there:
        path.unlink()


def field_hints(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields, with their ``Bounds``."""
    return _field_hints(kind)


@functools.cache
def _field_hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def checked_value(hint: Any, value: Any, where: str, build: Any = None) -> Any:
    """``value`` as ``hint`` describes it, or ConfigurationError that begins with ``where``.

    ``build(kind, fields, where)`` makes a dataclass from JSON; without it, only instances of one are accepted.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        where += "".join(f" ({extra.name})" for extra in arguments[1:] if isinstance(extra, Unit))
        return _bounded(checked_value(arguments[0], value, where, build), hint, where)
    if hint is Any:
        return _plain(value, where)
    if origin in (Union, types.UnionType):
        return _member(arguments, value, where, build)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _unexpected(where, value, _listed([repr(choice) for choice in arguments]))
        return value
    if origin is tuple:
        return _tuple(arguments, value, where, build)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _unexpected(where, value, "a dict with names as keys")
        checked = {key: checked_value(arguments[1], item, f"{where}[{key!r}]", build) for key, item in value.items()}
        return value if all(checked[key] is value[key] for key in value) else checked
    if dataclasses.is_dataclass(hint):
        if build is not None and not isinstance(value, hint):  # type: ignore[arg-type]
            return build(hint, value, where)
        if not isinstance(value, hint):  # type: ignore[arg-type]
            raise _unexpected(where, value, f"a {hint.__name__}")  # type: ignore[union-attr]
        return value
    return _simple(hint, value, where)


def is_tagged(kind: Any) -> bool:
    """Whether a class variable ``kind`` names the dataclass in JSON."""
    return dataclasses.is_dataclass(kind) and isinstance(getattr(kind, "kind", None), str)


def _simple(hint: Any, value: Any, where: str) -> Any:
    if hint is bool:
        if not isinstance(value, bool | np.bool_):
            raise _unexpected(where, value, "true or false")
        return value if isinstance(value, bool) else bool(value)
    if hint is int:
        try:
            whole = None if isinstance(value, bool | np.bool_) else operator.index(value)
        except TypeError:
            whole = None
        if whole is None:
            raise _unexpected(where, value, "a whole number")
        return value if type(value) is int else whole
    if hint is float:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
            raise _unexpected(where, value, "a number")
        number = value if isinstance(value, int | float) else value.item()
        if isinstance(number, float) and not math.isfinite(number):
            raise _unexpected(where, value, "a finite number")
        return number
    if hint is Path:
        if not isinstance(value, str | Path):
            raise _unexpected(where, value, "a path")
        return Path(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise _unexpected(
            where, value, "text" if hint is str else "nothing" if hint is types.NoneType else hint.__name__
        )
    return value


def _bounded(value: Any, hint: Any, where: str) -> Any:
    inner, *extras = typing.get_args(hint)
    for bounds in extras:
        if not isinstance(bounds, Bounds) or value is None:
            continue
        if isinstance(value, int | float):
            if not bounds.hold(value):
                raise _unexpected(where, value, f"a {'whole ' if inner is int else ''}number, {bounds}")
        elif not bounds.hold(len(value)):
            what = "characters" if isinstance(value, str) else "entries"
            raise ConfigurationError(f"{where} has {len(value):,} {what}, expected {bounds}")
    return value


def _member(members: tuple[Any, ...], value: Any, where: str, build: Any) -> Any:
    if value is None and types.NoneType in members:
        return None
    kinds = {member.kind: member for member in members if is_tagged(member)}
    if build is not None and kinds and not isinstance(value, tuple(kinds.values())):
        given = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(given, str) or given not in kinds:
            found = _shown(value) if given is None else f"of kind {_shown(given)}"
            raise ConfigurationError(f"{where} is {found}, expected a kind among {', '.join(kinds)}")
        return build(kinds[given], {name: inner for name, inner in value.items() if name != "kind"}, where)
    others = [member for member in members if member is not types.NoneType]
    reasons = []
    for member in others:
        try:
            return checked_value(member, value, where, build)
        except ConfigurationError as error:
            reasons.append(error)
    if len(others) == 1:
        raise reasons[0]
    raise _unexpected(where, value, _listed([getattr(member, "__name__", str(member)) for member in others]))


def _tuple(arguments: tuple[Any, ...], value: Any, where: str, build: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _unexpected(where, value, "a list")
    if arguments[-1] is Ellipsis:
        hints = [arguments[0]] * len(value)
    else:
        hints = list(arguments)
        if len(hints) != len(value):
            raise _unexpected(where, value, f"{len(hints)} entries")
    pairs = enumerate(zip(hints, value, strict=True))
    checked = tuple(checked_value(hint, item, f"{where}.{index}", build) for index, (hint, item) in pairs)
    same = isinstance(value, tuple) and all(old is new for old, new in zip(value, checked, strict=True))
    return value if same else checked


def _plain(value: Any, where: str) -> Any:
    try:
        size = len(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise _unexpected(where, value, "plain values that JSON can hold") from error
    if size > _MOST_TEXT:
        raise ConfigurationError(f"{where} has {size:,} characters as JSON, expected at most {_MOST_TEXT:,}")
    return value


def _unexpected(where: str, value: Any, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{where} is {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # RecursionError, or a user's own
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
