"""Memory for planning: two rooms whose commands are turned by a hidden angle, with a rest before the goal counts.

    python benchmarks/turned_rooms.py --seeds 5,6,7                     # all rows; those that exist are kept
    python benchmarks/turned_rooms.py --methods scan --seeds 0 --minutes 5 --json /tmp/turned_rooms.json
    python benchmarks/turned_rooms.py --report                          # the table

Places are observed, not pictures: what is asked for is the angle, not the encoder. An action is one command for four
steps. Latents have two numbers, and their encoder is linear, so that their error is that of places. Episodes begin with
16 random actions; then the dot rests for 512 steps, in which a state has to keep what it learned of the angle.

"scan" and "memoryless" learn from the same episodes for equal minutes of CPU time, with about as many weights.
"unturned" is "memoryless" where no command is turned: what such a model and its plans reach if nothing is hidden. "true
dynamics" plans with the environment itself and knows the angle; "random" acts at random.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import tables
from harness.keyed_rows import KeyedRows, mean_and_range
from worldmodel.acting.plan_decider import FRESH_IN_LATENTS, IN_LATENTS
from worldmodel.acting.room_episodes import Controller, LearnedDynamics, TrueDynamics, drive
from worldmodel.data.actions import ActionSpec
from worldmodel.data.batch import Batch
from worldmodel.data.replay import ReplayConfig
from worldmodel.data.selection import repeated
from worldmodel.data.spaces import ObservationSpec
from worldmodel.environments.making import specs_of
from worldmodel.environments.two_rooms.game import TurnedRoomsConfig
from worldmodel.environments.two_rooms.moves import (
    HALF_DOOR,
    HALF_WALL,
    HIGH,
    LOW,
    MARGIN,
    Layouts,
    is_free,
    travel,
    turned,
)
from worldmodel.environments.two_rooms.pictures import places
from worldmodel.environments.two_rooms.walks import sample_tasks
from worldmodel.learning.interval import CLOCKS
from worldmodel.learning.latent_objective import collapse_notice
from worldmodel.learning.learner import LearnerConfig
from worldmodel.learning.objectives import ObjectiveConfig
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import SourceTrainer
from worldmodel.model.block import Block
from worldmodel.model.blocks import GatedConvBlock, ScanBlock
from worldmodel.model.latents import EmbeddingConfig
from worldmodel.model.memory import MemoryConfig
from worldmodel.model.perception import PerceptionConfig
from worldmodel.model.prediction import PredictionConfig
from worldmodel.model.world_model import WorldModel, WorldModelConfig
from worldmodel.runs.memory import keep_freed_memory

RESULT = Path(__file__).resolve().parent / "results" / "turned_rooms_cpu.json"
BLOCKS: dict[str, tuple[Block, ...]] = {
    "scan": (ScanBlock(),),
    "memoryless": (GatedConvBlock(d_conv=1, expand=5),),
    "unturned": (GatedConvBlock(d_conv=1, expand=5),),
}
LATENT = EmbeddingConfig(
    size=2, sigreg=0.0, variance=16.0, covariance=8.0, target_gradient=0.1, rollout=1, rollout_weight=0.0
)
HORIZON = 16  # actions, more than the longest way has
PLANNER, FRESH = (dataclasses.replace(config, horizon=HORIZON) for config in (IN_LATENTS, FRESH_IN_LATENTS))
METHODS = (*BLOCKS, "true dynamics", "random")
STEPS, RADIUS, MAX_STEP = 200, 4.5, 2.45
ACTION_STEPS, WANDER, REST = 4, 16, 128  # of actions: 64 steps, then 512
MINUTES, ROWS, ACTIONS, LONGEST_REST, RECORDED, HELD_OUT = 2.5, 32, 40, 32, 40_000, 500
CURVE = 10  # points of the learning curve


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Episodes of one fixed layout.

    Attributes:
        positions: before and after each action, pixels, (rows, actions + 1, 2).
        commands: of each action, pixels per step, (rows, actions, 2).
        angles: by which commands are turned, (rows,).
    """

    positions: Tensor
    commands: Tensor
    angles: Tensor

    def batch(self, rows: Tensor | slice = slice(None)) -> Batch:
        positions, commands = self.positions[rows], self.commands[rows]
        count, steps = positions.shape[:2]
        last = torch.zeros(count, steps, dtype=torch.bool)
        last[:, -1] = True
        zeros = torch.zeros(count, steps)
        encoded = (commands / MAX_STEP).repeat(1, 1, ACTION_STEPS)
        return Batch(
            {"observation": places(positions)},
            torch.cat([encoded, torch.zeros(count, 1, encoded.shape[-1])], 1),
            zeros,
            zeros.bool(),
            last,
            last.flip(1),
            ~zeros.bool(),
        )


