"""Imitation of the arm's expert, beside what leaves out one part of it, and beside no learning.

    python benchmarks/imitation.py --seeds 5,6,7                         # all rows; those that exist are kept
    python benchmarks/imitation.py --methods imitation,squared --seeds 0 --minutes 2 --json /tmp/imitation.json
    python benchmarks/imitation.py --report                              # the table

A row is of one method and seed, of demonstrations, weights and tables alike, and is written as soon as it is measured:
a run that was interrupted goes on. Minutes are CPU time of one thread. A success is the environment's, within 100
steps. "single task" is four policies, each with a quarter of the demonstrations and of the minutes.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import tables
from harness.keyed_rows import KeyedRows, mean_and_range
from worldmodel.acting.arm_episodes import (
    Actor,
    Performed,
    PolicyActor,
    expert_actor,
    mean_command_actor,
    random_actor,
    record_demonstrations,
    success_by_task,
)
from worldmodel.data.datasets import EpisodeFile
from worldmodel.environments.arm.worlds import TASKS, ArmConfig
from worldmodel.learning.imitation_trainer import ImitationTrainConfig, ImitationTrainer, demonstrations
from worldmodel.model.blocks import LSTMBlock, ScanBlock
from worldmodel.model.imitation import ImitationConfig, ImitationPolicy
from worldmodel.model.memory import MemoryConfig
from worldmodel.model.mixture_density import MeanConfig
from worldmodel.runs.memory import keep_freed_memory

RESULT = Path(__file__).resolve().parent / "results" / "imitation_cpu.json"
BASELINES = ("random", "mean command", "expert")
POLICY = ImitationConfig()
MEMORY = {
    name: dataclasses.replace(POLICY, memory=MemoryConfig(POLICY.memory.width, (block,) * 3))
    for name, block in (("LSTM", LSTMBlock()), ("scan", ScanBlock()))
}
LEARNED: dict[str, dict[str, Any]] = {  # settings of the training
    "imitation": {},
    "single task": {},
    "VAE": {"reconstruction": "vae"},
    "no reconstruction": {"reconstruction": "none"},
    "squared error": {"policy": dataclasses.replace(POLICY, head=MeanConfig())},
    **{name: {"policy": policy} for name, policy in MEMORY.items() if policy != POLICY},
}
METHODS = (*BASELINES, *LEARNED)
NOISE = 0.3
FILE = "demonstrations.npz"
TABLES = 10_000  # added to the seed of tables that are tried, which no demonstration has


@dataclasses.dataclass(frozen=True)
class Training:
    """Of what learns.

    Attributes:
        minutes: of CPU time.
        demonstrations: recorded episodes.
        noise: of what is executed while they are.
        joints: whether the joints are observed.
    """

    minutes: float
    demonstrations: int
    noise: float
    joints: bool

    def arm(self, task: str = "any") -> ArmConfig:
        return ArmConfig(task=task, joints=self.joints)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1 + len(TASKS))
def _recorded(training: Training, seed: int, task: str) -> "tempfile.TemporaryDirectory[str]":
    folder = tempfile.TemporaryDirectory()
    count = training.demonstrations if task == "any" else training.demonstrations // len(TASKS)
    path = Path(folder.name) / FILE
    record_demonstrations(path, count, training.arm(task), noise=training.noise, seed=seed)
    return folder


def recorded(training: Training, seed: int, task: str = "any") -> Path:
    """A file of demonstrations, the same for all methods of a seed; it goes with the process."""
    return Path(_recorded(training, seed, task).name) / FILE


def learn(method: str, seed: int, training: Training, task: str = "any") -> tuple[ImitationPolicy, dict[str, Any]]:
    """A policy, and what its training measured."""
    minutes = training.minutes if task == "any" else training.minutes / len(TASKS)
    config = ImitationTrainConfig(**{"minutes": minutes, "clock": "cpu", "seed": seed, **LEARNED[method]})
    trainer = ImitationTrainer(config, demonstrations(recorded(training, seed, task), config))
    found: list[dict[str, float]] = []
    said = 0.0
    while not trainer.finished:
        found.append(trainer.iterate())
        if trainer.seconds - said > 30 or trainer.finished:
            said = trainer.seconds
            means = {name: statistics.mean(row[name] for row in found) for name in found[0]}
            found.clear()
            print(trainer.updates, {name: round(mean, 3) for name, mean in means.items()}, flush=True)
    return trainer.policy.eval(), {"updates": trainer.updates, **means}


def measure(method: str, episodes: int, seed: int, training: Training) -> dict[str, Any]:
    began = time.process_time()
    about: dict[str, Any] = {} if method in BASELINES else {**vars(training)}
    found: dict[str, Performed] = {}
    if method == "single task":
        for task in TASKS:
            policy, measured = learn(method, seed, training, task)
            about[task] = measured
            found |= tried(lambda task, worlds, policy=policy: PolicyActor(policy), training, episodes, seed, [task])
    elif method in LEARNED:
        policy, measured = learn(method, seed, training)
        about |= measured
        found = tried(lambda task, worlds: PolicyActor(policy), training, episodes, seed)
    elif method == "mean command":
        file = EpisodeFile(recorded(training, seed))
        found = tried(lambda task, worlds: mean_command_actor(file, task), training, episodes, seed)
    else:
        random = np.random.default_rng(seed)
        makers = {"random": lambda task, worlds: random_actor(random)}
        makers["expert"] = lambda task, worlds: expert_actor(worlds, random)
        found = tried(makers[method], training, episodes, seed)
    return {
        "method": method,
        "seed": seed,
        "episodes": episodes,
        "success": {task: float(performed.success.mean()) for task, performed in found.items()},
        "median_steps": {task: float(np.median(performed.first)) for task, performed in found.items()},
        "seconds": time.process_time() - began,
        **about,
    }


def tried(
    make_actor: Callable[..., Actor], training: Training, episodes: int, seed: int, tasks: Any = TASKS
) -> dict[str, Performed]:
    torch.manual_seed(seed)
    return success_by_task(make_actor, training.arm(), episodes, seed=TABLES + seed, tasks=tasks)


def report(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and their range."""
    cells = []
    for method, group in itertools.groupby(sorted(rows, key=_order), lambda row: _named(row)):
        found = list(group)
        shares = [[row["success"][task] for row in found] for task in TASKS]
        least = [min(row["success"].values()) for row in found]
        seeds = ", ".join(str(row["seed"]) for row in found)
        cells.append([method, seeds, *map(mean_and_range, [*shares, least]), _updates(found)])
    return tables.markdown(["method", "seeds", *TASKS, "least of the four", "updates"], cells)


