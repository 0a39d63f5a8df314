"""``train-world``: trains a world that can be saved, edited and entered again."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

from worldmodel.acting.recording import record
from worldmodel.commands.command_line import parse
from worldmodel.commands.interrupt import Interrupt
from worldmodel.commands.options import blocks_named, environment_arguments
from worldmodel.commands.timed_loop import timed_loop
from worldmodel.environments.returning import table
from worldmodel.learning.settings import default_folder
from worldmodel.learning.threads import threads_restored
from worldmodel.learning.token_evaluation import evaluate_returning
from worldmodel.learning.token_trainer import TokenTrainConfig, TokenTrainer
from worldmodel.learning.world_run import (
    Described,
    WorldRunConfig,
    check_new,
    describe,
    described_run,
    saved_world_config,
    source_of,
    world_arguments,
)
from worldmodel.model.tokens import TokenConfig
from worldmodel.runs.configuration import ConfigurationError, differences, to_json
from worldmodel.runs.fields import Bounds, Positive, Text, Threads
from worldmodel.runs.files import write_text
from worldmodel.runs.run import Run

RECORD_STEPS = 20_000


@dataclasses.dataclass
class TrainWorldOptions:
    """Trains a model of what is seen where, on an environment's views. Ctrl-C saves and stops.

    A map of places by default; --memory chooses others, and --model.place.motion learned finds out how actions move.
    """

    env: Text = "worldmodel/Rooms-v0"
    """Environment with a grid of classes or a picture as observation, and discrete actions."""
    env_args: tuple[Text, ...] = ()
    """Its arguments, NAME=VALUE or JSON. Rooms have bumps=true border=false size=15 where these and --data do not say
    else: an imagined room is one to walk in."""
    data: Path | None = None
    """Recorded episodes (`record`), instead of the environment's."""
    memory: Text = "place"
    """place, memory blocks as for `train`, or both, in order: place,local_attention."""
    record_steps: Annotated[int, Bounds(2, 10**9)] | None = None
    """Steps that are recorded first, in RUN/episodes.npz, where the environment has no batched worlds; 20,000 if not
    given."""
    model: TokenConfig = dataclasses.field(default_factory=TokenConfig)
    """The world model."""
    train: TokenTrainConfig = dataclasses.field(default_factory=TokenTrainConfig)
    """Its training."""
    evaluate_steps: Annotated[int, Bounds(0, 2**24)] = 2048
    """Steps of the evaluation after training, where the environment has batched worlds, by how long cells were out of
    view; 0 leaves it out."""
    log_seconds: Positive = 5
    """Seconds between two lines of metrics."""
    threads: Threads = 1
    """CPU threads."""
    run: Path | None = None
    """Folder of the new run; runs/ENV-DATE if not given."""
    resume: Path | None = None
    """Folder of a run to resume with its own settings; only --train.minutes and --train.updates may change."""


def command(arguments: Sequence[str]) -> int:
    """Trains, and prints the run's folder."""
    options = _options(arguments)
    with threads_restored():
        torch.set_num_threads(options.threads)
        run, number = train_world(options)
    print(run.folder)
    return 128 + number if number else 0


def _options(arguments: Sequence[str]) -> TrainWorldOptions:
    """The environment and the kind of memory set the defaults of the model."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--env", "--memory", "--resume", "--data"):
        early.add_argument(name, nargs="?")
    early.add_argument("--env-args", nargs="*", default=[])
    found, _ = early.parse_known_args(list(arguments))
    default = TrainWorldOptions()
    if found.resume is not None:
        if found.memory is not None:
            raise ConfigurationError("--memory is of a new run, and a resumed one keeps its own: leave it out")
        saved = saved_world_config(Run(found.resume))
        pairs = [f"{name}={json.dumps(value)}" for name, value in saved.env_args.items()]
        default = TrainWorldOptions(saved.env, tuple(pairs), saved.data, model=saved.model, train=saved.train)
    elif not {"-h", "--help"} & set(arguments):
        env = default.env if found.env is None else found.env
        model = describe(env, _arguments(env, found.env_args, found.data)).model
        default.model = with_memory(model, default.memory if found.memory is None else found.memory)
    return parse(TrainWorldOptions, arguments, "train-world", default)


def _arguments(env: str, given: Sequence[str], data: Any) -> dict[str, Any]:
    """Of a new run's environment; recorded episodes are of the environment as it is named."""
    env_args = environment_arguments(given)
    return env_args if data is not None else world_arguments(env, env_args)


