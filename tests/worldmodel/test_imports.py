"""Allowed imports and old import paths."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import worldmodel
from worldmodel import moved
from worldmodel.environments import registry
from worldmodel.environments.ids import ENVIRONMENTS
from worldmodel.runs.migration import upgrade_config

PYTHON = Path(__file__).parents[2] / "python"
KERNELS = Path(__file__).parents[2] / "wmkernels"

# Allowed imports. Top-level modules may import all packages, unless listed.
BELOW = {
    "runs": set(),
    "data": {"runs"},
    "model": {"data", "runs"},
    "pictures": {"model", "data", "runs"},
    "environments": {"data", "runs"},
    "learning": {"environments", "pictures", "model", "data", "runs"},
    "acting": {"learning", "environments", "pictures", "model", "data", "runs"},
    "demo": {"acting", "learning", "environments", "pictures", "model", "data", "runs"},
    "play": {"acting", "learning", "environments", "pictures", "model", "data", "runs"},
    "commands": {"play", "demo", "acting", "learning", "environments", "pictures", "model", "data", "runs"},
    "": {"commands", "environments", "runs"},
}


def imported(file: Path) -> Iterator[str]:
    """Includes imports in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_rooms_below_them_alone() -> None:
    files = sorted((PYTHON / "worldmodel").rglob("*.py"))
    rooms = {file.relative_to(PYTHON / "worldmodel").parent.as_posix().partition("/")[0] for file in files}
    assert {"" if room == "." else room for room in rooms} == set(BELOW)
    wrong = []
    for file in files:
        inside = file.relative_to(PYTHON / "worldmodel")
        room = inside.parts[0] if len(inside.parts) > 1 else ""
        for name in imported(file):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "worldmodel" and other in BELOW and other not in BELOW[room] | {room}:
                wrong.append(f"{inside} imports {name}")
    assert not wrong


def test_the_kernels_do_not_know_the_world_model() -> None:
    wrong = [f"{file} imports {name}" for file in KERNELS.rglob("*.py") for name in imported(file) if "world" in name]
    assert not wrong


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_gymnasium() -> None:
    heavy = "{'torch', 'gymnasium', 'numpy', 'wmkernels'}"
    assert run(f"import sys, worldmodel; print({heavy} & set(sys.modules))") == "set()"
    assert run(f"import sys, worldmodel.environments; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("order", ["worldmodel, gymnasium", "gymnasium, worldmodel"])
def test_the_environments_are_registered_whichever_is_imported_first(order: str) -> None:
    made = "gymnasium.make('worldmodel/HiddenBall-v0').unwrapped"
    assert run(f"import {order}; print(type({made}).__name__, {made}.pixels)") == "HiddenBall 0"


@pytest.mark.parametrize(
    "name",
    [
        "worldmodel:worldmodel/HiddenBallPixels-v0",
        "worldmodel.environments.hidden_ball:HiddenBallPixels-v0",
        "worldmodel.environments.hidden_ball:worldmodel/HiddenBallPixels-v0",
        "worldmodel.hidden_ball:HiddenBallPixels-v0",
    ],
)
def test_gymnasium_makes_them_by_module_and_id(name: str) -> None:
    assert run(f"import gymnasium; print(gymnasium.make({name!r}).unwrapped.pixels)") == "4"


def test_every_environment_has_an_id_and_old_ids_name_it() -> None:
    for name in ENVIRONMENTS:
        assert registry.resolve(f"worldmodel/{name}") == f"worldmodel/{name}"
    for old in ("worldmodel.hidden_ball:HiddenBall-v0", "worldmodel.minigrid:MemoryS9-v0"):
        new = f"worldmodel/{old.partition(':')[2]}"
        with pytest.warns(FutureWarning, match=f"environment '{old}' is {new} now"):
            assert registry.resolve(old) == new
        assert upgrade_config({"train": {"env": old}}) == {"train": {"env": new}}
    with pytest.raises(registry.UnknownEnvironment, match="no environment 'worldmodel/HiddenBal-v0'; did you mean"):
        registry.resolve("worldmodel/HiddenBal-v0")
    with pytest.raises(registry.UnknownEnvironment, match=r"the module 'worldmodel\.nothing' cannot be imported"):
        registry.resolve("worldmodel.nothing:HiddenBall-v0")


def test_every_module_path_of_the_release_before_gives_the_new_module() -> None:
    for old, new in moved.MODULES.items():
        sys.modules.pop(f"worldmodel.{old}", None)
        spec = importlib.import_module(f"worldmodel.{new}").__spec__
        with pytest.warns(DeprecationWarning, match=rf"worldmodel\.{old} has moved: import worldmodel\.{new}"):
            found = importlib.import_module(f"worldmodel.{old}")
        assert found is sys.modules[f"worldmodel.{new}"] and found.__spec__ is spec
    assert run(
        "import warnings; warnings.simplefilter('ignore'); import worldmodel.memory as m; print(m.__name__)"
    ) == ("worldmodel.model.memory")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'worldmodel\.nothing'"):
        importlib.import_module("worldmodel.nothing")


def test_a_warning_names_the_line_that_imports_a_moved_module() -> None:
    program = "import worldmodel\nimport worldmodel.replay"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "<string>:2: DeprecationWarning: worldmodel.replay has moved: import worldmodel.data.replay" in done.stderr


def test_names_that_stay_give_no_warning() -> None:
    assert run("from worldmodel.environments import make, UnknownEnvironment; print(make.__module__)") == (
        "worldmodel.environments.registry"
    )
    with pytest.raises(AttributeError, match="module 'worldmodel' has no attribute 'Nothing'"):
        _ = worldmodel.Nothing
    with pytest.raises(ImportError, match=r"cannot import name 'nothing' from 'worldmodel\.environments'"):
        from worldmodel.environments import nothing  # type: ignore[attr-defined]  # noqa: F401
    for old, new in (("Episodes", "VectorEnvironment"), ("VectorEpisodes", "GymnasiumVectorEnvironment")):
        with pytest.warns(DeprecationWarning, match=f"worldmodel.{old} is worldmodel.{new} now"):
            assert getattr(worldmodel, old) is getattr(worldmodel, new)
    assert set(worldmodel.__all__) <= set(dir(worldmodel))