def sample_commands(random: np.random.Generator, rows: int, actions: int) -> Tensor:
    """Of any direction, a quarter to all of the longest move: float32 (rows, actions, 2)."""
    headings = random.uniform(0, 2 * math.pi, (rows, actions))
    lengths = random.uniform(0.25, 1, (rows, actions)) * MAX_STEP
    return torch.from_numpy(np.stack([np.cos(headings), np.sin(headings)], -1) * lengths[..., None]).float()


def sample_episodes(random: np.random.Generator, commands: Tensor, turns: bool) -> Episodes:
    """Episodes of ``commands``, (rows, actions, 2), from anywhere, half of them from around the door or the wall."""
    rows, layouts = len(commands), Layouts.fixed(len(commands))
    angles = TurnedRoomsConfig(angles=0).turns(random, rows) if turns else torch.zeros(rows)
    start = random.uniform(LOW, HIGH, (rows, 2))
    door = np.array([float(layouts.wall[0]), float(layouts.door[0])])
    where = random.random(rows)
    start[:, 0] = np.where(where < 0.5, random.normal(door[0], 2 * HALF_DOOR, rows), start[:, 0])
    start[:, 1] = np.where(where < 0.25, random.normal(door[1], 2 * HALF_DOOR, rows), start[:, 1])
    free = torch.from_numpy(start.clip(LOW, HIGH)).float()
    side = torch.where(free[:, 0] < layouts.wall, -1, 1)
    beside = torch.stack([layouts.wall + side * (HALF_WALL + 2 * MARGIN), free[:, 1]], -1)
    free = torch.where(is_free(free, layouts)[:, None], free, beside)
    moves = turned(commands, angles[:, None]).repeat_interleave(ACTION_STEPS, 1)
    return Episodes(travel(free, moves, layouts)[:, ::ACTION_STEPS], commands, angles)


def with_rests(random: np.random.Generator, commands: Tensor) -> Tensor:
    """``commands``, some zero: one to eight actions, then a rest of one to ``LONGEST_REST``, short ones more often."""
    rows, actions = commands.shape[:2]
    moving = random.integers(1, 9, (rows, actions))
    resting = np.exp(random.uniform(0, math.log(LONGEST_REST + 1), (rows, actions))).astype(int)
    ends = np.stack([moving, resting], -1).reshape(rows, -1).cumsum(1)  # of the parts, in turn
    part = (ends[:, :, None] <= np.arange(actions)).sum(1)  # of each action, (rows, actions)
    return commands * torch.from_numpy(part % 2 == 0)[..., None]


class EpisodeSource:
    """Batches of whole episodes that are in memory: a ``data.source.Source``."""

    epochs = 0

    def __init__(self, episodes: Episodes, batch_size: int, seed: int) -> None:
        self.episodes, self.batch_size = episodes, batch_size
        self.observation_spec, self.action_spec = specs()
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.episodes.angles)

    @property
    def transitions(self) -> int:
        return self.episodes.commands[..., 0].numel()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self.episodes).values())

    def sample(self, version: int = 0) -> tuple[Batch, dict[str, float]]:
        return self.episodes.batch(torch.randint(len(self), (self.batch_size,), generator=self._generator)), {}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._generator.set_state(saved["generator"])


def specs() -> tuple[ObservationSpec, ActionSpec]:
    observation, action = specs_of("worldmodel/TurnedRooms-v0", env_args={"observes": "place"})
    return observation, repeated(action, ACTION_STEPS)


