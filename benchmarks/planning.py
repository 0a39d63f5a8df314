"""Planners under the true dynamics of two rooms, beside random walks and straight lines.

    python benchmarks/planning.py                                        # 100 episodes each: half an hour of one core
    python benchmarks/planning.py --methods cem --episodes 20 --layouts random
    python benchmarks/planning.py --picture docs/plans.png               # plans drawn on the rooms
    python benchmarks/planning.py --report                               # the table

Episodes have 200 steps, as PLDM's and EB-JEPA's; one is a success at its first step within 4.5 pixels of the goal, and
held if it ends there. Rows are merged into one JSON file. Times are CPU time, all episodes as one batch.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import torch
from PIL import Image, ImageDraw

from harness import environment, tables
from worldmodel.acting.planner import PlannerConfig
from worldmodel.acting.room_episodes import CONFIG, Controller, TrueDynamics, drive
from worldmodel.environments.two_rooms.moves import Layouts
from worldmodel.environments.two_rooms.pictures import SCALE, drawing
from worldmodel.environments.two_rooms.walks import WalkConfig, sample_tasks, sample_walks

RESULT = Path(__file__).resolve().parent / "results" / "planning_cpu.json"
METHODS = ("random", "straight", "cem", "mppi", "gradient")
CPU = torch.device("cpu")
STEPS, RADIUS = 200, 4.5
PLANNERS: dict[str, dict[str, Any]] = {"cem": {}, "mppi": {"method": "mppi"}, "gradient": {"method": "gradient"}}


def scene(layout: str, episodes: int, seed: int) -> tuple[Layouts, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    layouts = Layouts.sampled(random, episodes) if layout == "random" else Layouts.fixed(episodes)
    return layouts, *sample_tasks(random, layouts)


def controller(method: str, layouts: Layouts, goal: torch.Tensor, seed: int) -> Controller:
    if method == "random":
        walks = sample_walks(np.random.default_rng(seed), layouts, STEPS, WalkConfig(crossing=0))
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
    return {
        "method": method,
        "layout": layout,
        "episodes": episodes,
        "seed": seed,
        "first_hit": float(driven.hit.double().mean()),
        "held": float(driven.held.double().mean()),
        "median_steps": int(driven.first.median()),
        "ms_per_action": 1000 * seconds / (episodes * STEPS) if method in PLANNERS else None,
    }


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
    rows = sorted(rows, key=lambda row: (row["layout"], METHODS.index(row["method"])))
    cells = [
        [
            row["layout"],
            row["method"],
            f"{row['first_hit']:.0%}",
            f"{row['held']:.0%}",
            str(row["median_steps"]) if row["median_steps"] <= STEPS else "none",
            "" if row["ms_per_action"] is None else f"{row['ms_per_action']:.2f}",
        ]
        for row in rows
    ]
    return tables.markdown(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--methods", default=list(METHODS), help=f"comma-separated, of {', '.join(METHODS)}", **names)
    parser.add_argument("--layouts", default=["fixed", "random"], help="fixed, random", **names)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--report", action="store_true")
    chosen = parser.parse_args()
    if unknown := {*chosen.methods} - {*METHODS} | {*chosen.layouts} - {"fixed", "random"}:
        parser.error(f"there is no {sorted(unknown)}")
    saved = json.loads(chosen.json.read_text()) if chosen.json.exists() else {"rows": []}
    if chosen.picture:
        draw(chosen.picture, chosen.seed)
    elif not chosen.report:
        torch.set_num_threads(1)
        for layout in chosen.layouts:
            for method in chosen.methods:
                row = measure(method, layout, chosen.episodes, chosen.seed)
                others = [old for old in saved["rows"] if (old["method"], old["layout"]) != (method, layout)]
                about = {"benchmark": "planning", "device": "cpu", "environment": environment.describe(CPU)}
                saved = {**about, "rows": [*others, row]}
                chosen.json.write_text(json.dumps(saved, indent=1) + "\n")
                print(row, flush=True)
    if saved["rows"]:
        print(report(saved["rows"]))


if __name__ == "__main__":
    main()
