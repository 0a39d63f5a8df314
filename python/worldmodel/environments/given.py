"""Environments given as Python objects that no name stands for: a lambda, a closure, an instance."""

import copy
import re
from typing import Any

from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.optional_dependencies import require

PREFIX = "object/"  # of their names


class Given(str):
    """The name of an environment in a run's settings, with the object; another process has the name alone.

    Attributes:
        made: a function or class that makes the environment, or an instance, of which every use has a copy.
    """

    made: Any

    def __new__(cls, made: Any) -> "Given":
        kind = made if hasattr(made, "__qualname__") else type(made)
        given = super().__new__(cls, PREFIX + re.sub(r"[^\w.]", "", kind.__qualname__))
        given.made = made
        return given

    def make(self, /, **options: Any) -> Any:
        """Raises what the object raises, or ConfigurationError."""
        if not isinstance(self.made, require("gymnasium", "run environments").Env):
            return self.made(**options)
        if options:
            raise ConfigurationError(
                f"it is an instance, which takes no arguments ({', '.join(options)}): give a function that makes it"
            )
        try:
            return copy.deepcopy(self.made)
        except Exception as error:
            raise ConfigurationError(
                f"it is an instance that cannot be copied ({type(error).__name__}: {error}): give a function that "
                "makes it"
            ) from error


def is_given(name: str) -> bool:
    """Whether a run's settings have ``name`` for a Python object."""
    return name.startswith(PREFIX)


def way_on(folder: Any) -> str:
    """How a run whose environment is an object goes on, for messages."""
    return f"train(saved_config(Run({str(folder)!r})), {str(folder)!r}, resume=True, env=...)"
