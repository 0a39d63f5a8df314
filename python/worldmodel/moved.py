"""Old module paths: importing one warns and returns the new module."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

# Old -> new name.
MODULES = {
    "agent": "acting.agent",
    "average": "learning.ema",
    "batch": "data.batch",
    "collector": "learning.collector",
    "configuration": "runs.configuration",
    "decision": "model.decision",
    "demo_picture": "demo.picture",
    "demo_worker": "demo.worker",
    "display": "commands.display",
    "episodes": "environments.vector",
    "evaluate": "acting.rollout",
    "evaluation": "model.evaluation",
    "extras": "runs.optional_dependencies",
    "hidden_ball": "environments.hidden_ball",
    "imagine": "commands.imagine",
    "imagine_bands": "pictures.bands",
    "imagine_picture": "pictures.page",
    "interrupt": "commands.interrupt",
    "leaf_codecs": "model.codecs",
    "learner": "learning.learner",
    "memory": "model.memory",
    "meter": "learning.metrics",
    "minigrid": "environments.minigrid",
    "networks": "model.networks",
    "objectives": "learning.objectives",
    "open_loop": "model.open_loop",
    "options": "commands.options",
    "painters": "pictures.renderers",
    "perception": "model.perception",
    "pickled": "environments.pickle_io",
    "pieces": "data.chunks",
    "prediction": "model.prediction",
    "presets": "learning.presets",
    "repeat_previous": "demo.repeat_previous",
    "replay": "data.replay",
    "run": "runs.run",
    "scales": "learning.running_stats",
    "settings": "learning.settings",
    "spaces": "data.spaces",
    "storage": "runs.storage",
    "train": "commands.train",
    "video": "acting.video",
    "watch": "learning.callback",
    "world_model": "model.world_model",
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "worldmodel" or name not in MODULES:
            return None
        new = f"worldmodel.{MODULES[name]}"
        warnings.warn(f"{fullname} has moved: import {new}", DeprecationWarning, stacklevel=2)
        return importlib.machinery.ModuleSpec(fullname, self, loader_state=new)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(str(spec.loader_state))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Restores the spec that importlib replaced."""
        module.__spec__ = self._spec


def install() -> None:
    """Enables the old names."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
