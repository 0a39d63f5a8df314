"""What a run names is imported only if it is installed, or if the user asks for it.

A run's settings name modules: its environment's, and those of its memory's blocks. The run may come from anyone, and
Python also looks for modules in the working directory, where the run's files may lie.
"""

import contextlib
import importlib.machinery
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from worldmodel.runs.files import RunError, shown

ASK = "--trust (from Python trust=True)"


class NotTrusted(RunError):
    """A run names a module that is not installed."""


@contextlib.contextmanager
def installed_alone(folder: Path | str, trust: bool = False) -> Iterator[None]:
    """Without the working directory, the run's ``folder`` and relative paths in ``sys.path``; ``trust`` keeps them."""
    before = list(sys.path)
    if not trust:
        sys.path[:] = [entry for entry in before if not _is_foreign(entry, Path(folder))]
    try:
        yield
    finally:
        sys.path[:] = before


def check_installed(folder: Path | str, names: Iterable[str]) -> None:
    """Refuses names ``module:...`` of modules that are not installed; executes nothing.

    A module that is imported already is as good as installed.

    Raises:
        NotTrusted: the message says where the module was found.
    """
    root = Path(folder).resolve()
    for name in names:
        module = name.rpartition(":")[0]
        top = module.partition(".")[0]
        with installed_alone(folder):
            places = [path for path in _places(module) if path.is_relative_to(root) and not _is_packages(path)]
        if places:
            raise NotTrusted(
                f"{folder} names {shown(name)!r}, which is in the run's folder, {shown(places[0])}: if you trust who "
                f"made the run, {ASK} executes it"
            )
        if not module or (top in sys.modules and top not in sys.stdlib_module_names):
            continue
        parts = module.split(".")
        if not all(map(str.isidentifier, parts)) or "__main__" in parts or top in sys.stdlib_module_names:
            raise NotTrusted(f"{folder} names {shown(name)!r}, and {shown(module)!r} is no module of a package")
        if not is_installed(name, folder) and (found := _found(top)) is not None:
            place = found.origin or ", ".join(found.submodule_search_locations or ())
            raise NotTrusted(
                f"{folder} names {shown(name)!r}, and {shown(top)!r} is not installed but found in "
                f"{shown(place, 1000)}: install it, or if you trust who made the run, {ASK} executes it"
            )


def is_installed(name: str, folder: Path | str) -> bool:
    """Whether the module of ``name``, ``module:...``, is found without the working directory and ``folder``."""
    top = name.rpartition(":")[0].partition(".")[0]
    with installed_alone(folder):
        return not top or _found(top) is not None


def _is_foreign(entry: str, folder: Path) -> bool:
    if not os.path.isabs(entry):
        return True
    path = Path(entry).resolve()
    return not _is_packages(path) and (path == Path.cwd().resolve() or path.is_relative_to(folder.resolve()))


def _is_packages(path: Path) -> bool:
    return any(path.is_relative_to(Path(packages).resolve()) for packages in sysconfig.get_paths().values())


def _places(module: str) -> Iterator[Path]:
    """Where a module would be, in the innermost imported package that it is in or in ``sys.path``; imports nothing."""
    parts = module.split(".")
    imported = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in sys.modules), 0)
    package = sys.modules.get(".".join(parts[:imported]))
    for entry in sys.path if package is None else getattr(package, "__path__", ()):
        yield Path(entry, *parts[imported:]).resolve()


def _found(top: str) -> importlib.machinery.ModuleSpec | None:
    """Not of a module that is imported already."""
    specs = (finder.find_spec(top, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None), None)