def with_memory(model: TokenConfig, memory: str) -> TokenConfig:
    """The model with a memory by name. Raises ConfigurationError for an unknown one.

    Example:
        >>> with_memory(TokenConfig(), "scan,gru").blocks[1].kind
        'gru'
    """
    names = [name.strip() for name in memory.split(",")]
    place = model.place if names[0] == "place" else None
    blocks = tuple(blocks_named(",".join(names[place is not None :]))) if names[place is not None :] else ()
    width = model.width if not blocks else max(model.width, 64)
    return dataclasses.replace(model, place=place, blocks=blocks, width=width)


def train_world(options: TrainWorldOptions) -> tuple[Run, int]:
    """Trains and evaluates; returns the run and the signal that ended it, else 0.

    Raises:
        ConfigurationError: settings that do not fit, or others than the resumed run's.
        RunError: a folder that is not empty, or a run that cannot be resumed.
    """
    if options.resume is None:
        env_args = _arguments(options.env, options.env_args, options.data)
    else:
        env_args = environment_arguments(options.env_args)
    described = describe(options.env, env_args, options.model.patch)
    config = WorldRunConfig(options.env, env_args, options.data, options.model, options.train)
    source = None
    if options.record_steps is not None:
        _check_recording(options, described)
    if options.resume is None:
        check_new(config, described)
        if config.data is not None or described.make is not None:
            source = source_of(config, described)  # what cannot be used leaves no run
        folder = options.run or default_folder(options.env, time.strftime("%Y%m%d-%H%M%S"))
        run = Run.create(folder, described_run(config), numbered=options.run is None)
    elif options.run is not None:
        raise ConfigurationError("--run names a new run and --resume one that exists: give one of them")
    else:
        run = Run.open_to_write(options.resume)
    try:
        if options.resume is None and source is None:
            config.data = run.folder / "episodes.npz"
            steps = options.record_steps or RECORD_STEPS
            print(f"recording {steps:,} steps in {config.data}", file=sys.stderr)
            record(config.env, config.data, steps, seed=config.train.seed, env_args=env_args)
        elif options.resume is not None:
            _check_resumable(saved_world_config(run), config)
        trainer = TokenTrainer(config.model, config.train, source or source_of(config, described))
        parts = ("token_model", "optimizer", "trainer")
        if run.checkpoints:
            with run.refusing(*parts):
                trainer.load_state_dict({part: run.load(part) for part in parts})
        run.configure({**run.config, **described_run(config)})
        with Interrupt() as interrupt:
            timed_loop(trainer, run, interrupt, options.log_seconds)
            if options.evaluate_steps and not interrupt.requested:
                _evaluate(trainer, described, run, options.evaluate_steps)
        return run, interrupt.signal
    finally:
        run.close()


def _check_recording(options: TrainWorldOptions, described: Described) -> None:
    """Raises ConfigurationError where nothing is recorded."""
    for reason, holds in (
        ("a resumed run has its own", options.resume is not None),
        ("--data names some that are there", options.data is not None),
        (f"{options.env} has batched worlds, which are new for each update", described.make is not None),
    ):
        if holds:
            raise ConfigurationError(f"--record-steps records episodes first, and {reason}: leave it out")


def _check_resumable(saved: WorldRunConfig, given: WorldRunConfig) -> None:
    train = dataclasses.replace(saved.train, minutes=given.train.minutes, updates=given.train.updates)
    there = dataclasses.replace(saved, train=train)
    if found := differences(to_json(there), to_json(given)):
        raise ConfigurationError(f"a resumed run keeps its settings, but {found[0]}")


def _evaluate(trainer: TokenTrainer, described: Described, run: Run, steps: int) -> None:
    if described.make is None:
        return
    worlds = described.make(8, described.worlds, torch.Generator().manual_seed(trainer.config.seed + 1))
    found = evaluate_returning(trainer.model, worlds, steps)
    write_text(run.folder / "returning.json", json.dumps({"steps": steps, **found.to_json()}, indent=1))
    print(table({"returning cells, %": found}), file=sys.stderr)
