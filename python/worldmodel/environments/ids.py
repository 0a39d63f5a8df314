"""Ids of the environments that come with the package, registered with gymnasium as soon as both are imported.

``import worldmodel`` does not import gymnasium, and either may come first: where gymnasium is not there yet, its import
registers them.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

NAMESPACE = "worldmodel"
_BALL, _CUE = "worldmodel.environments.hidden_ball:HiddenBall", "worldmodel.environments.minigrid:memory"

# Name without namespace -> entry point and keyword arguments.
ENVIRONMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "HiddenBall-v0": (_BALL, {"pixels": 0}),
    "HiddenBallPixels-v0": (_BALL, {"pixels": 4}),
    **{f"MemoryS{size}-v0": (_CUE, {"size": size}) for size in (7, 9, 11, 13, 17)},
}


def register(gymnasium: Any, entry_point: str | None = None) -> None:
    """Registers every environment as ``worldmodel/NAME``.

    Args:
        gymnasium: the module.
        entry_point: registers the environments of this one under their bare names instead, for ``module:NAME``.
    """
    for name, (entry, arguments) in ENVIRONMENTS.items():
        known_as = f"{NAMESPACE}/{name}" if entry_point is None else name
        if entry_point in (None, entry) and known_as not in gymnasium.registry:
            gymnasium.register(known_as, entry, kwargs=arguments)


def install() -> None:
    """Registers the environments now, or when gymnasium is imported."""
    gymnasium = sys.modules.get("gymnasium")
    if gymnasium is not None:
        register(gymnasium)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(importlib.abc.MetaPathFinder):
    """Lets the other finders find gymnasium, and registers the environments when it has been executed."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "gymnasium" or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: types.ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
