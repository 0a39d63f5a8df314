"""Replacing what belongs to another library, and putting it back."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class Unknown(Exception):
    """The library's code is not what this package was written for; the message says how."""


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
        setattr(self.owner, self.name, self.original)
        return True


def own_class(module: ModuleType, name: str) -> type:
    """Raises Unknown."""
    found = getattr(module, name, None)
    if not isinstance(found, type) or found.__module__ != module.__name__:
        raise Unknown(f"{name} is not a class of {module.__name__}")
    return found


def own_function(owner: Any, module: ModuleType, name: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """A function of the library as it came, with these arguments. Raises Unknown."""
    where = f"{owner.__name__}.{name}"
    found = inspect.getattr_static(owner, name, None)
    if not callable(found):
        raise Unknown(f"there is no function {where}")
    if getattr(found, "__module__", None) != module.__name__:
        raise Unknown(f"{where} was replaced by one of {getattr(found, '__module__', 'another module')}")
    known = tuple(inspect.signature(found).parameters)
    if known != arguments:
        raise Unknown(f"{where} has the arguments ({', '.join(known)}), expected ({', '.join(arguments)})")
    return found
