"""Planners in two rooms, under the true dynamics and in learned latents, beside random walks and straight lines.

    python benchmarks/planning.py --seeds 5,6,7                          # all rows; those that exist are kept
    python benchmarks/planning.py --methods learned --layouts fixed --seeds 0 --json /tmp/planning.json
    python benchmarks/planning.py --methods cem --episodes 20 --layouts random --again
    python benchmarks/planning.py --picture docs/plans.png               # plans drawn on the rooms
    python benchmarks/planning.py --report                               # the table

Episodes have 200 steps, as PLDM's and EB-JEPA's; one is a success at its first step within 4.5 pixels of the goal, and
held if it ends there. A row is of one method, layout and seed, of weights, walks and goals alike, and is written as
soon as it is measured: a run that was interrupted goes on. Times are CPU time, all episodes as one batch.

"learned" draws walks, which are on disk as `record` writes them, learns from them for some CPU minutes with the preset
planning, an action being four moves, and plans in the latents. "unregularised" leaves out what prevents a collapse.
What the log says of a collapse is in the row, also with other settings by --latent.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import torch

from harness import tables
from harness.keyed_rows import KeyedRows, mean_and_range
from worldmodel.acting.plan_decider import IN_LATENTS
from worldmodel.acting.planner import PlannerConfig
from worldmodel.acting.room_episodes import CONFIG, Controller, Driven, LearnedDynamics, TrueDynamics, drive
from worldmodel.data.actions import ActionSpec, action_generator
from worldmodel.data.datasets import EpisodeWriter
from worldmodel.data.spaces import ObservationSpec
from worldmodel.environments.single import make_single
from worldmodel.environments.two_rooms.moves import Layouts
from worldmodel.environments.two_rooms.pictures import drawing, pixels, with_paths
from worldmodel.environments.two_rooms.walks import WalkConfig, sample_tasks, sample_walks
from worldmodel.learning.held_out import recorded_sources
from worldmodel.learning.interval import CLOCKS
from worldmodel.learning.latent_objective import collapse_notice
from worldmodel.learning.presets import PRESETS
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import SourceTrainer
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.memory import keep_freed_memory

RESULT = Path(__file__).resolve().parent / "results" / "planning_cpu.json"
METHODS = ("random", "straight", "cem", "learned", "unregularised", "mppi", "gradient")
STEPS, RADIUS = 200, 4.5
PLANNERS: dict[str, dict[str, Any]] = {"cem": {}, "mppi": {"method": "mppi"}, "gradient": {"method": "gradient"}}
LEARNED: dict[str, dict[str, Any]] = {"learned": {}, "unregularised": {"sigreg": 0.0}}  # settings of the latents
MINUTES, WALKS = {"fixed": 3.0, "random": 20.0}, {"fixed": 500, "random": 2000}
ACTION_STEPS, WALK = 4, 88


def scene(layout: str, episodes: int, seed: int) -> tuple[Layouts, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    layouts = Layouts.sampled(random, episodes) if layout == "random" else Layouts.fixed(episodes)
    return layouts, *sample_tasks(random, layouts)


def controller(method: str, layouts: Layouts, goal: torch.Tensor, seed: int) -> Controller:
    if method == "random":
        walks = sample_walks(action_generator(seed), layouts, STEPS, WalkConfig(crossing=0))
        return lambda places: walks.moves
    if method == "straight":
        return lambda places: (goal - places)[:, None]
    config = PlannerConfig(**{**CONFIG.__dict__, **PLANNERS[method]})
    return TrueDynamics(goal, layouts, config, seed=seed)


def measure(method: str, layout: str, episodes: int, seed: int) -> dict[str, Any]:
    layouts, start, goal = scene(layout, episodes, seed)
    began = time.process_time()
    driven = drive(controller(method, layouts, goal, seed), start, goal, layouts, STEPS, RADIUS)
    seconds = time.process_time() - began
    used = 1000 * seconds / (episodes * STEPS) if method in PLANNERS else None
    return {**_result(method, layout, seed, driven), "ms_per_action": used}


def _result(method: str, layout: str, seed: int, driven: Driven) -> dict[str, Any]:
    return {
        "method": method,
        "layout": layout,
        "episodes": len(driven.first),
        "seed": seed,
        "first_hit": float(driven.hit.double().mean()),
        "held": float(driven.held.double().mean()),
        "median_steps": int(driven.first.median()),
    }


@dataclasses.dataclass(frozen=True)
class Training:
    """Of "learned".

    Attributes:
        minutes: of CPU time.
        walks: recorded, of ``WALK`` steps.
        latent: settings of the latents that replace the preset's.
    """

    minutes: float
    walks: int
    latent: dict[str, Any]


class Recorded:
    """Walks on disk, as long as this lives, drawn all at once."""

    def __init__(self, layout: str, seed: int, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "walks.npz"
        began = time.process_time()
        random, environment = np.random.default_rng(seed), make_single("worldmodel/TwoRooms-v0")
        layouts = Layouts.sampled(random, count) if layout == "random" else Layouts.fixed(count)
        walks = sample_walks(random, layouts, WALK, WalkConfig(crossing=0.3, bumping=0.3))
        spec = ActionSpec.from_space(environment.action_space)
        with EpisodeWriter(self.path, ObservationSpec.from_space(environment.observation_space), spec) as writer:
            for walk in range(count):
                seen = pixels(walks.positions[walk], layouts[walk])
                for step in range(WALK):
                    action = spec.from_env(walks.moves[walk, step].numpy())
                    writer.step({"observation": seen[step]}, actions=action, is_first=step == 0)
                writer.step({"observation": seen[WALK]}, is_last=True)
        self.seconds = time.process_time() - began


recorded_walks = functools.lru_cache(maxsize=1)(Recorded)  # for the rows that learn from the same ones


def learn(layout: str, seed: int, training: Training) -> tuple[WorldModel, dict[str, Any]]:
    """A world model of recorded walks, and what its training measured."""
    recorded = recorded_walks(layout, seed, training.walks)
    model = PRESETS["planning"]().model
    latent = dataclasses.replace(model.perception.latent, **training.latent)
    config = TrainConfig(
        data=recorded.path,
        action_steps=ACTION_STEPS,
        preset="planning",
        model=dataclasses.replace(model, perception=dataclasses.replace(model.perception, latent=latent)),
        seed=seed,
        threads=1,
        minutes=training.minutes,
        clock="cpu",
    )
    source, held_out = recorded_sources(config)
    assert held_out is not None
    trainer, now, said = SourceTrainer(config, source), CLOCKS[config.clock], 0.0
    while not trainer.finished:
        began = now()
        trainer.iterate()
        trainer.seconds += now() - began
        if trainer.seconds - said > 10:
            said = trainer.seconds
            metrics = trainer.metrics()
            names = ("loss/dynamics", "loss/rollout", "latent/persistence", "latent/rank", "latent/deviation")
            print(trainer.updates, {name: round(metrics[name], 4) for name in names}, flush=True)
            if (notice := collapse_notice(metrics)) is not None:
                print(notice, flush=True)
    losses = trainer.learner.held_out_losses(held_out.sample()[0])
    assert trainer.learner.ema is not None
    measured = {name: losses[name] for name in losses if name.startswith(("latent/", "loss/dynamics", "loss/rollout"))}
    about = {**vars(training), "updates": trainer.updates, "record_seconds": recorded.seconds, **measured}
    return trainer.learner.ema.module.eval(), {**about, "collapse": collapse_notice(losses)}


def measure_learned(method: str, layout: str, episodes: int, seed: int, training: Training) -> dict[str, Any]:
    world_model, about = learn(layout, seed, training)
    layouts, start, goal = scene(layout, episodes, seed)
    began = time.process_time()
    controller = LearnedDynamics(world_model, goal, layouts, IN_LATENTS, ACTION_STEPS, seed=seed)
    driven = drive(controller, start, goal, layouts, STEPS, RADIUS)
    seconds = time.process_time() - began
    return {**_result(method, layout, seed, driven), "ms_per_action": 1000 * seconds / (episodes * STEPS), **about}


def draw(path: Path, seed: int) -> None:
    """Rooms, the first plan in orange, the way taken in blue."""
    rows = []
    for layout in ("fixed", "random"):
        layouts, start, goal = scene(layout, 4, seed)
        planned = TrueDynamics(goal, layouts, seed=seed)
        planned(start)
        assert planned.plan is not None
        first = planned._rollout(start, planned.plan.actions[:, None])[:, 0]
        driven = drive(planned, start, goal, layouts, STEPS, RADIUS)
        frames = []
        for row in range(4):
            picture = drawing(start[row], goal[row], RADIUS, layouts[row])
            way = driven.path[row, : int(driven.first[row]) + 1]
            paths = ((torch.cat([start[row][None], first[row]]), (234, 120, 20)), (way, (36, 99, 235)))
            picture = with_paths(picture, paths)
            frames.append(np.pad(picture, ((0, 6), (0, 6), (0, 0)), constant_values=255))
        rows.append(np.concatenate(frames, 1))
    imageio.imwrite(path, np.concatenate(rows))


def report(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and their range."""
    header = ["layout", "controller", "seeds", "first hit", "held", "median steps", "ms per action"]
    cells = []
    order = sorted(rows, key=lambda row: (row["layout"], METHODS.index(row["method"]), _named(row)))
    for (layout, name), group in itertools.groupby(order, lambda row: (row["layout"], _named(row))):
        found = list(group)
        steps, times = statistics.median(row["median_steps"] for row in found), [row["ms_per_action"] for row in found]
        cells.append(
            [
                layout,
                name,
                ", ".join(str(row["seed"]) for row in sorted(found, key=lambda row: int(row["seed"]))),
                mean_and_range([row["first_hit"] for row in found]),
                mean_and_range([row["held"] for row in found]),
                f"{steps:g}" if steps <= STEPS else "none",
                "" if None in times else f"{statistics.mean(times):.2f}",
            ]
        )
    return tables.markdown(header, cells)


