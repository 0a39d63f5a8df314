"""A run of ``train-world``: its settings, its source of views, and what it trained."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch

from worldmodel.environments.grids import Worlds
from worldmodel.environments.registry import make
from worldmodel.learning.recorded_views import RecordedSource, load_npz, record
from worldmodel.learning.token_trainer import TokenTrainConfig
from worldmodel.learning.view_sources import ViewSource, WorldSource
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.place_map import PlaceConfig
from worldmodel.model.tokens import TokenConfig, TokenWorldModel
from worldmodel.runs.configuration import ConfigurationError, from_json, to_json
from worldmodel.runs.fields import Bounds, Checked, Limit, Text
from worldmodel.runs.run import Run, RunError
from worldmodel.runs.trust import check_installed, installed_alone

PART = "token_model"


@dataclasses.dataclass
class WorldRunConfig(Checked):
    """Settings of a run, in ``config.json`` under "world".

    Attributes:
        env: environment whose views are learned.
        env_args: its arguments.
        data: recorded steps, ``.npz``, instead of the environment's.
        record_steps: steps recorded first in an environment that has no batched worlds.
        model: the world model.
        train: its training.
    """

    env: Text = ""
    env_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: Path | None = None
    record_steps: Limit = 20_000
    model: TokenConfig = dataclasses.field(default_factory=TokenConfig)
    train: TokenTrainConfig = dataclasses.field(default_factory=TokenTrainConfig)


@dataclasses.dataclass(frozen=True)
class Described:
    """An environment as a world model needs it.

    Attributes:
        model: settings that fit it.
        make: its batched worlds, or None.
        worlds: their configuration.
    """

    model: TokenConfig
    make: Any = None
    worlds: Any = None


def describe(env: str, env_args: dict[str, Any], patch: Annotated[int, Bounds(0, 256)] = 0) -> Described:
    """Reads grid, classes and actions from an environment's spaces.

    Args:
        env: its name.
        env_args: its arguments.
        patch: pixels per side of a token, for pictures; by default the environment's own, or 8.

    Raises:
        ConfigurationError: an action space that is not discrete, or observations that are no grid and no picture.
    """
    made = make(env, **env_args)
    try:
        inner: Any = made.unwrapped
        space: Any = made.observation_space
        actions: Any = made.action_space
        if type(actions).__name__ != "Discrete":
            raise ConfigurationError(f"--env {env} has the action space {actions}, expected a discrete one")
        config = getattr(inner, "config", None)
        shape: tuple[int, ...] = space.shape or ()
        grid: tuple[int, int]
        if len(shape) == 3 and shape[2] == 3 and str(space.dtype) == "uint8":
            patch = patch or getattr(config, "pixels", 0) or 8
            if shape[0] % patch or shape[1] % patch:
                raise ConfigurationError(
                    f"--env {env} has pictures of {shape[0]} x {shape[1]} pixels, expected multiples of {patch}"
                )
            grid, classes = (shape[0] // patch, shape[1] // patch), 0
        elif len(shape) == 2 and str(space.dtype).removeprefix("u").startswith("int"):
            grid, classes, patch = (shape[0], shape[1]), int(space.high.max()) + 1, 0
        else:
            raise ConfigurationError(
                f"--env {env} has the observations {space}, expected a grid of classes, (rows, columns), or a picture, "
                "(height, width, 3)"
            )
        batched = isinstance(getattr(inner, "make", None), type) and issubclass(inner.make, Worlds)
        place = PlaceConfig(motion="given" if batched else "learned")
        if batched:
            side = inner.make(1, config, torch.Generator().manual_seed(0)).side
            place = dataclasses.replace(place, period=side, turns=getattr(config, "own_heading", False))
            if velocities := getattr(config, "velocities", ()):
                place = dataclasses.replace(place, velocities=velocities, gated=True)
        width = 16 * max(1, len(place.velocities))
        model = TokenConfig(grid, classes, patch, int(actions.n), width, place=place)
        return Described(model, inner.make if batched else None, config if batched else None)
    finally:
        made.close()


def source_of(config: WorldRunConfig) -> ViewSource:
    """What a run learns from.

    Raises:
        RunError: recorded data that cannot be used.
    """
    generator = torch.Generator().manual_seed(config.train.seed)
    if config.data is not None:
        return RecordedSource(load_npz(config.data), generator, str(config.data))
    described = describe(config.env, config.env_args, config.model.patch)
    if described.make is not None:
        return WorldSource(described.make, described.worlds, generator)
    made = make(config.env, **config.env_args)
    try:
        return RecordedSource(record(made, config.record_steps, config.train.seed), generator)
    finally:
        made.close()


def saved_world_config(run: Run) -> WorldRunConfig:
    """Raises RunError for another kind of run, ConfigurationError for damaged settings."""
    if not isinstance(run.config.get("world"), dict):
        raise RunError(f"{run.folder} is no run of train-world, which makes worlds: its settings have no part 'world'")
    return from_json(WorldRunConfig, run.config["world"], "world")


def load_world_model(run: Run, period: int | None = None, *, trust: bool = False) -> TokenWorldModel:
    """The newest checkpoint's model, on a lattice of ``period`` instead of its own.

    Args:
        run: of ``train-world``.
        period: places per side.
        trust: import memory blocks that the run names also if their modules are not installed.

    Raises:
        RunError: another kind of run, no checkpoint, a damaged one, or a block that is not installed, without
            ``trust``.
    """
    config = saved_world_config(run).model
    if not trust:
        check_installed(run.folder, [block.block for block in config.blocks if isinstance(block, CustomBlock)])
    if period is not None and config.place is not None:
        config = dataclasses.replace(config, place=dataclasses.replace(config.place, period=period))
    with installed_alone(run.folder, trust):
        model = TokenWorldModel(config)
    run.load_weights(model, part=PART)
    return model.eval()


def described_run(config: WorldRunConfig) -> dict[str, Any]:
    """``config.json`` of a new run."""
    return {"world": to_json(config)}