def _updates(rows: list[dict[str, Any]]) -> str:
    """Of each row; of four policies, the sum."""
    own = [[row, *(row.get(task, {}) for task in TASKS)] for row in rows]
    counts = [sum(part.get("updates", 0) for part in parts) for parts in own]
    return ", ".join(f"{count:,}" for count in counts) if any(counts) else ""


def _order(row: dict[str, Any]) -> tuple[int, str, int]:
    return METHODS.index(row["method"]), _named(row), row["seed"]


def _named(row: dict[str, Any]) -> str:
    """As in the table: rows of one name differ by their seed alone."""
    if row["method"] in BASELINES:
        return str(row["method"])
    parts = [row["method"], f"{row['minutes']:g} min", f"{row['demonstrations']:,} demonstrations"]
    parts += [] if row["noise"] == NOISE else [f"noise {row['noise']:g}"]
    return ", ".join([*parts, *([] if row["joints"] else ["pictures alone"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--methods", default=METHODS, help=f"comma-separated, of {', '.join(METHODS)}", **names)
    parser.add_argument("--seeds", default=[5], type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--episodes", type=int, default=100, help="per task")
    parser.add_argument("--minutes", type=float, default=20.0, help="of CPU time, in which a policy learns")
    parser.add_argument("--demonstrations", type=int, default=2000, help="recorded episodes")
    parser.add_argument("--noise", type=float, default=NOISE, help="of what is executed while they are recorded")
    parser.add_argument("--pictures-alone", action="store_true", help="the joints are not observed")
    parser.add_argument("--again", action="store_true", help="measure rows that exist as well")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--report", action="store_true")
    chosen = parser.parse_args()
    if unknown := {*chosen.methods} - {*METHODS}:
        parser.error(f"there is no {sorted(unknown)}")
    saved = KeyedRows(chosen.json, "imitation", _key)
    if not chosen.report:
        torch.set_num_threads(1)
        keep_freed_memory()
        training = Training(chosen.minutes, chosen.demonstrations, chosen.noise, not chosen.pictures_alone)
        for seed, method in itertools.product(chosen.seeds, chosen.methods):
            planned = {"method": method, "seed": seed, **vars(training)}
            if saved.has(planned) and not chosen.again:
                continue
            row = measure(method, chosen.episodes, seed, training)
            saved.add(row)
    if rows := saved.rows:
        print(report(rows))


def _key(row: dict[str, Any]) -> tuple[str, int]:
    """The name in the table, and the seed."""
    return _named(row), row["seed"]


if __name__ == "__main__":
    main()
