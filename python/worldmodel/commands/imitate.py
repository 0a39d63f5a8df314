"""``imitate``: a policy from recorded demonstrations."""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from worldmodel.commands.command_line import parse
from worldmodel.commands.interrupt import Interrupt
from worldmodel.commands.options import blocks_named
from worldmodel.commands.timed_loop import timed_loop
from worldmodel.data.datasets import Episodes, RecordedSource
from worldmodel.data.selection import open_episodes
from worldmodel.learning.imitation_run import (
    HELD_OUT,
    PART,
    HeldOutActions,
    ImitationRunConfig,
    check_learnable,
    custom_blocks,
    described_run,
    imitation_sources,
    recorded_environment,
    saved_imitation_config,
    task_names,
)
from worldmodel.learning.imitation_trainer import ImitationTrainConfig, ImitationTrainer
from worldmodel.learning.interval import Interval
from worldmodel.learning.settings import changed_spaces, default_folder
from worldmodel.learning.threads import threads_restored
from worldmodel.model.mixture_density import MeanConfig, MixtureDensityConfig
from worldmodel.runs.configuration import ConfigurationError, differences, to_json
from worldmodel.runs.fields import Positive, Share, Text, Threads
from worldmodel.runs.optional_dependencies import require
from worldmodel.runs.run import Run, RunError
from worldmodel.runs.trust import check_installed, installed_alone

_FREE = ("minutes", "clock", "updates")  # may change on resume
_SHARE, _ALLOWANCE = 0.05, 5.0  # of training time that held-out episodes take, and seconds beyond it
_HEADS = {"mixture": MixtureDensityConfig, "mean": MeanConfig}
_TRAIN = [field.name for field in dataclasses.fields(ImitationTrainConfig)]


@dataclasses.dataclass(frozen=True)
class ImitateOptions(ImitationTrainConfig):
    """Learns a policy from recorded demonstrations, by imitation. Ctrl-C saves and stops.

    Reads what `record` writes, and HDF5, Minari and LeRobot as `train --data` does: any observation, with actions of a
    Box. A part named task, one index, is the task; without it, all is one task. RUN/best keeps the weights of the least
    loss on held-out episodes.
    """

    data: Path | None = None
    """Recorded episodes: an .npz that `record` wrote, a folder of them, HDF5 of flat columns, or the folder of a Minari
    or LeRobot data set."""
    data_columns: tuple[Text, ...] = ()
    """Columns of HDF5, or features of LeRobot, that are observed."""
    tasks: tuple[Text, ...] = ()
    """Tasks that are learned, by index or, where the recorded environment names them, by name; all if not given."""
    held_out: Share = 0.1
    """Share of the episodes that is not learned from; the loss of their actions is the metric held_out/action."""
    held_out_minutes: Positive = 0.5
    """Minutes between two such losses; more where that would take over 5% of the time."""
    memory: Text | None = None
    """Memory blocks in order, separated by commas, as for `train`: lstm*3 or scan*3, for instance."""
    head: Literal["mixture", "mean"] = "mixture"
    """Density of actions: an autoregressive mixture of normals, or the mean by squared error."""
    log_seconds: Positive = 5
    """Seconds between two lines of metrics."""
    save_minutes: Positive = 2
    """Minutes between checkpoints."""
    threads: Threads = 1
    """CPU threads."""
    run: Path | None = None
    """Folder of the new run; runs/ENV-DATE if not given."""
    resume: Path | None = None
    """Folder of a run to resume with its own settings; only --minutes, --clock, --updates and intervals may change."""
    trust: bool = False
    """With --resume: import memory blocks that the run names even if they are not installed. This executes them."""


def command(arguments: Sequence[str]) -> int:
    """Trains, and prints the run's folder."""
    with threads_restored():
        options, files = _options(arguments)
        torch.set_num_threads(options.threads)
        run, number = imitate(options, files)
    print(run.folder)
    return 128 + number if number else 0


