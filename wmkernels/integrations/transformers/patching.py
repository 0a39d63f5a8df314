"""Replacing what belongs to another library, and putting it back."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

_DECORATORS = "transformers.integrations.accelerate"


class Unknown(Exception):
    """The library's code is not what this package was written for; the message says how."""


INHERITED = object()  # an original that the owner itself does not have


class Patch(NamedTuple):
    """An attribute and what it is replaced by."""

    owner: Any
    name: str
    original: Any
    ours: Any

    def apply(self) -> None:
        setattr(self.owner, self.name, self.ours)

    def is_applied(self) -> bool:
        return inspect.getattr_static(self.owner, self.name, None) is self.ours

    def undo(self) -> bool:
        """Puts the original back, unless another replaced ours meanwhile; whether it did."""
        if not self.is_applied():
            return False
        if self.original is INHERITED:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)
        return True


def own_class(module: ModuleType, name: str) -> type:
    """Raises Unknown."""
    found = getattr(module, name, None)
    if not isinstance(found, type) or found.__module__ != module.__name__:
        raise Unknown(f"{name} is not a class of {module.__name__}")
    return found


def own_function(owner: Any, module: ModuleType, name: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """A function of the library as it came, and the names of its arguments. Raises Unknown."""
    where = f"{owner.__name__}.{name}"
    found = inspect.getattr_static(owner, name, None)
    function = _within_kernels_module(found)
    if not inspect.isfunction(function):
        raise Unknown(f"there is no function {where}")
    inner = inspect.unwrap(function)
    if inner.__module__ == _DECORATORS:  # whose decorator does not name what it wraps
        inner = inspect.getclosurevars(inner).nonlocals.get("forward_func", inner)
    if inner.__module__ != module.__name__ or inner.__qualname__ not in (name, f"{owner.__name__}.{name}"):
        raise Unknown(f"{where} was replaced by {inner.__module__}.{inner.__qualname__}")
    return found, tuple(inspect.signature(inner).parameters)


def _within_kernels_module(found: object) -> object:
    """The function that the package kernels, where it is installed, made a module of; anything else as it is."""
    if not isinstance(found, nn.Module) or not hasattr(found, "kernel_layer_name"):
        return found
    return inspect.getclosurevars(type(found).forward).nonlocals.get("func")


def require_arguments(where: str, known: tuple[str, ...], *expected: str) -> None:
    """Raises Unknown unless the names are those of one of the expected lists, in order."""
    if " ".join(known) not in expected:
        raise Unknown(f"{where} has the arguments {' '.join(known)}, expected {' or '.join(expected)}")
