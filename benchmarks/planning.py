"""Planners under the true dynamics of two rooms and in learned latents, beside random walks and straight lines.

    python benchmarks/planning.py                                        # 100 episodes each: half an hour of one core
    python benchmarks/planning.py --methods cem --episodes 20 --layouts random
    python benchmarks/planning.py --picture docs/plans.png               # plans drawn on the rooms
    python benchmarks/planning.py --methods learned --layouts fixed --minutes 3 --train-seed 1
    python benchmarks/planning.py --methods learned --latent '{"sigreg": 0}'   # what prevents a collapse is left out
    python benchmarks/planning.py --report                               # the table

Episodes have 200 steps, as PLDM's and EB-JEPA's; one is a success at its first step within 4.5 pixels of the goal, and
held if it ends there. Rows are merged into one JSON file. Times are CPU time, all episodes as one batch.

"learned" records walks with `record`, learns from them for some CPU minutes with the preset planning, an action being
four moves, and plans in the latents.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import torch
from PIL import Image, ImageDraw

from harness import environment, tables
from worldmodel.acting.planner import PlannerConfig
from worldmodel.acting.recording import record
from worldmodel.acting.room_episodes import CONFIG, Controller, Driven, LearnedDynamics, TrueDynamics, drive
from worldmodel.data.actions import action_generator
from worldmodel.environments.two_rooms.moves import Layouts
from worldmodel.environments.two_rooms.pictures import SCALE, drawing
from worldmodel.environments.two_rooms.walks import WalkConfig, sample_tasks, sample_walks
from worldmodel.learning.held_out import recorded_sources
from worldmodel.learning.latent_objective import collapse_notice
from worldmodel.learning.presets import PRESETS
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import SourceTrainer
from worldmodel.model.world_model import WorldModel

RESULT = Path(__file__).resolve().parent / "results" / "planning_cpu.json"
METHODS = ("random", "straight", "cem", "mppi", "gradient", "learned")
CPU = torch.device("cpu")
STEPS, RADIUS = 200, 4.5
PLANNERS: dict[str, dict[str, Any]] = {"cem": {}, "mppi": {"method": "mppi"}, "gradient": {"method": "gradient"}}
ACTION_STEPS, WALK = 4, 88
IN_LATENTS = PlannerConfig(std=0.4, first=2, iterations=5)  # of the longest move


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
        seed: of weights, batches and recorded walks.
        walks: recorded, of ``WALK`` steps.
        latent: settings of the latents that replace the preset's.
    """

    minutes: float
    seed: int
    walks: int
    latent: dict[str, Any]


