"""Configurations as JSON, and their differences."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, Union

Config = TypeVar("Config")


class ConfigurationError(ValueError):
    """An invalid configuration."""


def to_json(config: Any) -> Any:
    """Nested dataclasses as JSON; a class variable ``kind`` tags those of a union.

    Example:
        >>> @dataclasses.dataclass
        ... class Sizes:
        ...     hidden: tuple[int, ...] = (64, 32)
        >>> to_json(Sizes())
        {'hidden': [64, 32]}
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind: Any = type(config)
        tag = {"kind": kind.kind} if _is_tagged(kind) else {}
        return tag | {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_json(kind: type[Config], values: Any, where: str = "") -> Config:
    """Inverts ``to_json``; ``where`` prefixes errors. Raises ConfigurationError for an unknown name."""
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise ConfigurationError(f"{where or kind.__name__} is {values!r}, expected the fields of {kind.__name__}")
    unknown = sorted(set(values) - names)
    if unknown:
        raise ConfigurationError(
            f"{where or kind.__name__} has {', '.join(unknown)}, which {kind.__name__} does not know; another version "
            "wrote it"
        )
    fields = {name: _value(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in values.items()}
    return kind(**fields)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        if all(_is_tagged(argument) for argument in arguments):
            return _one_of({argument.kind: argument for argument in arguments}, value, where)
        return _value(next(argument for argument in arguments if argument is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        return tuple(_value(arguments[0], item, f"{where}.{index}") for index, item in enumerate(value))
    if origin is dict:
        return {key: _value(arguments[1], item, where) for key, item in value.items()}
    if hint is Path:
        return Path(value)
    return value


def _is_tagged(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and isinstance(getattr(kind, "kind", None), str)


def _one_of(kinds: dict[str, Any], value: Any, where: str) -> Any:
    given = value.get("kind") if isinstance(value, dict) else None
    if given not in kinds:
        found = repr(value) if given is None else f"of kind {given!r}"
        raise ConfigurationError(f"{where} is {found}, expected a kind among {', '.join(kinds)}")
    return from_json(kinds[given], {name: inner for name, inner in value.items() if name != "kind"}, where)


def differences(saved: Any, given: Any, where: str = "") -> list[str]:
    """A line per difference of two JSON configurations.

    Example:
        >>> differences({"memory": {"layers": 2}}, {"memory": {"layers": 4}})
        ['memory.layers is 2 there and 4 here']
    """
    if isinstance(saved, dict) and isinstance(given, dict):
        names = [*saved, *(name for name in given if name not in saved)]
        nothing = "nothing"
        inside = (
            differences(saved.get(name, nothing), given.get(name, nothing), f"{where}.{name}".lstrip("."))
            for name in names
        )
        return [line for lines in inside for line in lines]
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        pairs = enumerate(zip(saved, given, strict=True))
        return [line for index, (old, new) in pairs for line in differences(old, new, f"{where}.{index}".lstrip("."))]
    return [] if saved == given else [f"{where} is {saved} there and {given} here"]
