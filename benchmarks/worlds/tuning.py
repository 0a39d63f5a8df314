"""Learning rates of the memories, chosen by short runs on a seed that no result uses."""

import json
from pathlib import Path
from typing import Any

from world import session

LOG = Path(__file__).resolve().parents[1] / "results" / "world_rooms_tuning.json"
SEED = 100


def best_rate(row: str) -> float | None:
    """The learning rate with the lowest loss in the log, where none is of a run that diverged; None if not tuned."""
    if not LOG.exists():
        return None
    entries = json.loads(LOG.read_text())["runs"].values()
    found = [entry for entry in entries if entry["row"] == row and entry["loss"] is not None]
    return min(found, key=lambda entry: entry["loss"])["lr"] if found else None


def tune(row: str, minutes: float) -> None:
    """Adds a run per rate to the log, of those that are missing: twice the highest too, as long as it is the best."""
    from worlds import rows

    rates = list(rows.RATES)
    for rate in rates:
        key = f"{row}/{rate:g}"
        if key not in session.load(LOG, "world_rooms_tuning")["runs"]:
            session.merge(LOG, key, _trial(row, rate, minutes), "world_rooms_tuning")
        if rate == rates[-1] and best_rate(row) == rate:
            rates.append(2 * rate)


def _trial(row: str, rate: float, minutes: float) -> dict[str, Any]:
    import dataclasses

    import torch

    from worldmodel.learning.token_trainer import TokenTrainer
    from worldmodel.learning.view_sources import WorldSource
    from worlds import rows

    torch.set_num_threads(1)
    plan = rows.ROWS[row]
    make, config_of = rows.WORLDS[plan.env]
    config = dataclasses.replace(plan.config(minutes, SEED), lr=rate)
    source = WorldSource(make, config_of(**plan.worlds), torch.Generator().manual_seed(SEED))
    trainer = TokenTrainer(plan.model, config, source)
    losses: list[dict[str, float]] = []
    entry: dict[str, Any] = {"row": row, "lr": rate, "minutes": minutes, "loss": None}
    try:
        while not trainer.finished:
            losses.append(trainer.iterate())
    except ArithmeticError as error:
        print(f"{row}/{rate:g}: {error}")
    else:
        last = losses[-max(1, len(losses) // 10) :]
        entry |= {name: sum(one[name] for one in last) / len(last) for name in ("loss", "returning")}
        print(f"{row}/{rate:g}: loss {entry['loss']:.4f}, returning {entry['returning']:.4f}", flush=True)
    return {**entry, "updates": trainer.updates}