def _named(row: dict[str, Any]) -> str:
    if row["method"] not in LEARNED:
        return row["method"]
    own = {name: value for name, value in row["latent"].items() if name not in LEARNED[row["method"]]}
    return ", ".join([row["method"], f"{row['minutes']:g} min", *(f"{name} {value}" for name, value in own.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--methods", default=METHODS[:5], help=f"comma-separated, of {', '.join(METHODS)}", **names)
    parser.add_argument("--layouts", default=["fixed", "random"], help="fixed, random", **names)
    parser.add_argument("--seeds", default=[5], type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--minutes", type=float, help=f'of CPU time, in which "learned" learns; {MINUTES} if not given')
    parser.add_argument("--walks", type=int, help=f"recorded walks; {WALKS} if not given")
    parser.add_argument("--latent", type=json.loads, default={}, help="settings of the latents, JSON")
    parser.add_argument("--again", action="store_true", help="measure rows that exist as well")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--report", action="store_true")
    chosen = parser.parse_args()
    if unknown := {*chosen.methods} - {*METHODS} | {*chosen.layouts} - {*MINUTES}:
        parser.error(f"there is no {sorted(unknown)}")
    if chosen.picture:
        draw(chosen.picture, chosen.seeds[0])
        return
    saved = KeyedRows(chosen.json, "planning", _key)
    if not chosen.report:
        torch.set_num_threads(1)
        keep_freed_memory()
        for layout, seed, method in itertools.product(chosen.layouts, chosen.seeds, chosen.methods):
            walks, minutes = chosen.walks or WALKS[layout], chosen.minutes or MINUTES[layout]
            training = Training(minutes, walks, {**LEARNED.get(method, {}), **chosen.latent})
            planned = {"method": method, "layout": layout, "seed": seed, **vars(training)}
            if saved.has(planned) and not chosen.again:
                continue
            if method in LEARNED:
                row = measure_learned(method, layout, chosen.episodes, seed, training)
            else:
                row = measure(method, layout, chosen.episodes, seed)
            saved.add(row)
    if rows := saved.rows:
        print(report(rows))


def _key(row: dict[str, Any]) -> tuple[str, int, str]:
    """Layout and seed, and the name in the table."""
    return row["layout"], row["seed"], _named(row)


if __name__ == "__main__":
    main()
