"""``demo plan``: records walks through two rooms, learns latents from them, plans in these, and draws the plans.

The learner sees pictures and moves, no places, no reward and no goal. A goal is a picture; what a plan foresees is
drawn where recorded pictures of the nearest latents have their dot.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.acting.plan_decider import IN_LATENTS
from worldmodel.acting.recording import record
from worldmodel.acting.room_episodes import LearnedDynamics, drive
from worldmodel.data.datasets import EpisodeFile
from worldmodel.demo.plan_picture import draw, film
from worldmodel.environments.two_rooms.moves import Layouts
from worldmodel.environments.two_rooms.walks import WalkConfig, sample_tasks, sample_walks
from worldmodel.learning.held_out import recorded_sources
from worldmodel.learning.latent_objective import collapse_notice
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.threads import threads_restored
from worldmodel.learning.trainer import SourceTrainer
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.configuration import to_json
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Positive, Seed, check_writable
from worldmodel.runs.run import Run

ENV = "worldmodel/TwoRooms-v0"
ACTION_STEPS, WALK = 4, 88
RADIUS = 4.5  # of a success, pixels
_PICTURES, _NEAREST = 2000, 4  # recorded pictures that places are read by, at most, and of each
_SAY_SECONDS = 15


@dataclasses.dataclass
class PlanDemoOptions(Checked):
    """Records walks, learns from them, plans to goals behind a wall, draws the plans and films them."""

    folder: Path = Path("demo-plan")
    """Folder for the walks, the run, the results, the picture and the film."""
    walks: Annotated[int, Bounds(2, 100_000)] = 120
    """Recorded walks, of 88 moves each."""
    seconds: Positive = 100
    """Seconds of training."""
    episodes: Annotated[int, Bounds(4, 10_000)] = 40
    """Goals to plan to."""
    steps: Annotated[int, Bounds(8, 10_000)] = 200
    """Moves per goal, at most."""
    seed: Seed = 0
    """Seed of walks, weights and goals."""


@threads_restored()
def run_plan(options: PlanDemoOptions) -> Path:
    """Returns the picture's path.

    Raises:
        ConfigurationError: the folder cannot be written, or has a demonstration already.
        MissingPackage: matplotlib is not installed.
    """
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), options.folder
    if (folder / "run").exists():
        raise ConfigurationError(f"--folder {folder} has a demonstration already: remove it, or name another folder")
    check_writable("--folder", folder / "plan.json", parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    walks = folder / "walks.npz"
    env_args = {"task": "walk", "length": WALK, "crossing": 0.3, "bumping": 0.3}
    record(ENV, walks, options.walks * WALK, seed=options.seed, env_args=env_args)
    _say(f"recorded {options.walks * WALK:,} moves in {time.perf_counter() - start:.0f} s: {walks}")
    trainer = _train(options, walks)
    world_model = trainer.acting_model.eval()
    read = places_of(world_model, EpisodeFile(walks))
    layouts, began, goal = scene(options)
    controller = LearnedDynamics(world_model, goal, layouts, IN_LATENTS, ACTION_STEPS, seed=options.seed)
    foreseen: list[Tensor] = []

    def planned(places: Tensor) -> Tensor:
        moves = controller(places)
        foreseen.append(torch.cat([places[:, None], read(controller.foreseen())], 1)[:4])
        return moves

    driven = {"planned": drive(planned, began, goal, layouts, options.steps, RADIUS)}
    driven["straight line"] = drive(
        lambda places: (goal - places)[:, None], began, goal, layouts, options.steps, RADIUS
    )
    random = sample_walks(np.random.default_rng(options.seed + 2), layouts, options.steps, WalkConfig(crossing=0))
    driven["random walk"] = drive(lambda places: random.moves, began, goal, layouts, options.steps, RADIUS)
    for name, found in driven.items():
        _say(f"{name}: {_share(found.hit)} of {options.episodes} goals reached, {_share(found.held)} held at the end")
    summary: dict[str, Any] = {
        "updates": trainer.updates,
        "reached": {name: float(found.hit.double().mean()) for name, found in driven.items()},
        "held": {name: float(found.held.double().mean()) for name, found in driven.items()},
        "seconds": time.perf_counter() - start,
    }
    (folder / "plan.json").write_text(json.dumps(summary, indent=1) + "\n")
    picture = folder / "plan.png"
    draw(driven, foreseen[0], goal, layouts, RADIUS, picture)
    shown = film(driven["planned"], foreseen, ACTION_STEPS, goal, layouts, RADIUS, folder / "plan.mp4")
    _say(f"film: {shown}")
    _say(f"other goals: python -m worldmodel plan {folder / 'run'} --env {ENV} --longest 0.45")
    _say(f"{time.perf_counter() - start:.0f} s in all")
    return picture


def scene(options: PlanDemoOptions) -> tuple[Layouts, Tensor, Tensor]:
    """Layouts, starts and goals in different rooms, (episodes, 2)."""
    layouts = Layouts.fixed(options.episodes)
    return layouts, *sample_tasks(np.random.default_rng(options.seed + 1), layouts)


def places_of(world_model: WorldModel, file: EpisodeFile) -> Callable[[Tensor], Tensor]:
    """Reads places, pixels (..., 2), from latents (..., width): where the nearest recorded pictures have their dot."""
    every = -(-file.steps // _PICTURES)
    seen = torch.from_numpy(np.array(file.arrays["observations/observation"][::every]))  # (pictures, side, side, 2)
    dot = seen[..., 0].float()
    pixels = torch.arange(dot.shape[-1], dtype=torch.float32)
    mass = dot.sum((1, 2))
    places = torch.stack([(dot.sum(1) * pixels).sum(-1), (dot.sum(2) * pixels).sum(-1)], -1) / mass[:, None]
    with torch.no_grad():
        latents = world_model.perception({"observation": seen})

    def read(given: Tensor) -> Tensor:
        nearest = torch.cdist(given.flatten(0, -2), latents).topk(_NEAREST, largest=False).indices
        return places[nearest].mean(1).view(*given.shape[:-1], 2)

    return read


def _train(options: PlanDemoOptions, walks: Path) -> SourceTrainer:
    config = TrainConfig(
        data=walks,
        action_steps=ACTION_STEPS,
        preset="planning",
        minutes=options.seconds / 60,
        seed=options.seed,
        threads=1,
    )
    source, _ = recorded_sources(config)
    trainer = SourceTrainer(config, source)
    spaces = {"observation": source.observation_spec.to_json(), "action": source.action_spec.to_json()}
    described = {"train": to_json(config), "spaces": to_json(spaces), "init_from": []}
    run = Run.create(options.folder / "run", described)
    try:
        start = said = time.perf_counter()
        while not trainer.finished:
            trainer.iterate()
            trainer.seconds = time.perf_counter() - start
            if trainer.finished or time.perf_counter() - said > _SAY_SECONDS:
                said = time.perf_counter()
                metrics = trainer.metrics()
                share = metrics["loss/dynamics"] / metrics["latent/persistence"]
                _say(f"{trainer.updates:,} updates: the error of the next latent is {share:.0%} of that of no change")
                if (notice := collapse_notice(metrics)) is not None:
                    _say(notice)
        run.save(trainer.updates, trainer.state_dict())
    finally:
        run.close()
    return trainer


def _share(found: Tensor) -> str:
    return f"{float(found.double().mean()):.0%}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
