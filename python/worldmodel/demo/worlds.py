"""``demo worlds``: trains a map of places on rooms, imagines a world of its own, edits and forks it, and draws that."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from worldmodel.acting.world import World
from worldmodel.demo.world_picture import draw
from worldmodel.environments.returning import Predictor, baselines, score
from worldmodel.learning.threads import threads_restored
from worldmodel.learning.token_evaluation import TokenPredictor
from worldmodel.learning.token_trainer import TokenTrainConfig, TokenTrainer
from worldmodel.learning.view_sources import WorldSource
from worldmodel.learning.world_run import Described, WorldRunConfig, describe, described_run, world_arguments
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Positive, Seed, check_writable
from worldmodel.runs.run import Run

ENV = "worldmodel/Rooms-v0"
_PERSISTENCE = 0.8  # of the body's direction


@dataclasses.dataclass
class WorldsDemoOptions(Checked):
    """Trains a map of places, imagines a world, edits and forks it, and draws one picture."""

    folder: Path = Path("demo-worlds")
    """Folder for the run, the worlds, the results and the picture."""
    seconds: Positive = 40
    """Seconds of training."""
    steps: Annotated[int, Bounds(16, 2**20)] = 2000
    """Steps in the imagined world, and of the test."""
    seed: Seed = 0
    """Seed of weights and worlds."""


@threads_restored()
def run_worlds(options: WorldsDemoOptions) -> Path:
    """Returns the picture's path.

    Raises:
        ConfigurationError: the folder cannot be written, or has a demonstration already.
    """
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), options.folder
    if (folder / "run").exists():
        raise ConfigurationError(f"--folder {folder} has a demonstration already: remove it, or name another folder")
    check_writable("--folder", folder / "worlds.json", parents=True)
    trainer, described = _train(options)
    worlds = described.make(8, described.worlds, torch.Generator().manual_seed(options.seed + 1))
    predictors: dict[str, Predictor] = {"map of places": TokenPredictor(trainer.model, worlds), **baselines(worlds)}
    scores = {name: found.by_gap() for name, found in score(worlds, predictors, options.steps).items()}
    world = World.create(folder / "run", options.seed)
    returning, changed = walk(world, options.steps, options.seed)
    _say(f"imagined {options.steps:,} steps: {returning:,} cells came back into view, {changed:,} were another colour")
    edited, before = world.fork(), look(world)
    places = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    for place in places:
        edited.edit(place, 3)
    elsewhere = int((look(edited) != before).sum()) - sum(int(before[_index(world, place)] != 3) for place in places)
    _say(f"edited {len(places)} places: {elsewhere} others changed")
    other = World.create(folder / "run", options.seed + 1)
    walk(other, options.steps, options.seed)
    for name, one in (("first", world), ("edited", edited), ("other", other)):
        one.save(folder / f"{name}.world")
    again = World.load(folder / "first.world")
    for one in (again, world):
        walk(one, min(200, options.steps), options.seed)
    assert again.shared_map is not None and world.shared_map is not None
    same = torch.equal(again.shared_map, world.shared_map) and bool((again.observe() == world.observe()).all())
    _say(f"entered again from its file, and walked on: {'bit-equal' if same else 'another world'}")
    summary: dict[str, Any] = {
        "updates": trainer.updates,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "by_gap": scores,
        "returning": returning,
        "changed": changed,
        "elsewhere": elsewhere,
        "entered_bit_equal": same,
        "seconds": time.perf_counter() - start,
    }
    (folder / "worlds.json").write_text(json.dumps(summary, indent=1) + "\n")
    picture = folder / "worlds.png"
    pictures = {"imagined": look(world), "its fork, edited": look(edited), "of another seed": look(other)}
    draw(scores, pictures, worlds.colours, summary, picture)
    _say(f"play in it: python -m worldmodel play {folder / 'first.world'}")
    _say(f"{summary['seconds']:.0f} s in all")
    return picture


def walk(world: World, steps: int, seed: int) -> tuple[int, int]:
    """A wandering body: cells that came back into view, and those of them that had become another class."""
    random, known, action = np.random.default_rng(seed), look(world), 0
    rows, columns = world.config.grid
    around = np.stack(np.meshgrid(np.arange(rows) - rows // 2, np.arange(columns) - columns // 2, indexing="ij"), -1)
    returning = changed = 0
    for _ in range(steps):
        action = action if random.random() < _PERSISTENCE else int(random.integers(world.config.actions))
        view, *_, info = world.step(action)
        at = (around + info["position"] + world.size // 2) % world.size
        before = known[at[..., 0], at[..., 1]]
        returning += int((before >= 0).sum())
        changed += int(((before >= 0) & (before != view)).sum())
        known[at[..., 0], at[..., 1]] = view
    return returning, changed


def look(world: World) -> np.ndarray:
    """Classes of all places, -1 where none was seen: int64 (size, size)."""
    side = np.arange(world.size) - world.size // 2
    classes, _ = world.look(np.stack(np.meshgrid(side, side, indexing="ij"), -1))
    return np.where(world.last_seen.numpy() >= 0, classes, -1)


def _index(world: World, place: tuple[int, int]) -> tuple[int, int]:
    return place[0] + world.size // 2, place[1] + world.size // 2


def _train(options: WorldsDemoOptions) -> tuple[TokenTrainer, Described]:
    env_args = world_arguments(ENV, {})
    described = describe(ENV, env_args)
    train = TokenTrainConfig(minutes=options.seconds / 60, seed=options.seed)
    config = WorldRunConfig(ENV, env_args, model=described.model, train=train)
    run = Run.create(options.folder / "run", described_run(config))
    try:
        generator = torch.Generator().manual_seed(options.seed)
        trainer = TokenTrainer(config.model, train, WorldSource(described.make, described.worlds, generator))
        while not trainer.finished:
            metrics = trainer.iterate()
        shares = f"{metrics['returning']:.2%} of cells back in view and {metrics['moves']:.2%} of moves foreseen"
        _say(f"{trainer.updates:,} updates: {shares}")
        run.save(trainer.updates, trainer.state_dict())
    finally:
        run.close()
    return trainer, described


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
