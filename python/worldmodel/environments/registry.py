"""Environments by name."""

import contextlib
import difflib
import importlib
import warnings
from typing import TYPE_CHECKING, Any

from worldmodel.environments import calls
from worldmodel.environments.ids import ENVIRONMENTS, NAMESPACE
from worldmodel.runs.optional_dependencies import require

if TYPE_CHECKING:
    import gymnasium

# Id prefix -> package.
_PACKAGES = {
    "popgym-": "popgym",
    "MiniGrid-": "minigrid",
    "BabyAI-": "minigrid",
    "ALE/": "ale_py",
    "bsuite/": "shimmy",
    "dm_control/": "shimmy",
}
_MOVED = ("worldmodel.hidden_ball", "worldmodel.minigrid")


class UnknownEnvironment(ValueError):
    """Unknown name, or its package is not installed."""


class EnvironmentFailed(RuntimeError):
    """An environment raised an error, or returned invalid values.

    Attributes:
        happened: in ``VectorEnvironment.step``, the ``Transitions`` of the other environments, else None.
    """

    happened: Any = None


def resolve(name: str) -> str:
    """The gymnasium id of a gymnasium id, ``module:id``, or popgym name such as ``RepeatPreviousEasy``.

    Raises:
        UnknownEnvironment: the message suggests similar names.

    Example:
        >>> resolve("CartPole-v1")
        'CartPole-v1'
        >>> resolve("CartPol-v1")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        worldmodel...UnknownEnvironment: there is no environment 'CartPol-v1'; did you mean CartPole-v1 ...
    """
    gymnasium = require("gymnasium", "run environments")
    module, _, rest = name.rpartition(":")
    if module in _MOVED and rest in ENVIRONMENTS:
        warnings.warn(f"environment {name!r} is {NAMESPACE}/{rest} now", FutureWarning, stacklevel=2)
        rest = f"{NAMESPACE}/{rest}"
    own = rest.removeprefix(f"{NAMESPACE}/")
    if own != rest and own in ENVIRONMENTS:
        module = ENVIRONMENTS[own][0].partition(":")[0]  # for its ImportError
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UnknownEnvironment(
                f"environment {name!r}: the module {module!r} cannot be imported: {error}"
            ) from error
    wanted = "" if module else next((p for prefix, p in _PACKAGES.items() if rest.startswith(prefix)), "")
    if wanted:
        try:
            registering = importlib.import_module(wanted)
        except ImportError as error:
            message = f"environment {name!r} is in the package {wanted!r}, which cannot be imported: {error}"
            raise UnknownEnvironment(message) from error
        if wanted in ("ale_py", "shimmy"):  # they register on request only
            gymnasium.register_envs(registering)
    if rest in gymnasium.registry:
        return rest
    with contextlib.suppress(gymnasium.error.Error):
        return str(gymnasium.spec(rest).id)
    if not module:
        with contextlib.suppress(ImportError):
            importlib.import_module("popgym")
        for form in (f"popgym-{rest}-v0", f"popgym-{rest}"):
            if form in gymnasium.registry:
                return form
    raise UnknownEnvironment(f"there is no environment {name!r}{_hint(rest, list(gymnasium.registry))}")


def _hint(name: str, known: list[str]) -> str:
    short = {
        key.removeprefix("popgym-").removesuffix("-v0") if key.startswith("popgym-") else key: key for key in known
    }
    near = difflib.get_close_matches(name, [*short], n=3, cutoff=0.7)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return "; expected a gymnasium id, module:Env-v0, or a name of popgym's where popgym is installed"


def make(name: str, **options: Any) -> "gymnasium.Env[Any, Any]":
    """Makes an environment, with gymnasium's time limit. Raises UnknownEnvironment, EnvironmentFailed."""
    gymnasium = require("gymnasium", "run environments")
    full = resolve(name)
    try:
        return gymnasium.make(full, disable_env_checker=True, **options)
    except Exception as error:
        raise EnvironmentFailed(f"environment {name!r} cannot be made: {calls.told(error)}") from error


def make_vector(name: str, num_envs: int) -> "gymnasium.vector.VectorEnv[Any, Any, Any]":
    """The environment's own vectorised form. Raises UnknownEnvironment; EnvironmentFailed if it has none."""
    gymnasium = require("gymnasium", "run environments")
    full = resolve(name)
    try:
        return gymnasium.make_vec(full, num_envs, vectorization_mode="vector_entry_point")
    except Exception as error:
        raise EnvironmentFailed(
            f"environment {name!r} cannot be made as a vector of {num_envs}: {calls.told(error)}"
        ) from error
