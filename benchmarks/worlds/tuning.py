"""Learning rates and batch sizes of the memories, chosen by short runs on a seed that no result uses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from harness import rates
from world import session
from worldmodel.learning.token_trainer import TokenTrainConfig, TokenTrainer
from worldmodel.learning.view_sources import WorldSource
from worlds import rows

LOG = Path(__file__).resolve().parents[1] / "results" / "world_rooms_tuning.json"
BENCHMARK = "world_rooms_tuning"
SEED = 100
LEAST = 1e-5  # learning rate
Entry = dict[str, Any]


def tuned(row: str, config: TokenTrainConfig) -> TokenTrainConfig:
    """``config`` with the settings of the lowest loss in the log, where none is of a run that diverged."""
    found = best([entry for entry in _log() if entry["row"] == row])
    return config if found is None else dataclasses.replace(config, lr=found["lr"], batch_size=found["batch_size"])


def best(entries: list[Entry]) -> Entry | None:
    return min((entry for entry in entries if entry["loss"] is not None), key=lambda entry: entry["loss"], default=None)


def tune(row: str, minutes: float) -> None:
    """Adds the runs that the log lacks: each batch size with rates of powers of 2 to both sides of its best."""
    for batch_size in rows.ROWS[row].tuned:
        left = list(rows.RATES)
        while left:
            rate = left.pop(0)
            key = f"{row}/{batch_size}/{rate:g}"
            if key not in session.load(LOG, BENCHMARK)["runs"]:
                session.merge(LOG, key, trial(row, batch_size, rate, minutes), BENCHMARK)
            if not left:
                left = beyond([entry for entry in _log() if (entry["row"], entry["batch_size"]) == (row, batch_size)])


def beyond(entries: list[Entry]) -> list[float]:
    """The next rate, beyond those of ``entries``; a lower one if all of them diverged."""
    if best(entries) is None:
        lowest = min(entry["lr"] for entry in entries)
        return [lowest / 2] if lowest > LEAST else []
    found = rates.beyond([(entry["lr"], entry["loss"]) for entry in entries])
    return [] if found is None else [found]


def trial(row: str, batch_size: int, rate: float, minutes: float) -> Entry:
    torch.set_num_threads(1)
    plan = rows.ROWS[row]
    make, config_of = rows.WORLDS[plan.env]
    config = dataclasses.replace(plan.config(minutes, SEED), lr=rate, batch_size=batch_size)
    source = WorldSource(make, config_of(**plan.worlds), torch.Generator().manual_seed(SEED))
    trainer = TokenTrainer(plan.model, config, source)
    losses: list[dict[str, float]] = []
    entry: Entry = {"row": row, "batch_size": batch_size, "lr": rate, "minutes": minutes, "loss": None}
    try:
        while not trainer.finished:
            losses.append(trainer.iterate())
    except ArithmeticError as error:
        print(f"{row}, batches of {batch_size}, rate {rate:g}: {error}")
    else:
        last = losses[-max(1, len(losses) // 10) :]
        entry |= {name: sum(one[name] for one in last) / len(last) for name in ("loss", "returning")}
        print(f"{row}, batches of {batch_size}, rate {rate:g}: loss {entry['loss']:.4f}", flush=True)
    return {**entry, "updates": trainer.updates}


def _log() -> list[Entry]:
    return list(json.loads(LOG.read_text())["runs"].values()) if LOG.exists() else []