def _options(arguments: Sequence[str]) -> tuple[ImitateOptions, list[Episodes]]:
    """The options, whose defaults follow from the resumed run, or from the data and the kinds that are named."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--memory", "--head", "--resume"):
        early.add_argument(name, nargs="?")
    early.add_argument("--data-columns", nargs="*", default=[])
    found, _ = early.parse_known_args(list(arguments))
    if {"-h", "--help"} & set(arguments):
        return parse(ImitateOptions, arguments, "imitate", ImitateOptions()), []
    if found.resume is not None:
        for name in ("memory", "head"):
            if getattr(found, name) is not None:
                raise ConfigurationError(f"--{name} is of a new run, and a resumed one keeps its own: leave it out")
        saved = saved_imitation_config(Run(found.resume))
        own = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
        own |= {"tasks": tuple(str(task) for task in saved.tasks)}
        kept = {name: own[name] for name in ("data", "data_columns", "tasks", "held_out")}
        default = ImitateOptions(**{name: getattr(saved.train, name) for name in _TRAIN}, **kept)
        options = parse(ImitateOptions, arguments, "imitate", default)
        assert options.data is not None
        return options, open_episodes(options.data, options.data_columns)
    if found.data is None:
        parse(ImitateOptions, arguments, "imitate", ImitateOptions())  # what else is wrong is told first
        raise ConfigurationError("--data is missing: recorded episodes, such as an .npz that `record` wrote")
    files = open_episodes(Path(found.data), found.data_columns)
    check_learnable(files)
    policy = ImitateOptions().policy
    if found.memory is not None:
        try:
            blocks = tuple(blocks_named(found.memory))
            policy = dataclasses.replace(policy, memory=dataclasses.replace(policy.memory, blocks=blocks))
        except ConfigurationError:
            raise
        except ValueError as error:
            raise ConfigurationError(f"--memory is {found.memory!r}: {error}") from error
    if found.head in _HEADS:
        policy = dataclasses.replace(policy, head=_HEADS[found.head]())
    sees = any(modality.kind == "image" for modality in files[0].observation_spec.modalities.values())
    default = ImitateOptions(policy=policy) if sees else ImitateOptions(policy=policy, reconstruction="none")
    return parse(ImitateOptions, arguments, "imitate", default), files


def imitate(options: ImitateOptions, files: Sequence[Episodes]) -> tuple[Run, int]:
    """Trains; returns the run and the signal that ended it, else 0.

    Args:
        options: of the command.
        files: of ``options.data``.

    Raises:
        ConfigurationError: settings that do not fit, or others than the resumed run's.
        RunError: data that cannot be learned from, a folder that is not empty, or a run that cannot be resumed.
        TrainingFailed: a loss or gradient that is not finite.
    """
    require("safetensors.torch", "write checkpoints")
    config = _config(options, files)
    if options.resume is not None:
        _check_resumable(saved_imitation_config(Run(options.resume)), config)
        if options.run is not None:
            raise ConfigurationError("--run names a new run and --resume one that exists: give one of them")
        if not options.trust:
            check_installed(options.resume, custom_blocks(config))
    elif options.trust:
        raise ConfigurationError("--trust is of the run that --resume names: leave it out")
    source, others = imitation_sources(config, files)
    with installed_alone(options.resume, options.trust) if options.resume else contextlib.nullcontext():
        trainer = ImitationTrainer(config.train, source)
    described = described_run(config, source)
    if options.resume is not None:
        run = Run.open_to_write(options.resume)
    else:
        folder = options.run or default_folder(config.env or config.data.stem, time.strftime("%Y%m%d-%H%M%S"))
        run = Run.create(folder, described, numbered=options.run is None)
    try:
        if options.resume is not None:
            _load(trainer, run, source)
            run.configure({**run.config, **described})
        _say(config, source, others, trainer, run)
        with Interrupt() as interrupt:
            held_out = None if others is None else _HeldOut(trainer, run, others, interrupt, options.held_out_minutes)
            how: dict[str, Any] = {"named": _named, "shown": ("loss/action", HELD_OUT)}
            how |= {} if held_out is None else {"measure": held_out}
            timed_loop(trainer, run, interrupt, options.log_seconds, 60 * options.save_minutes, **how)
        named = shlex.quote(str(run.folder))
        said = f"interrupted and saved; go on with: python -m worldmodel imitate --resume {named}"
        if not interrupt.requested:
            said = f"next: python -m worldmodel evaluate {named}{'' if config.env else ' --env ENV'}"
        print(said, file=sys.stderr)
        return run, interrupt.signal
    finally:
        run.close()


def _config(options: ImitateOptions, files: Sequence[Episodes]) -> ImitationRunConfig:
    assert options.data is not None
    env, env_args = recorded_environment(files)
    train = ImitationTrainConfig(**{name: getattr(options, name) for name in _TRAIN})
    tasks = _tasks(options.tasks, env, env_args, options.data)
    return ImitationRunConfig(options.data, options.data_columns, tasks, options.held_out, env, env_args, train)


def _tasks(given: Sequence[str], env: str, env_args: dict[str, object], data: Path) -> tuple[int, ...]:
    """Indices of the tasks."""
    if all(text.isdecimal() for text in given):
        return tuple(int(text) for text in given)
    if env:
        check_installed(data.parent, [env])
    names = task_names(env, env_args) if env else ()
    for text in given:
        if text not in names and not text.isdecimal():
            known = f"one of {', '.join(names)}, or an index" if names else "an index: the recorded tasks have no names"
            raise ConfigurationError(f"--tasks has {text!r}, expected {known}")
    return tuple(names.index(text) if text in names else int(text) for text in given)


def _check_resumable(saved: ImitationRunConfig, given: ImitationRunConfig) -> None:
    free = {name: getattr(given.train, name) for name in _FREE}
    there = dataclasses.replace(saved, train=dataclasses.replace(saved.train, **free))
    if found := differences(to_json(there), to_json(given)):
        raise ConfigurationError(f"a resumed run keeps its settings and data, but {found[0]}")


def _load(trainer: ImitationTrainer, run: Run, source: RecordedSource) -> None:
    if changed := changed_spaces(run, source.observation_spec, source.action_spec):
        raise RunError(f"{source.file.path} is not what it was when {run.folder} began: {changed[0]}")
    if run.checkpoints:
        parts = tuple(trainer.state_dict())
        with run.refusing(*parts):
            trainer.load_state_dict({part: run.load(part) for part in parts})
    run.forget_metrics_after(trainer.updates)


def _say(
    config: ImitationRunConfig,
    source: RecordedSource,
    others: RecordedSource | None,
    trainer: ImitationTrainer,
    run: Run,
) -> None:
    begun = f", going on after {trainer.updates:,} updates" if trainer.updates else ""
    held_out = 0 if others is None else others.file.episodes
    lines = [
        f"{config.env or config.data}, run folder {run.folder}{begun}",
        f"{source.transitions:,} actions of {source.file.episodes:,} episodes, {held_out:,} more episodes held out",
        *source.observation_spec.description(False),
    ]
    if trainer.finished:
        lines.append("nothing is left to do: give more --minutes or --updates")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _named(metric: str) -> str:
    """A metric of ``ImitationTrainer`` in the log.

    Example:
        >>> _named("action"), _named("policy_grad_norm")
        ('loss/action', 'gradient/policy')
    """
    return f"gradient/{metric.removesuffix('_grad_norm')}" if metric.endswith("_grad_norm") else f"loss/{metric}"


class _HeldOut:
    """Measures the loss on held-out episodes, now and then and at the end; the run keeps the weights of the least."""

    def __init__(
        self, trainer: ImitationTrainer, run: Run, source: RecordedSource, interrupt: Interrupt, minutes: float
    ) -> None:
        self._trainer, self._run, self._interrupt = trainer, run, interrupt
        self._loss = HeldOutActions(source)
        self._interval = Interval(minutes, trainer.seconds, _SHARE, _ALLOWANCE, trainer.config.clock)
        best = run.best_evaluation
        self._least = np.inf if best is None else float(best[HELD_OUT])

    def __call__(self) -> dict[str, float]:
        trainer = self._trainer
        ends = trainer.finished and not self._interrupt.requested
        if not (ends or self._interval.is_time(trainer.seconds)):
            return {}
        began = self._interval.now()
        loss = self._loss(trainer.policy)
        self._interval.took(self._interval.now() - began, trainer.seconds)
        if loss < self._least:
            self._least = loss
            counts = {"steps": trainer.updates, "updates": trainer.updates, "seconds": round(trainer.seconds, 3)}
            self._run.save_best({PART: trainer.policy.state_dict()}, {**counts, HELD_OUT: loss})
        return {HELD_OUT: loss}