def learn(layout: str, training: Training) -> tuple[WorldModel, dict[str, Any]]:
    """A world model of recorded walks, and what its training measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "walks.npz"
        env_args = {"task": "walk", "length": WALK, "layout": layout, "crossing": 0.3, "bumping": 0.3}
        began = time.process_time()
        record("worldmodel/TwoRooms-v0", path, training.walks * WALK, seed=training.seed, env_args=env_args)
        recorded = time.process_time() - began
        model = PRESETS["planning"]().model
        latent = dataclasses.replace(model.perception.latent, **training.latent)
        model = dataclasses.replace(model, perception=dataclasses.replace(model.perception, latent=latent))
        config = TrainConfig(
            data=path, action_steps=ACTION_STEPS, preset="planning", model=model, seed=training.seed, threads=1
        )
        source, held_out = recorded_sources(config)
        assert held_out is not None
        trainer = SourceTrainer(config, source)
        began = said = time.process_time()
        while time.process_time() - began < 60 * training.minutes:
            trainer.iterate()
            if time.process_time() - said > 10:
                said = time.process_time()
                metrics = trainer.metrics()
                names = ("loss/dynamics", "loss/rollout", "latent/persistence", "latent/rank", "latent/deviation")
                print(trainer.updates, {name: round(metrics[name], 4) for name in names}, flush=True)
                if (notice := collapse_notice(metrics)) is not None:
                    print(notice, flush=True)
        losses = trainer.learner.held_out_losses(held_out.sample()[0])
    assert trainer.learner.ema is not None
    measured = {name: losses[name] for name in losses if name.startswith(("latent/", "loss/dynamics", "loss/rollout"))}
    about = {f"train_{name}" if name == "seed" else name: value for name, value in vars(training).items()}
    about |= {"updates": trainer.updates, "record_seconds": recorded, **measured}
    return trainer.learner.ema.module.eval(), about


def measure_learned(layout: str, episodes: int, seed: int, training: Training) -> dict[str, Any]:
    world_model, about = learn(layout, training)
    layouts, start, goal = scene(layout, episodes, seed)
    began = time.process_time()
    controller = LearnedDynamics(world_model, goal, layouts, IN_LATENTS, ACTION_STEPS, seed=seed)
    driven = drive(controller, start, goal, layouts, STEPS, RADIUS)
    seconds = time.process_time() - began
    return {**_result("learned", layout, seed, driven), "ms_per_action": 1000 * seconds / (episodes * STEPS), **about}


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
            picture = Image.fromarray(drawing(start[row], goal[row], RADIUS, layouts[row]))
            lines = ImageDraw.Draw(picture)
            way = driven.path[row, : int(driven.first[row]) + 1]
            for places, colour in ((torch.cat([start[row][None], first[row]]), (234, 120, 20)), (way, (36, 99, 235))):
                points = [tuple(point) for point in ((places + 0.5) * SCALE).tolist()]
                lines.line(points, fill=colour, width=2)
            frames.append(np.pad(np.asarray(picture), ((0, 6), (0, 6), (0, 0)), constant_values=255))
        rows.append(np.concatenate(frames, 1))
    imageio.imwrite(path, np.concatenate(rows))


def report(rows: list[dict[str, Any]]) -> str:
    header = ["layout", "controller", "first hit", "held", "median steps", "ms per action"]
    rows = sorted(rows, key=lambda row: (row["layout"], METHODS.index(row["method"]), _named(row)))
    cells = [
        [
            row["layout"],
            _named(row),
            f"{row['first_hit']:.0%}",
            f"{row['held']:.0%}",
            str(row["median_steps"]) if row["median_steps"] <= STEPS else "none",
            "" if row["ms_per_action"] is None else f"{row['ms_per_action']:.2f}",
        ]
        for row in rows
    ]
    return tables.markdown(header, cells)


def _named(row: dict[str, Any]) -> str:
    if row["method"] != "learned":
        return row["method"]
    latent = "".join(f", {name} {value}" for name, value in row["latent"].items())
    return f"learned, {row['minutes']:g} min, seed {row['train_seed']}{latent}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--methods", default=list(METHODS), help=f"comma-separated, of {', '.join(METHODS)}", **names)
    parser.add_argument("--layouts", default=["fixed", "random"], help="fixed, random", **names)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=3, help='of CPU time, in which "learned" learns')
    parser.add_argument("--train-seed", type=int, default=0, help='of what "learned" records and learns')
    parser.add_argument("--walks", type=int, default=500, help="recorded walks")
    parser.add_argument("--latent", type=json.loads, default={}, help="settings of the latents, JSON")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--report", action="store_true")
    chosen = parser.parse_args()
    if unknown := {*chosen.methods} - {*METHODS} | {*chosen.layouts} - {"fixed", "random"}:
        parser.error(f"there is no {sorted(unknown)}")
    training = Training(chosen.minutes, chosen.train_seed, chosen.walks, chosen.latent)
    saved = json.loads(chosen.json.read_text()) if chosen.json.exists() else {"rows": []}
    if chosen.picture:
        draw(chosen.picture, chosen.seed)
    elif not chosen.report:
        torch.set_num_threads(1)
        for layout in chosen.layouts:
            for method in chosen.methods:
                if method == "learned":
                    row = measure_learned(layout, chosen.episodes, chosen.seed, training)
                else:
                    row = measure(method, layout, chosen.episodes, chosen.seed)
                others = [old for old in saved["rows"] if (_named(old), old["layout"]) != (_named(row), layout)]
                about = {"benchmark": "planning", "device": "cpu", "environment": environment.describe(CPU)}
                saved = {**about, "rows": [*others, row]}
                chosen.json.write_text(json.dumps(saved, indent=1) + "\n")
                print(row, flush=True)
    if saved["rows"]:
        print(report(saved["rows"]))


if __name__ == "__main__":
    main()
