"""Environments: by name, vector environments, and those of the package."""

import importlib
from typing import Any

_REGISTRY = ("EnvironmentFailed", "UnknownEnvironment", "make", "make_vector", "resolve")


def __getattr__(name: str) -> Any:
    if name not in _REGISTRY:
        raise AttributeError(f"module 'worldmodel.environments' has no attribute {name!r}")
    return getattr(importlib.import_module("worldmodel.environments.registry"), name)


def __dir__() -> list[str]:
    return [*globals(), *_REGISTRY]
