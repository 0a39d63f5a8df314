"""Trains a row in one thread, tests it, and measures the worlds that it imagines."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from worldmodel.environments.returning import score
from worldmodel.learning.token_evaluation import TokenPredictor
from worldmodel.learning.token_trainer import TokenTrainer
from worldmodel.learning.view_sources import WorldSource
from worldmodel.learning.world_run import WorldRunConfig, described_run
from worldmodel.model.blocks import LocalAttentionBlock
from worldmodel.model.tokens import TokenConfig, TokenWorldModel
from worldmodel.runs.configuration import to_json
from worldmodel.runs.run import Run
from worlds import imagined, rows, tuning
from worlds.rows import Row, Test

HELD_OUT = 10**6  # first seed of the worlds of tests
POINTS = 30  # of a curve
SPANS = ((5, 64), (65, 256))  # steps unseen, of the table of Drift


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        row: its name.
        minutes: of training; of the tests' steps too, a share of ``minutes / shortest`` where ``quick``.
        seed: of weights and worlds.
        quick: tiny tests, a smoke test.
    """

    row: str
    minutes: float
    seed: int
    quick: bool = False

    @property
    def key(self) -> str:
        return f"{self.row}/{self.minutes:g} min/{self.seed}"


def execute(plan: Plan, folder: Path) -> dict[str, Any]:
    """The run's entry in the result."""
    torch.set_num_threads(1)
    row = rows.ROWS[plan.row]
    trainer, curve = train(row, plan)
    tests = {}
    for test in row.tests:
        if plan.quick:
            test = dataclasses.replace(test, steps=32, batch=2)
        tests[test.name] = measure(trainer.model, row, test, plan.seed)
    entry = {
        "row": plan.row,
        "minutes": plan.minutes,
        "seed": plan.seed,
        "parameters": rows.parameters(row.model),
        "updates": trainer.updates,
        "cpu_seconds": trainer.seconds,
        "curve": curve,
        "model": to_json(row.model),
        "train": to_json(trainer.config),
        "tests": tests,
    }
    if row.imagines:
        config = WorldRunConfig("worldmodel/Rooms-v0", row.worlds, model=row.model, train=trainer.config)
        run = Run.create(folder, described_run(config))
        run.save(trainer.updates, trainer.state_dict())
        run.close()
        entry["imagined"] = imagined.measure(folder, plan.seed, *((200, 10) if plan.quick else (10_000, 100)))
    return entry


def train(row: Row, plan: Plan) -> tuple[TokenTrainer, list[dict[str, float]]]:
    """The trained model, and the means of the metrics over each of ``POINTS`` shares of the minutes.

    No batch comes twice, so that the metrics are of worlds that the model has not seen. Unlike the tests they count the
    border of a room, which is easy.
    """
    make, config_of = rows.WORLDS[row.env]
    config = row.config(plan.minutes, plan.seed)
    if row.tuned:
        config = tuning.tuned(plan.row, config)
    source = WorldSource(make, config_of(**row.worlds), torch.Generator().manual_seed(plan.seed))
    trainer = TokenTrainer(row.model, config, source)
    points: list[list[dict[str, float]]] = [[] for _ in range(POINTS)]
    while not trainer.finished:
        point = int(POINTS * trainer.progress)
        points[point].append({**trainer.iterate(), "minutes": trainer.seconds / 60})
    curve = [
        {name: sum(one[name] for one in point) / len(point) for name in ("minutes", "loss", "returning")}
        for point in points
        if point
    ]
    return trainer, curve


def measure(model: TokenWorldModel, row: Row, test: Test, seed: int) -> dict[str, Any]:
    """Scores on new worlds, the same for all rows."""
    make, config_of = rows.WORLDS[row.env]
    worlds = make(test.batch, config_of(**test.options), torch.Generator().manual_seed(HELD_OUT + seed))
    fitted = TokenWorldModel(_fitted(model.config, test, worlds.side)).eval()
    fitted.load_state_dict(model.state_dict())
    predictor = TokenPredictor(fitted, worlds)
    spans = {span: [0, 0] for span in SPANS}

    def predict(steps: Any) -> torch.Tensor:
        predicted = predictor(steps)
        right = predicted == steps["next_tokens"]
        for (low, high), counts in spans.items():
            known = steps["inside"] & ~steps["fresh"] & (steps["gap"] >= low) & (steps["gap"] <= high)
            counts[0] += int((right & known).sum())
            counts[1] += int(known.sum())
        return predicted

    start = time.process_time()
    found = score(worlds, {"model": predict}, test.steps, test.chunk)["model"].to_json()
    seconds = time.process_time() - start
    for (low, high), (right, cells) in spans.items():
        if cells:
            found[f"unseen for {low}-{high}"] = {"cells": cells, "accuracy": right / cells}
    return {"steps": test.steps, "worlds": test.batch, "cpu_seconds": seconds, **found}


def _fitted(config: TokenConfig, test: Test, side: int) -> TokenConfig:
    """The same weights on a lattice that holds the worlds."""
    if test.frames is not None:
        wider = (
            dataclasses.replace(block, frames=test.frames) if isinstance(block, LocalAttentionBlock) else block
            for block in config.blocks
        )
        config = dataclasses.replace(config, blocks=tuple(wider))
    if config.place is None:
        return config
    return dataclasses.replace(config, place=dataclasses.replace(config.place, period=side, **test.place))
