"""A world that a run imagines: is it the same on return, after an edit, in a fork, and in another process?"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.acting.world import World


def walk(world: World, steps: int, seed: int) -> None:
    """A wandering body."""
    random, action = np.random.default_rng(seed), 0
    for _ in range(steps):
        action = int(random.integers(world.config.actions)) if random.random() < 0.2 else action
        world.step(action)


def measure(run: Path, seed: int, steps: int, edits: int) -> dict[str, Any]:
    world = World.create(run, seed)
    start = time.process_time()
    cells, changed = _return(world, steps, seed)
    seconds = time.process_time() - start
    found = {"steps": steps, "returning": cells, "changed": changed, "ms_per_step": 1e3 * seconds / steps}
    return found | _edit(world, edits, seed) | {"entered_bit_equal": _enter(world, seed)}


def every_place(world: World) -> np.ndarray:
    """(size, size, 2)."""
    side = np.arange(world.size) - world.size // 2
    return np.stack(np.meshgrid(side, side, indexing="ij"), -1)


def _return(world: World, steps: int, seed: int) -> tuple[int, int]:
    """Cells that were in a view before, and those of them that are now another class."""
    rows, columns = world.config.grid
    around = every_place(world)[:rows, :columns] + world.size // 2 - [rows // 2, columns // 2]
    known = np.full((world.size, world.size), -1)
    returning = changed = 0
    random, action = np.random.default_rng(seed), 0
    for _ in range(steps):
        action = int(random.integers(world.config.actions)) if random.random() < 0.2 else action
        view, *_, info = world.step(action)
        at = (around + info["position"] + world.size // 2) % world.size
        before = known[at[..., 0], at[..., 1]]
        returning += int((before >= 0).sum())
        changed += int(((before >= 0) & (before != view)).sum())
        known[at[..., 0], at[..., 1]] = view
    return returning, changed


def _edit(world: World, edits: int, seed: int) -> dict[str, Any]:
    """Edits out of view, one after another in a fork: what is read back, what else changed, and the original."""
    random, fork, places = np.random.default_rng(seed), world.fork(), every_place(world)
    before, _ = world.look(places)
    read_back = elsewhere = 0
    for _ in range(edits):
        old, _ = fork.look(places)
        row, column = random.integers(world.size, size=2)
        token = int((old[row, column] + random.integers(1, world.config.classes)) % world.config.classes)
        fork.edit(places[row, column], token)
        new, _ = fork.look(places)
        read_back += int(new[row, column] == token)
        elsewhere += int((new != old).sum() - (new[row, column] != old[row, column]))
    after, _ = world.look(places)
    counted = {"edits": edits, "edits_read_back": read_back, "cells_changed_elsewhere": elsewhere}
    return counted | {"fork_changed_the_original": bool((before != after).any())} | _arrive(world, edits, seed)


def _arrive(world: World, edits: int, seed: int) -> dict[str, int]:
    """Edits where a body will come, seen on arrival; and by an unedited fork, which sees the old class."""
    seen = kept = tried = 0
    for trial in range(edits // 5):
        scout = world.fork()
        walk(scout, 100, seed + trial)
        place = scout.bodies[0].position
        old = int(scout.look(place)[0])
        edited, other = world.fork(), world.fork()
        token = (old + 1) % (world.config.classes - 1)  # a floor, so that the way there stays free
        if old >= world.config.classes - 1:
            continue
        edited.edit(place.tolist(), token)
        for one in (edited, other):
            walk(one, 100, seed + trial)
        middle = tuple(side // 2 for side in world.config.grid)
        tried += 1
        seen += int(edited.observe()[middle] == token)
        kept += int(other.observe()[middle] == old)
    return {"arrivals": tried, "edit_seen_on_arrival": seen, "old_seen_in_other_fork": kept}


_ENTER = """
import sys, torch
sys.path[:0] = sys.argv[3].split(":")
from worlds.imagined import walk
from worldmodel.acting.world import World
torch.set_num_threads(1)
world = World.load(sys.argv[1])
walk(world, 300, int(sys.argv[2]))
world.save(sys.argv[1])
"""


def _enter(world: World, seed: int) -> bool:
    """Another process goes on in the saved world; this one as well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.world"
        world.save(path)
        subprocess.run([sys.executable, "-c", _ENTER, str(path), str(seed), ":".join(sys.path)], check=True)
        there = World.load(path)
    walk(world, 300, seed)
    one, other = world.bodies[0], there.bodies[0]
    same = torch.equal(world.shared_map, there.shared_map) and torch.equal(one.view, other.view)
    return same and all(torch.equal(value, other.state[name]) for name, value in one.state.items())
