"""Environments by name."""

import contextlib
import difflib
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from worldmodel.environments import calls
from worldmodel.environments.given import Given, is_given, way_on
from worldmodel.environments.ids import ENVIRONMENTS, NAMESPACE
from worldmodel.runs.configuration import ConfigurationError
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

    ``module:factory`` stays as it is: a class of gymnasium.Env, or a function that is declared to return one.

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
    if is_given(name) and name not in gymnasium.registry:
        raise UnknownEnvironment(
            f"environment {name!r} is a Python object, which only the program that gave it has: there, "
            f"{way_on('RUN')} resumes its run, and evaluate(Agent.load('RUN'), env) evaluates it; --env names another"
        )
    module, _, rest = name.rpartition(":")
    if module in _MOVED and rest in ENVIRONMENTS:
        warnings.warn(f"environment {name!r} is {NAMESPACE}/{rest} now", FutureWarning, stacklevel=2)
        rest = f"{NAMESPACE}/{rest}"
    own = rest.removeprefix(f"{NAMESPACE}/")
    if own != rest and own in ENVIRONMENTS:
        module = ENVIRONMENTS[own][0].partition(":")[0]  # for its ImportError
    if module:
        if not all(map(str.isidentifier, module.split("."))):
            raise UnknownEnvironment(f"environment {name!r}: {module!r} is no name of a module")
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
    if module and _factory(name) is not None:
        return name
    with contextlib.suppress(gymnasium.error.Error):
        return str(gymnasium.spec(rest).id)
    if module and callable(_named(name)):
        raise UnknownEnvironment(
            f"environment {name!r} is neither a class of gymnasium.Env nor a function that is declared to return one: "
            "def function(...) -> gymnasium.Env"
        )
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
    return "; expected a gymnasium id, module:Env-v0, module:function, or a name of popgym's where popgym is installed"


def make(name: Any, /, **options: Any) -> "gymnasium.Env[Any, Any]":
    """Makes an environment, with gymnasium's time limit, from its name or as ``name_of`` takes it.

    Raises UnknownEnvironment, EnvironmentFailed.
    """
    gymnasium = require("gymnasium", "run environments")
    if not isinstance(name, str):
        name, arguments = name_of(name)
        options = {**arguments, **options}
    full = name if isinstance(name, Given) else resolve(name)
    factory = full.make if isinstance(full, Given) else None if full in gymnasium.registry else _factory(full)
    try:
        if factory is None:
            return gymnasium.make(full, disable_env_checker=True, **options)
        made = factory(**options)
    except Exception as error:
        raise EnvironmentFailed(f"environment {name!r} cannot be made: {calls.told(error)}") from error
    if not isinstance(made, gymnasium.Env):
        raise EnvironmentFailed(f"environment {name!r} is made as a {type(made).__name__}, expected a gymnasium.Env")
    return made


def _factory(name: str) -> Callable[..., Any] | None:
    """What ``module:factory`` names in a module that is imported.

    A run's settings may come from anyone: only what is declared to make an environment is called, and nothing that
    makes one by another name.
    """
    gymnasium = require("gymnasium", "run environments")
    found = _named(name)
    if inspect.isclass(found):
        return found if issubclass(found, gymnasium.Env) else None
    if not inspect.isfunction(found) or found.__module__.partition(".")[0] in ("gymnasium", "worldmodel"):
        return None
    try:
        declared = get_type_hints(found).get("return")
    except Exception:  # a name that the module does not have, as under TYPE_CHECKING
        return None
    declared = get_origin(declared) or declared
    return found if inspect.isclass(declared) and issubclass(declared, gymnasium.Env) else None


def _named(name: str) -> Any:
    module, _, path = name.rpartition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def name_of(environment: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments, for ``make``, of a function, class, EnvSpec or environment; a ``Given`` if none names it.

    Raises:
        ConfigurationError: it is none of these.
    """
    gymnasium = require("gymnasium", "run environments")
    spec = environment.spec if isinstance(environment, gymnasium.Env) else environment
    if isinstance(spec, gymnasium.envs.registration.EnvSpec):
        registered = gymnasium.registry.get(spec.id)
        if registered is not None and registered.entry_point == spec.entry_point and not spec.additional_wrappers:
            arguments = {key: value for key, value in spec.kwargs.items() if key != "render_mode"}
            limit = spec.max_episode_steps
            return spec.id, arguments | ({} if limit == registered.max_episode_steps else {"max_episode_steps": limit})
        if environment is spec:
            return Given(functools.partial(gymnasium.make, spec, disable_env_checker=True)), {}
    elif callable(environment):
        module, path = (getattr(environment, key, "") for key in ("__module__", "__qualname__"))
        name = f"{module}:{path}"
        if module != "__main__" and _factory(name) is environment:
            return name, {}
    if callable(environment) or isinstance(environment, gymnasium.Env):
        return Given(environment), {}
    raise ConfigurationError(
        f"env is an object of {type(environment).__name__}, expected a name, a function or class that makes an "
        "environment, an EnvSpec or a gymnasium.Env"
    )


def make_vector(name: Any, num_envs: int, /, **options: Any) -> "gymnasium.vector.VectorEnv[Any, Any, Any]":
    """The environment's own vectorised form. Raises UnknownEnvironment; EnvironmentFailed if it has none."""
    gymnasium = require("gymnasium", "run environments")
    if isinstance(name, Given) or not isinstance(name, str):
        raise EnvironmentFailed(f"environment {name!r} has no vectorised form of its own")
    full = resolve(name)
    try:
        return gymnasium.make_vec(full, num_envs, vectorization_mode="vector_entry_point", **options)
    except Exception as error:
        raise EnvironmentFailed(
            f"environment {name!r} cannot be made as a vector of {num_envs}: {calls.told(error)}"
        ) from error
