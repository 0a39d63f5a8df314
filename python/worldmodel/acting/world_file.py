"""A world as one safetensors file, in the format of ``docs/state_files.md``: JSON and tensors, nothing executed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from worldmodel.learning.world_run import check_sizes
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.tokens import TokenConfig, TokenWorldModel
from worldmodel.runs import storage
from worldmodel.runs.configuration import ConfigurationError, from_json, to_json
from worldmodel.runs.files import RunError, shown
from worldmodel.runs.template import check_like
from worldmodel.runs.trust import check_installed, installed_alone

if TYPE_CHECKING:
    from worldmodel.acting.world import World

KIND, VERSION = "worldmodel world", 1
MOST_TIME = 10**9  # steps of a world, after which float64 still tells where what drifts is


def write(world: "World", path: Path) -> None:
    """Replaces the file once the new one is whole. Raises OSError."""
    storage.save(
        path,
        {"kind": KIND, "version": VERSION, "model": to_json(world.config), "about": world.about, **_content(world)},
    )


def read(kind: type["World"], path: Path, trust: bool) -> "World":
    """Raises RunError for anything but a whole file of this version."""
    try:
        saved = storage.load(path)
    except (storage.DamagedFile, storage.NewerFile, FileNotFoundError) as error:
        raise RunError(str(error)) from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(saved, dict) or saved.get("kind") != KIND:
        raise RunError(f"{path} is no world, as World.save writes them")
    found = saved.get("version")
    if type(found) is not int or found != VERSION:
        raise RunError(f"{path} has version {found!r:.20} of worlds, this release reads version {VERSION}")
    try:
        config = from_json(TokenConfig, saved["model"], "model")
        if not trust:
            check_installed(path, [block.block for block in config.blocks if isinstance(block, CustomBlock)])
        check_sizes(config, saved["weights"])
        _check_map(config, saved["map"])
        with installed_alone(path.parent, trust):
            model = TokenWorldModel(config)
        check_like(saved["weights"], dict(model.state_dict()), "weights")
        model.load_state_dict(saved["weights"])
        bodies = saved["bodies"]
        if not isinstance(saved["about"], dict):
            raise TypeError("about is no dict")
        world = kind(model, bodies=len(bodies), about=saved["about"])
        _restore(world, saved)
    except (ConfigurationError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} is damaged: {shown(error, 300)}") from error
    return world


def _content(world: "World") -> dict[str, Any]:
    bodies = [
        {
            "view": body.view,
            "certainty": body.certainty,
            "state": body.state,
            "position": body.position,
            "steps": body.steps,
        }
        for body in world.bodies
    ]
    return {
        "weights": dict(world.model.state_dict()),
        "map": world.shared_map,
        "last_seen": world.last_seen,
        "bodies": bodies,
        "time": world.time,
        "generator": world.generator.get_state(),
    }


def _check_map(config: TokenConfig, world_map: Any) -> None:
    """Compares the map's shape with the settings, before anything is allocated by them. Raises ValueError."""
    found = expected = None if world_map is None else tuple(world_map.shape)
    if config.place is not None:
        groups, period = max(1, len(config.place.velocities)), config.place.period
        frequencies = period**2 // 2 + (1 if period % 2 else 2)  # of ``lattice(period)``
        expected = 1, groups, 2 * frequencies, config.width // groups
    if found != expected:
        raise ValueError(f"map has shape {found}, expected {expected}")


def _restore(world: "World", saved: dict[str, Any]) -> None:
    like = _content(world)
    for name, value in like.items():
        if name not in ("bodies", "weights"):
            check_like(saved[name], value, name)
    if saved["time"] > MOST_TIME:
        raise ValueError(f"time is {saved['time']}, expected at most {MOST_TIME:,}")
    seen = saved["last_seen"]
    if seen.numel() and not -1 <= int(seen.min()) <= int(seen.max()) <= saved["time"]:
        raise ValueError(
            f"last_seen is from {int(seen.min())} to {int(seen.max())}, expected from -1, never, to the time, "
            f"{saved['time']}"
        )
    for index, (body, found) in enumerate(zip(world.bodies, saved["bodies"], strict=True)):
        check_like(found, like["bodies"][index], f"bodies.{index}")
        if found["steps"] > saved["time"]:
            raise ValueError(f"bodies.{index}.steps is {found['steps']}, expected at most the time, {saved['time']}")
        low, high = int(found["view"].min()), int(found["view"].max())
        if low < 0 or high >= world.config.classes:
            raise ValueError(f"bodies.{index}.view has tokens from {low} to {high}")
        for name in ("view", "certainty", "state", "position", "steps"):
            setattr(body, name, found[name])
    world.shared_map = saved["map"]
    world.time, world.last_seen = int(saved["time"]), saved["last_seen"]
    world.generator.set_state(saved["generator"].to(torch.uint8))
