"""A run of ``train-world``: its settings, its source of views, and what it trained."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldmodel.data.datasets import EpisodeFile
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.grid_env import GridEnv
from worldmodel.environments.grids import MOVES
from worldmodel.environments.registry import make
from worldmodel.learning.token_trainer import TokenTrainConfig
from worldmodel.learning.view_sources import EpisodeSource, ViewSource, WorldSource
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.place_map import PlaceConfig
from worldmodel.model.tokens import STARTS, TokenConfig, TokenWorldModel
from worldmodel.runs.configuration import ConfigurationError, from_json, to_json
from worldmodel.runs.fields import Checked, Text
from worldmodel.runs.run import Run, RunError
from worldmodel.runs.trust import check_installed, installed_alone

PART = "token_model"
MOST_SIZE = 512  # places per side of a world: memory and time of a step grow with its square
CODES = 64  # kinds of patches by default


@dataclasses.dataclass
class WorldRunConfig(Checked):
    """Settings of a run, in ``config.json`` under "world".

    Attributes:
        env: environment whose views are learned.
        env_args: its arguments.
        data: recorded episodes, instead of the environment's batched worlds.
        model: the world model.
        train: its training.
    """

    env: Text = ""
    env_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: Path | None = None
    model: TokenConfig = dataclasses.field(default_factory=TokenConfig)
    train: TokenTrainConfig = dataclasses.field(default_factory=TokenTrainConfig)


@dataclasses.dataclass(frozen=True)
class Described:
    """What a world model learns from.

    Attributes:
        model: settings that fit it.
        make: the environment's batched worlds, or None.
        worlds: their configuration.
    """

    model: TokenConfig
    make: Any = None
    worlds: Any = None


def model_for(observation_spec: ObservationSpec, action_spec: ActionSpec, patch: int = 0) -> TokenConfig:
    """A model of views like these, which learns how actions move.

    Args:
        observation_spec: one grid of classes, or one picture.
        action_spec: one discrete action.
        patch: pixels per side of a token, for pictures; 8 if 0.

    Raises:
        ConfigurationError: other observations or actions.
    """
    if action_spec.kind != "discrete" or action_spec.shape:
        raise ConfigurationError(f"actions are {action_spec.kind} {action_spec.shape}, expected one index")
    actions = action_spec.sizes[0]
    modalities = list(observation_spec.modalities.values())
    modality = modalities[0]
    rows, columns, channels = modality.shape if len(modality.shape) == 3 else (0, 0, 0)
    place = PlaceConfig(motion="learned")
    if len(modalities) == 1 and modality.kind == "grid" and channels == 1:
        return TokenConfig((rows, columns), modality.sizes[0], 0, actions, place=place)
    if len(modalities) == 1 and modality.kind == "image" and channels == 3:
        patch = patch or 8
        if rows % patch or columns % patch:
            raise ConfigurationError(
                f"pictures are {rows} x {columns} pixels, expected multiples of the patch, {patch}"
            )
        return TokenConfig((rows // patch, columns // patch), CODES, patch, actions, place=place)
    found = "; ".join(observation_spec.description(False))
    raise ConfigurationError(f"observations are {found}, expected one grid of classes or one picture")


def describe(env: str, env_args: dict[str, Any], patch: int = 0) -> Described:
    """Reads grid, classes and actions from an environment's spaces; ``patch`` as in ``model_for``.

    Raises:
        ConfigurationError: as ``model_for``.
    """
    made = make(env, **env_args)
    try:
        inner: Any = made.unwrapped
        action_spec = ActionSpec.from_space(made.action_space)
        pictures = isinstance(inner, GridEnv) and inner.config.pixels  # even small ones
        kinds = {"observation": "image"} if pictures else None
        observation_spec = ObservationSpec.from_space(made.observation_space, kinds, None, action_spec)
    finally:
        made.close()
    if not isinstance(inner, GridEnv):
        return Described(model_for(observation_spec, action_spec, patch))
    model = model_for(observation_spec, action_spec, patch or inner.config.pixels)
    side = inner.make(1, inner.config, torch.Generator().manual_seed(0)).side
    velocities = getattr(inner.config, "velocities", ())
    turns = getattr(inner.config, "own_heading", False)
    place = PlaceConfig(side, "learned", turns=turns)
    if velocities:  # views of what moves do not tell how the agent does
        moves = tuple((int(row), int(column)) for row, column in MOVES[: inner.config.actions])
        place = PlaceConfig(side, "given", moves, velocities=velocities, gated=True)
    model = dataclasses.replace(model, place=place, width=16 * max(1, len(velocities)))
    return Described(model, inner.make, inner.config)


def world_arguments(env: str, env_args: dict[str, Any]) -> dict[str, Any]:
    """An environment's arguments, and where they do not say, those of the worlds that are learned from."""
    made = make(env, **env_args)
    made.close()
    inner: Any = made.unwrapped
    return {**inner.learned_from, **env_args} if isinstance(inner, GridEnv) else env_args


