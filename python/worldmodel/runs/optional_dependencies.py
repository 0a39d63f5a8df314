"""Packages that only the world model needs: imported where they are used, and missed with a word on what to do."""

import importlib
from types import ModuleType


class MissingPackage(ImportError):
    """A package of the extra ``worldmodel`` is not installed."""


INSTALL = "pip install 'wmkernels[worldmodel]', in a clone pip install -e '.[worldmodel]'"


def require(name: str, purpose: str, install: str = INSTALL) -> ModuleType:
    """The module ``name``, imported.

    Args:
        name: of the module, such as ``"gymnasium"`` or ``"torch.utils.tensorboard"``.
        purpose: what it is needed for, as the end of "is needed to ...".
        install: the command that installs it, where that is not the extra.

    Raises:
        MissingPackage: it, or something that it needs, is not installed.

    Example:
        >>> require("json", "read a configuration").__name__
        'json'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing(error, purpose, install) from error


def missing(error: ImportError, purpose: str, install: str = INSTALL) -> MissingPackage:
    """What to raise instead of ``error``, which an import raised.

    Args:
        error: of the import.
        purpose: what the package is needed for, as the end of "is needed to ...".
        install: the command that installs it.
    """
    package = (error.name or str(error)).partition(".")[0]
    return MissingPackage(f"the package {package!r} is needed to {purpose} and is not installed: {install}")