def recorded(seed: int, turns: bool) -> Episodes:
    random = np.random.default_rng(seed)
    return sample_episodes(random, with_rests(random, sample_commands(random, RECORDED, ACTIONS)), turns)


def held_out(seed: int, turns: bool, rest: int) -> Episodes:
    """Episodes that wander, rest for ``rest`` actions and go on for eight."""
    random = np.random.default_rng([seed, 1])
    commands = sample_commands(random, HELD_OUT, WANDER + 8)
    stay = torch.zeros(HELD_OUT, rest, 2)
    return sample_episodes(random, torch.cat([commands[:, :WANDER], stay, commands[:, WANDER:]], 1), turns)


@torch.no_grad()
def error_over_copying(world_model: WorldModel, episodes: Episodes) -> Tensor:
    """Squared error of each action's prediction over that of no change, of means over rows: (actions,)."""
    batch = episodes.batch()
    observed = world_model.observe(batch)
    z, prior = observed.latent, world_model.predict(observed, batch).prior
    return (prior[:, :-1] - z[:, 1:]).square().mean((0, 2)) / (z[:, :-1] - z[:, 1:]).square().mean((0, 2))


def world_model_config(method: str) -> WorldModelConfig:
    return WorldModelConfig(
        PerceptionConfig(LATENT, layers=0),
        MemoryConfig(width=32, blocks=BLOCKS[method]),
        PredictionConfig(hidden=64, layers=2, action_gate=True),
    )


def train_config(method: str, seed: int, minutes: float) -> TrainConfig:
    return TrainConfig(
        preset="planning",
        model=world_model_config(method),
        learner=LearnerConfig(ema=100, objective=ObjectiveConfig(horizon=1, imagination_starts=1)),
        replay=ReplayConfig(batch_size=ROWS, window=ACTIONS + 1, burn_in=0),
        seed=seed,
        threads=1,
        minutes=minutes,
        clock="cpu",
    )


def learn(method: str, seed: int, minutes: float) -> tuple[WorldModel, dict[str, Any]]:
    """A world model of turned commands, and what its training measured."""
    turns, config = method != "unturned", train_config(method, seed, minutes)
    source = EpisodeSource(recorded(seed, turns), config.replay.batch_size, seed)
    moving, rested = held_out(seed, turns, 0), held_out(seed, turns, REST)
    trainer, now, curve = SourceTrainer(config, source), CLOCKS[config.clock], list[dict[str, float]]()
    assert trainer.learner.ema is not None
    learned = trainer.learner.ema.module
    while not trainer.finished:
        began = now()
        trainer.iterate()
        trainer.seconds += now() - began
        if trainer.finished or trainer.seconds >= (len(curve) + 1) / CURVE * 60 * minutes:
            error = error_over_copying(learned.eval(), moving)
            after = error_over_copying(learned, rested)[WANDER + REST]
            found = {"error": float(error[WANDER:].mean()), "after_rest": float(after)}
            curve.append({"updates": trainer.updates, "seconds": round(trainer.seconds, 1), **found})
            metrics = trainer.metrics()
            said = {name: round(metrics[name], 4) for name in ("loss/dynamics", "latent/rank", "latent/deviation")}
            print(curve[-1], said, [round(float(x), 2) for x in error], flush=True)
    parameters = sum(
        p.numel() for part in (learned.entry, learned.memory, learned.prediction) for p in part.parameters()
    )
    about = {"minutes": minutes, "parameters": parameters, "collapse": collapse_notice(trainer.metrics())}
    return learned, {**about, **curve[-1], "curve": curve}


