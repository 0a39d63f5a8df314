"""Packages that only the world model needs: imported where they are used, and missed with a word on what to do."""

import importlib
from types import ModuleType


class MissingPackage(ImportError):
    """A package of the extra ``worldmodel`` is not installed."""


def require(name: str, purpose: str) -> ModuleType:
    """The module ``name``, imported.

    Args:
        name: of the module, such as ``"gymnasium"`` or ``"torch.utils.tensorboard"``.
        purpose: what it is needed for, as the end of "is needed to ...".

    Raises:
        MissingPackage: it, or something that it needs, is not installed.

    Example:
        >>> require("json", "read a configuration").__name__
        'json'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise MissingPackage(
            f"the package {missing!r} is needed to {purpose} and is not installed: "
            "pip install 'wmkernels[worldmodel]', in a clone pip install -e '.[worldmodel]'"
        ) from error
