"""What is trained, for how long, and on which worlds it is tested.

The memories that are not told where things are have equal sizes: each the largest width with at most ``BUDGET``
parameters. Learning rates and batch sizes are the best in ``results/world_rooms_tuning.json``, which ``--tune`` writes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from worldmodel.environments.drift import DriftConfig, DriftWorlds
from worldmodel.environments.rooms import RoomsConfig, RoomWorlds
from worldmodel.learning.token_trainer import TokenTrainConfig
from worldmodel.model.blocks import (
    BlockConfig,
    BlockScanBlock,
    DeltaBlock,
    GatedConvBlock,
    GRUBlock,
    LocalAttentionBlock,
    MemoryAttentionBlock,
    RotaryScanBlock,
    ScanBlock,
)
from worldmodel.model.place_map import PlaceConfig
from worldmodel.model.tokens import TokenConfig, TokenWorldModel

BUDGET = 200_000  # parameters
RATES = (2e-3, 4e-3)  # tried first
WORLDS = {"rooms": (RoomWorlds, RoomsConfig), "drift": (DriftWorlds, DriftConfig)}
MLP = GatedConvBlock(d_conv=1)


@dataclasses.dataclass(frozen=True)
class Test:
    """New worlds, with other options than those of training.

    Attributes:
        name: in tables.
        steps: of each world.
        batch: worlds.
        options: of the worlds.
        place: of the place memory's settings; the period follows the worlds.
        frames: that local attention sees, if not as many as in training.
        chunk: steps at a time, which bounds memory.
    """

    name: str
    steps: int
    batch: int = 8
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    place: dict[str, Any] = dataclasses.field(default_factory=dict)
    frames: int | None = None
    chunk: int = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """A memory and what it is trained and tested on.

    Attributes:
        model: settings.
        minutes: of training, CPU minutes of one core, each a run.
        tests: after training.
        env: a key of ``WORLDS``.
        worlds: options of the worlds of training.
        train: settings other than the default.
        imagines: whether it makes worlds of its own, which are measured too.
        tuned: batch sizes to try, each with its own learning rate; none: neither is tuned.
    """

    model: TokenConfig
    minutes: tuple[float, ...]
    tests: tuple[Test, ...]
    env: str = "rooms"
    worlds: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    imagines: bool = False
    tuned: tuple[int, ...] = ()

    def config(self, minutes: float, seed: int) -> TokenTrainConfig:
        return TokenTrainConfig(**{"minutes": minutes, "clock": "cpu", "seed": seed, **self.train})


def place(**settings: Any) -> TokenConfig:
    """On a room of 11 cells in a border of 2."""
    return TokenConfig(place=PlaceConfig(**{"period": 15, **settings}))


def within_budget(build: Callable[[int], TokenConfig], widths: range) -> TokenConfig:
    """The largest model of at most ``BUDGET`` parameters."""
    fitting = [config for config in map(build, widths) if parameters(config) <= BUDGET]
    return fitting[-1]


def parameters(config: TokenConfig) -> int:
    with torch.device("meta" if config.place is None else "cpu"):
        return sum(parameter.numel() for parameter in TokenWorldModel(config).parameters())


def pooled(*blocks: BlockConfig) -> TokenConfig:
    """One vector per view; each block is followed by a gated MLP."""
    layers = tuple(layer for block in blocks for layer in (block, MLP))
    return within_budget(lambda width: TokenConfig(place=None, blocks=layers, pooled=width), range(16, 257, 8))


def per_token(*blocks: BlockConfig) -> TokenConfig:
    return within_budget(lambda width: TokenConfig(place=None, blocks=blocks, width=width), range(16, 129, 8))


# The published recipe (Long-Context State-Space Video World Models, Po et al. 2025), without its diffusion.
SCAN_AND_ATTENTION = (
    BlockScanBlock(block=(1, 1), d_conv=1),
    LocalAttentionBlock(frames=2),
    MLP,
    BlockScanBlock(block=(5, 5), d_conv=1),
    LocalAttentionBlock(frames=2),
    MLP,
)
LONG = Test("10,240 steps", 10_240)
CURVE = (LONG,)
BUMPS = {"bumps": True}
# Batches are small, for more updates in the same minutes, and the rate falls all the time, so that the best of a short
# run is near that of a long one.
GENERIC: dict[str, Any] = {"train": {"in_view_weight": 0.3, "warmup": 10, "cooldown": 1.0}, "tuned": (4,)}
SLOW: dict[str, Any] = {**GENERIC, "tuned": (1,)}  # an update of one sequence is slow enough


ROWS: dict[str, Row] = {
    "place, motion given": Row(
        place(),
        (0.5,),
        (
            LONG,
            Test("131,072 steps", 131_072, 2, chunk=4096),
            Test("1,048,576 steps", 2**20, 1, chunk=8192),
            Test("room of 21", 10_240, 4, {"size": 21}),
            Test("own heading", 10_240, 4, {"own_heading": True}, {"turns": True}),
            Test("two agents", 5_120, 4, {"agents": 2}),
        ),
    ),
    "place, motion given, edits": Row(
        place(), (0.5,), (Test("10,240 steps, edits", 10_240, options={"edits": 0.004}),), worlds={"edits": 0.02}
    ),
    "place, moves learned": Row(
        place(motion="learned"),
        (0.5,),
        (
            Test("10,240 steps, bumps", 10_240, options=BUMPS),
            Test("131,072 steps, bumps", 131_072, 2, BUMPS, chunk=4096),
        ),
        worlds=BUMPS,
        imagines=True,
    ),
    "place, heading and moves learned": Row(
        place(motion="learned", turns=True),
        (2,),
        (Test("10,240 steps, turns and bumps", 10_240, options={"own_heading": True, **BUMPS}),),
        worlds={"own_heading": True, **BUMPS},
    ),
    "place, pixels, moves learned": Row(
        dataclasses.replace(place(motion="learned"), classes=64, patch=4),
        (2,),
        (
            Test("2,048 steps, pixels", 2_048, options={"pixels": 4, "noise": 0.03, **BUMPS}),
            Test("10,240 steps, pixels", 10_240, options={"pixels": 4, "noise": 0.03, **BUMPS}, chunk=64),
        ),
        worlds={"pixels": 4, "noise": 0.03, **BUMPS},
    ),
    "place, pixels as numbers": Row(
        dataclasses.replace(place(motion="learned"), classes=0, patch=4),
        (2,),
        (Test("2,048 steps, pixels", 2_048, options={"pixels": 4, "noise": 0.03, **BUMPS}, chunk=64),),
        worlds={"pixels": 4, "noise": 0.03, **BUMPS},
        train={"batch_size": 16},
    ),
    "place, adds instead of replacing": Row(
        place(write="sum"),
        (0.5,),
        (LONG, Test("10,240 steps, edits", 10_240, options={"edits": 0.004})),
        worlds={"edits": 0.02},
    ),
    "place, drift": Row(
        TokenConfig(
            classes=5,
            width=64,
            place=PlaceConfig(12, velocities=((0, 0), (0, 1), (1, 0), (-1, 1)), gated=True),
        ),
        (1,),
        (Test("10,240 steps, drift", 10_240, chunk=128),),
        env="drift",
        train={"steps": 64, "lr": 1e-2},
    ),
    "place, nothing drifts in it": Row(
        TokenConfig(classes=5, width=64, place=PlaceConfig(12)),
        (1,),
        (Test("10,240 steps, drift", 10_240, chunk=128),),
        env="drift",
        train={"steps": 64, "lr": 1e-2},
    ),
    "block scan and local attention": Row(per_token(*SCAN_AND_ATTENTION), (30,), CURVE, **SLOW),
    "scan": Row(pooled(ScanBlock(), ScanBlock()), (10,), CURVE, **GENERIC),
    "rotary scan": Row(pooled(RotaryScanBlock(), RotaryScanBlock()), (10,), CURVE, **GENERIC),
    "delta": Row(pooled(DeltaBlock(), DeltaBlock()), (10,), CURVE, **GENERIC),
    "GRU": Row(pooled(GRUBlock(), GRUBlock()), (10,), CURVE, **GENERIC),
    "memory tokens": Row(pooled(MemoryAttentionBlock(block=8), MemoryAttentionBlock(block=8)), (10,), CURVE, **GENERIC),
    "attention, 16 views": Row(
        pooled(LocalAttentionBlock(frames=16), LocalAttentionBlock(frames=16)), (10,), CURVE, **GENERIC
    ),
    "attention, all views": Row(
        pooled(LocalAttentionBlock(frames=128), LocalAttentionBlock(frames=128)),
        (10,),
        (Test("2,048 steps", 2_048, frames=2_048),),
        **GENERIC,
    ),
}