def plan(method: str, seed: int, episodes: int, world_model: WorldModel | None) -> dict[str, Any]:
    """Episodes that wander, rest, and then are to reach a goal in the room where they are, or in the other one."""
    random, layouts = np.random.default_rng([seed, 2]), Layouts.fixed(episodes)
    start, _ = sample_tasks(random, layouts)
    angles = torch.zeros(episodes) if method == "unturned" else TurnedRoomsConfig(angles=0).turns(random, episodes)
    commands = torch.cat([sample_commands(random, episodes, WANDER), torch.zeros(episodes, REST, 2)], 1)
    taken = commands.repeat_interleave(ACTION_STEPS, 1)
    before = travel(start, turned(taken, angles[:, None]), layouts)[:, ::ACTION_STEPS]
    one, other = sample_tasks(random, layouts)
    in_room = ((one[:, 0] > layouts.wall) == (before[:, -1, 0] > layouts.wall))[:, None]
    goals = {"same_room": torch.where(in_room, one, other), "other_room": torch.where(in_room, other, one)}
    walk = sample_commands(random, episodes, STEPS // ACTION_STEPS).repeat_interleave(ACTION_STEPS, 1)
    found: dict[str, Any] = {"episodes": episodes}
    for name, goal in goals.items():
        began = time.process_time()
        controller: Controller
        if world_model is not None:
            controller = learned = LearnedDynamics(
                world_model, goal, layouts, PLANNER, ACTION_STEPS, longest=MAX_STEP, seed=seed, fresh=FRESH
            )
            for action in range(commands.shape[1]):
                learned.follow(before[:, action], commands[:, action, None].expand(-1, ACTION_STEPS, -1))
        elif method == "random":
            controller = _always(walk)
        else:
            controller = TrueDynamics(goal, layouts, seed=seed, angles=angles)
        driven = drive(controller, before[:, -1], goal, layouts, STEPS, RADIUS, MAX_STEP, angles=angles)
        measured = {"success": driven.hit, "held": driven.held}
        found[name] = {key: float(value.double().mean()) for key, value in measured.items()}
        found[name] |= {"median_steps": int(driven.first.median()), "seconds": time.process_time() - began}
    return found


def _always(moves: Tensor) -> Controller:
    return lambda positions: moves


def measure(method: str, seed: int, minutes: float, episodes: int) -> dict[str, Any]:
    world_model, about = learn(method, seed, minutes) if method in BLOCKS else (None, {})
    return {"method": method, "seed": seed, **about, **plan(method, seed, episodes, world_model)}


def report(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and their range."""
    header = ["controller", "seeds", "updates", "error / copying", "after the rest", "same room", "other room"]
    cells = []
    order = sorted(rows, key=lambda row: (METHODS.index(row["method"]), row["method"]))
    for _, group in itertools.groupby(order, lambda row: _named(row)):
        found = sorted(group, key=lambda row: int(row["seed"]))
        learned = "updates" in found[0]
        cells.append(
            [
                _named(found[0]),
                ", ".join(str(row["seed"]) for row in found),
                f"{statistics.mean(row['updates'] for row in found):,.0f}" if learned else "",
                _mean([row["error"] for row in found]) if learned else "",
                _mean([row["after_rest"] for row in found]) if learned else "",
                mean_and_range([row["same_room"]["success"] for row in found]),
                mean_and_range([row["other_room"]["success"] for row in found]),
            ]
        )
    return tables.markdown(header, cells)


def _mean(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{statistics.mean(values):.2f}" + ("" if low == high else f" ({low} to {high})")


def _named(row: dict[str, Any]) -> str:
    return f"{row['method']}, {row['minutes']:g} min" if row["method"] in BLOCKS else row["method"]


def _key(row: dict[str, Any]) -> tuple[int, str]:
    return row["seed"], _named(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods",
        default=METHODS,
        type=lambda text: text.split(","),
        help=f"comma-separated, of {', '.join(METHODS)}",
    )
    parser.add_argument("--seeds", default=[5], type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of CPU time, in which a model learns")
    parser.add_argument("--again", action="store_true", help="measure rows that exist as well")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--report", action="store_true")
    chosen = parser.parse_args()
    if unknown := {*chosen.methods} - {*METHODS}:
        parser.error(f"there is no {sorted(unknown)}")
    saved = KeyedRows(chosen.json, "turned rooms", _key)
    if not chosen.report:
        torch.set_num_threads(1)
        keep_freed_memory()
        for seed, method in itertools.product(chosen.seeds, chosen.methods):
            planned = {"method": method, "seed": seed, "minutes": chosen.minutes}
            if not saved.has(planned) or chosen.again:
                saved.add(measure(method, seed, chosen.minutes, chosen.episodes))
    if rows := saved.rows:
        print(report(rows))


if __name__ == "__main__":
    main()