def check_new(config: WorldRunConfig, described: Described) -> None:
    """Compares a new run's model with its environment.

    Raises:
        ConfigurationError: other views or actions, or more places than a world can have.
    """
    model, found = config.model, described.model
    for name in _compared(found):
        if getattr(model, name) != getattr(found, name):
            raise ConfigurationError(
                f"--model.{name} is {getattr(model, name)}, expected {getattr(found, name)}, as {config.env} has"
            )
    if model.place is not None and model.place.period > MOST_SIZE:
        raise ConfigurationError(
            f"--model.place.period is {model.place.period}, expected at most {MOST_SIZE}, as no world is larger: "
            "choose a smaller environment"
        )


def _compared(found: TokenConfig) -> tuple[str, ...]:
    """Settings that views and actions determine; kinds of patches are the user's choice."""
    return ("grid", "patch", "actions") if found.patch else ("grid", "classes", "patch", "actions")


def source_of(config: WorldRunConfig, described: Described) -> ViewSource:
    """What a run learns from: its recorded episodes if it has any, else the environment's batched worlds.

    Raises:
        RunError: recorded episodes that cannot be used.
    """
    train = config.train
    if config.data is not None:
        file = EpisodeFile(config.data)
        found = model_for(file.observation_spec, file.action_spec, config.model.patch)
        for name in _compared(found):
            if getattr(found, name) != getattr(config.model, name):
                raise RunError(
                    f"{config.data} has {name} {getattr(found, name)}, expected {getattr(config.model, name)}, as --env"
                )
        if (
            config.model.place is not None
            and config.model.place.motion == "given"
            and "displacement" not in file.arrays
        ):
            raise RunError(f"{config.data} has no displacement: --model.place.motion learned finds it out")
        moved = file.arrays.get("displacement")
        if moved is not None and moved.shape[1:] != (2,):
            raise RunError(f"{config.data} has displacement {moved.shape}, expected (steps, 2), rows and columns")
        return EpisodeSource(file, train.batch_size, train.steps, train.seed)
    return WorldSource(described.make, described.worlds, torch.Generator().manual_seed(train.seed))


def saved_world_config(run: Run) -> WorldRunConfig:
    """Raises RunError for another kind of run, ConfigurationError for damaged settings."""
    if not isinstance(run.config.get("world"), dict):
        raise RunError(f"{run.folder} is a run of {run.command}, expected one of train-world, which makes worlds")
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
    with run.refusing(PART):
        check_sizes(config, run.load_tensors(PART))
    with installed_alone(run.folder, trust):
        model = TokenWorldModel(config)
    run.load_weights(model, part=PART)
    return model.eval()


def check_sizes(config: TokenConfig, weights: Mapping[str, Tensor]) -> None:
    """Compares sizes in settings with those of the weights, before anything is allocated by them.

    Raises:
        ValueError: others.
    """
    if config.place is not None and config.place.period > MOST_SIZE:
        raise ValueError(f"place.period is {config.place.period}, expected at most {MOST_SIZE}")
    classes, width, pixels = config.classes, config.width, 3 * config.patch**2
    shapes = {
        "head.0.weight": (config.hidden, width),
        "starts": (STARTS, config.places) if classes else (STARTS, config.places, pixels),
    }
    if classes:
        shapes["codec.embedding.weight"] = (classes, width)
    if classes and pixels:
        shapes["codec.codebook"] = (classes, pixels)
    for name, expected in shapes.items():
        found = tuple(weights[name].shape)
        if found != expected:
            raise ValueError(f"{name} has shape {found}, expected {expected}")


def described_run(config: WorldRunConfig) -> dict[str, Any]:
    """``config.json`` of a new run."""
    return {"world": to_json(config)}
