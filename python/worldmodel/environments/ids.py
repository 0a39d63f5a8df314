"""Ids of the package's environments, registered when gymnasium and worldmodel are both imported."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

NAMESPACE = "worldmodel"
_BALL, _CUE = "worldmodel.environments.hidden_ball:HiddenBall", "worldmodel.environments.minigrid:memory"

ENVIRONMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "HiddenBall-v0": (_BALL, {"pixels": 0}),
    "HiddenBallPixels-v0": (_BALL, {"pixels": 4}),
    "Dial-v0": ("worldmodel.environments.dial:Dial", {}),
    "Rooms-v0": ("worldmodel.environments.rooms:Rooms", {}),
    "Drift-v0": ("worldmodel.environments.drift:Drift", {}),
    "RadarGame-v0": ("worldmodel.environments.radar.game:RadarGame", {}),
    **{f"MemoryS{size}-v0": (_CUE, {"size": size}) for size in (7, 9, 11, 13, 17)},
}


def register(gymnasium: Any, entry_point: str | None = None) -> None:
    """Registers all as ``worldmodel/NAME``, or those of ``entry_point`` as ``NAME``."""
    for name, (entry, arguments) in ENVIRONMENTS.items():
        known_as = f"{NAMESPACE}/{name}" if entry_point is None else name
        if entry_point in (None, entry) and known_as not in gymnasium.registry:
            gymnasium.register(known_as, entry, kwargs=arguments)


def install() -> None:
    """Registers now, or on gymnasium's import."""
    gymnasium = sys.modules.get("gymnasium")
    if gymnasium is not None:
        register(gymnasium)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(importlib.abc.MetaPathFinder):
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
