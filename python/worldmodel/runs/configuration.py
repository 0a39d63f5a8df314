"""Configurations as JSON, and their differences."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from worldmodel.runs.fields import ConfigurationError, checked_value, field_hints, is_tagged

__all__ = ["ConfigurationError", "differences", "from_json", "to_json"]

Config = TypeVar("Config")


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
        tag = {"kind": kind.kind} if is_tagged(kind) else {}
        return tag | {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_json(kind: type[Config], values: Any, where: str = "") -> Config:
    """Inverts ``to_json``, with the checks of the constructor; ``where`` prefixes errors.

    Raises:
        ConfigurationError: an unknown or missing name, a value of another type or outside its bounds.
    """
    hints, named = field_hints(kind), where or kind.__name__
    if not isinstance(values, dict):
        raise ConfigurationError(f"{named} is {values!r:.80}, expected the fields of {kind.__name__}")
    unknown = sorted(str(name) for name in values if name not in hints)
    if unknown:
        raise ConfigurationError(
            f"{named} has {', '.join(unknown):.200}, which {kind.__name__} does not know; another version wrote it"
        )
    fields = {
        name: checked_value(hints[name], value, f"{where}.{name}".lstrip("."), from_json)
        for name, value in values.items()
    }
    missing = [
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.init and field.name not in fields and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigurationError(f"{named} has no {', '.join(missing)}, which {kind.__name__} needs")
    try:
        return kind(**fields)
    except ConfigurationError as error:  # of several fields together
        raise ConfigurationError(f"{where}: {error}" if where else str(error)) from error


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
