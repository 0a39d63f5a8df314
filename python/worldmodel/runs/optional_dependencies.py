"""Lazy imports of optional packages."""

import importlib
from types import ModuleType


class MissingPackage(ImportError):
    """A package of the extra ``worldmodel`` is not installed."""


INSTALL = "pip install 'wmkernels[worldmodel]', in a clone pip install -e '.[worldmodel]'"


def require(name: str, purpose: str, install: str = INSTALL) -> ModuleType:
    """Imports a module; the error says "is needed to ``purpose``" and how to ``install``.

    Raises:
        MissingPackage: it or a dependency is not installed.

    Example:
        >>> require("json", "read a configuration").__name__
        'json'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing(error, purpose, install) from error


def missing(error: ImportError, purpose: str, install: str = INSTALL) -> MissingPackage:
    """The exception that replaces ``error``."""
    package = (error.name or str(error)).partition(".")[0]
    return MissingPackage(f"the package {package!r} is needed to {purpose} and is not installed: {install}")
