"""``train``: starts or resumes a run."""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.acting.evaluator import PolicyEvaluator, metrics_of
from worldmodel.commands.display import Display
from worldmodel.commands.interrupt import Interrupt
from worldmodel.commands.options import train_options
from worldmodel.data.replay import Replay
from worldmodel.data.source import Source
from worldmodel.environments.batched import GymnasiumVectorEnvironment
from worldmodel.environments.given import is_given, way_on
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.learning.callback import OpenLoopCallback
from worldmodel.learning.held_out import HeldOutEvaluator, recorded_sources
from worldmodel.learning.interval import CLOCKS
from worldmodel.learning.latent_objective import collapse_notice
from worldmodel.learning.presets import preset_notice
from worldmodel.learning.room import room_notice
from worldmodel.learning.settings import (
    TrainConfig,
    acting_part,
    check_fits,
    check_resumable,
    default_folder,
    modules_of,
)
from worldmodel.learning.threads import threads_restored
from worldmodel.learning.trainer import Evaluator, SourceTrainer, Trainer, TrainingFailed
from worldmodel.model.deciders import policy_sample
from worldmodel.model.networks import ScalarHead
from worldmodel.runs.configuration import ConfigurationError, to_json
from worldmodel.runs.optional_dependencies import MissingPackage, require
from worldmodel.runs.run import Run, RunError
from worldmodel.runs.trust import installed_alone, is_installed


def command(arguments: Sequence[str]) -> int:
    """Trains, and prints the run's folder."""
    config, folder, how = train_options(arguments)
    begun, trust = folder if how.get("resume") else how.get("init_from"), how.pop("trust")
    with installed_alone(begun, trust) if begun is not None else contextlib.nullcontext():
        run, number = (_train if config.data is None else _train_from_data)(config, folder, **how)
    print(run.folder)
    return 128 + number if number else 0


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    new_episodes: bool = False,
    unpickle: bool = False,
    init_from: Path | str | None = None,
    quiet: bool = False,
    env: Any = None,
) -> Run:
    """Trains until a limit of ``config``, Ctrl-C, SIGTERM or SIGHUP, then saves.

    ``resume``, ``new_episodes``, ``unpickle`` and ``init_from`` are as in ``TrainOptions``; ``unpickle`` executes a
    pickle's content. The modules that ``config`` names are imported, so a ``saved_config`` is for runs of someone you
    trust, or after ``trust.check_installed``.

    ``env`` replaces that of ``config``: a resumed run whose environment is an object that no name stands for needs it
    again.

    Raises:
        MissingPackage: safetensors is not installed.
        ConfigurationError: invalid settings, or others than the resumed run's.
        RunError: a folder that is not empty, a run that another process writes or that cannot continue, or no room for
            the last checkpoint.
        UnknownEnvironment: no such environment.
        EnvironmentFailed: an environment raised an error, or returned NaN.
        TrainingFailed: a loss or gradient is not finite.
    """
    if env is not None:
        config = dataclasses.replace(config, env=env)
    return _train(
        config, folder, resume=resume, new_episodes=new_episodes, unpickle=unpickle, init_from=init_from, quiet=quiet
    )[0]


@threads_restored()
def _train(
    config: TrainConfig,
    folder: Path | None,
    *,
    resume: bool = False,
    new_episodes: bool = False,
    unpickle: bool = False,
    init_from: Path | str | None = None,
    quiet: bool = False,
) -> tuple[Run, int]:
    """``train``; returns the signal that ended it as well, else 0."""
    require("safetensors.torch", "write checkpoints")
    with contextlib.ExitStack() as ending:
        if resume:
            assert folder is not None
            run = Run.open_to_write(folder)
            ending.callback(run.close)
            check_resumable(run, config)
        trainer = Trainer(config, policy_sample, OpenLoopEvaluator(), run if resume else None)
        ending.callback(trainer.episodes.close)
        evaluator = policy_evaluator(trainer)
        started = _warm_start(trainer, init_from, resume)
        bounded = [] if resume else trainer.bound_memory()
        if not resume:
            trainer.choose_threads()
        room = _room(trainer, None if resume else folder or Path("runs"))
        episodes = trainer.episodes
        spaces = {"observation": episodes.observation_spec.to_json(), "action": episodes.action_spec.to_json()}
        described = {"train": to_json(trainer.config), "spaces": to_json(spaces)}
        if not resume:
            run = _new_run(config, folder, {**described, "init_from": started})
            ending.callback(run.close)
        specs = episodes.observation_spec, episodes.action_spec
        notices = [*episodes.observation_spec.description(not resume), *started, *bounded]
        notices += [] if resume else [preset_notice(config.preset, config.env, *specs)]
        if is_given(config.env):
            notices.append(
                f"{config.env} is a Python object, which this run cannot name: no command resumes or evaluates it, but "
                f"from Python {way_on(run.folder)} and evaluate(agent, env) do"
            )
        notices += _resume(trainer, run, new_episodes, unpickle) if resume else []
        if isinstance(episodes, GymnasiumVectorEnvironment) and not episodes.pickle:
            notices.append(
                f"{episodes.name} is a vector environment of its own: if this run is interrupted, it goes on with "
                "other episodes alone (--new-episodes); --environment-state pickle keeps them"
            )
        notices += room
        if resume:
            run.configure({**run.config, **described})
        return run, _run(trainer, run, notices, quiet, evaluator)


def _new_run(config: TrainConfig, folder: Path | None, described: Mapping[str, Any]) -> Run:
    """Without ``folder`` one of its own: no other run has it, whenever that began."""
    named = folder or default_folder(_subject(config), time.strftime("%Y%m%d-%H%M%S"))
    return Run.create(named, described, numbered=folder is None)


def _room(trainer: SourceTrainer, folder: Path | None) -> list[str]:
    """What is said about memory and disk; nothing of a source that is no replay."""
    replay = trainer.source
    return [room_notice(trainer.config, trainer.world_model, replay, folder)] if isinstance(replay, Replay) else []


def _warm_start(trainer: SourceTrainer, init_from: Path | str | None, resume: bool) -> list[str]:
    """What was said about the weights; one line at most."""
    if init_from is None:
        return []
    if resume:
        raise ConfigurationError("init_from gives a new run its weights, and resume goes on with a run: give one")
    return [trainer.warm_start(Run(init_from))]


def _train_from_data(
    config: TrainConfig,
    folder: Path | None,
    *,
    resume: bool = False,
    new_episodes: bool = False,
    unpickle: bool = False,
    init_from: Path | str | None = None,
    quiet: bool = False,
) -> tuple[Run, int]:
    """As ``_train``, from ``config.data``."""
    if new_episodes or unpickle:
        raise ConfigurationError("--new-episodes and --unpickle are of environments, and this run has episodes")
    if config.updates is None and config.minutes is None:
        raise ConfigurationError("--data has no last step: --minutes or --updates is missing, which end such a run")
    source, held_out = recorded_sources(config)
    evaluator: Evaluator = OpenLoopEvaluator()
    if held_out is not None:
        evaluator = HeldOutEvaluator(held_out, evaluator)
    return _train_from_source(config, source, folder, evaluator, resume, init_from, quiet)


def train_from_source(
    config: TrainConfig,
    source: Source,
    folder: Path,
    *,
    resume: bool = False,
    init_from: Path | str | None = None,
    quiet: bool = False,
) -> Run:
    """Trains on a source of batches, without environments, until a limit of ``config``; steps are updates.

    ``init_from`` is the folder of a run whose weights are taken where they fit.

    Raises:
        ConfigurationError: as for ``train``, or no limit.
        RunError, MissingPackage, TrainingFailed: as for ``train``.
    """
    return _train_from_source(config, source, folder, OpenLoopEvaluator(), resume, init_from, quiet)[0]


@threads_restored()
def _train_from_source(
    config: TrainConfig,
    source: Source,
    folder: Path | None,
    evaluator: Evaluator,
    resume: bool,
    init_from: Path | str | None,
    quiet: bool,
) -> tuple[Run, int]:
    """``train_from_source``; returns the signal that ended it as well, else 0."""
    require("safetensors.torch", "write checkpoints")
    if config.updates is None and config.minutes is None:
        raise ConfigurationError("train_from_source: updates and minutes are None, expected one of them to end the run")
    with contextlib.ExitStack() as ending:
        if resume:
            assert folder is not None
            run = Run.open_to_write(folder)
            ending.callback(run.close)
            check_resumable(run, config)
            check_fits(run, config, source.observation_spec, source.action_spec, "the source")
        trainer = SourceTrainer(config, source, evaluator)
        policy = policy_evaluator(trainer)
        started = _warm_start(trainer, init_from, resume)
        if not resume:
            trainer.bound_memory()
            trainer.choose_threads()
        room = _room(trainer, None if resume else folder or Path("runs"))
        spaces = {"observation": source.observation_spec.to_json(), "action": source.action_spec.to_json()}
        described = {"train": to_json(trainer.config), "spaces": to_json(spaces)}
        if not resume:
            run = _new_run(config, folder, {**described, "init_from": started})
            ending.callback(run.close)
        if resume:
            if run.checkpoints:
                trainer.load(run)
            run.forget_metrics_after(trainer.steps)
            run.configure({**run.config, **described})
        begun = [f"continuing after {trainer.updates:,} updates", *narrow_notice(trainer)] if resume else started
        return run, _run(trainer, run, [*begun, *room], quiet, policy)


def policy_evaluator(trainer: SourceTrainer) -> PolicyEvaluator | None:
    """None where no policy acts, as without environments or with random actions alone, unless ``eval_env`` is given.

    Raises as ``PolicyEvaluator``.
    """
    config = trainer.config
    acts = isinstance(trainer, Trainer) and config.random_envs < config.num_envs
    if not config.eval_minutes or not (acts or config.eval_env is not None):
        return None
    episodes = trainer.episodes if isinstance(trainer, Trainer) else None
    trained = episodes.environments if isinstance(episodes, VectorEnvironment) else ()
    return PolicyEvaluator(config, trainer.world_model, trained)


def _run(
    trainer: SourceTrainer, run: Run, notices: list[str], quiet: bool, evaluator: PolicyEvaluator | None = None
) -> int:
    """Returns the signal that ended it, else 0."""
    try:
        require("torch.utils.tensorboard", "write for TensorBoard")
    except MissingPackage as error:
        notices = [*notices, f"metrics.jsonl alone is written: {error}"]
    with Display(trainer.config, run.folder, quiet=quiet) as display, Interrupt() as interrupt:
        for notice in notices:
            display.say(notice)
        random_steps = trainer.config.prefill - trainer.steps
        if isinstance(trainer, Trainer) and random_steps > 0:
            display.say(f"collecting {random_steps:,} random steps first")
        try:
            _loop(trainer, run, display, interrupt, evaluator)
        except EnvironmentFailed as failure:
            raise EnvironmentFailed(f"{failure}; {_saved_after_failure(trainer, run)}") from failure
        except TrainingFailed as failure:
            raise TrainingFailed(f"{failure}; {_kept(run)}") from failure
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted without saving; {_kept(run)}") from None
        finally:
            if evaluator is not None:
                evaluator.close()
            run.close()
        if isinstance(trainer, Trainer) and not trainer.updates:
            display.say(
                f"nothing is learned yet: the run ended after {trainer.steps:,} steps, before its first update "
                f"(--prefill: {trainer.config.prefill:,} random steps come first)"
            )
        given = is_given(trainer.config.env)
        if interrupt.requested and given:
            display.say(f"interrupted and saved; from Python {way_on(run.folder)} goes on")
        elif interrupt.requested:
            display.say(f"interrupted and saved; go on with --resume {run.folder}")
            display.say(f"  python -m worldmodel train --resume {_named(trainer, run)}")
        elif isinstance(trainer, Trainer) and not given:
            display.say("next:")
            for name in ("evaluate", "imagine"):
                display.say(f"  python -m worldmodel {name} {_named(trainer, run)}")
    return interrupt.signal


def _named(trainer: SourceTrainer, run: Run) -> str:
    """The run for the command line, with the option that another process needs to import what it names."""
    installed = all(is_installed(name, run.folder) for name in modules_of(trainer.config))
    return shlex.quote(str(run.folder)) + ("" if installed else " --trust")


def _kept(run: Run) -> str:
    return f"the newest checkpoint is {run.checkpoints[-1]}" if run.checkpoints else "nothing was saved yet"


def _saved_after_failure(trainer: SourceTrainer, run: Run) -> str:
    """Saves a trainer whose environment failed, where its state is that of a whole step, and says how to go on."""
    if not isinstance(trainer, Trainer) or trainer.collector.failure is None:
        return _kept(run)
    try:
        if not run.metrics or run.metrics[-1]["steps"] < trainer.steps:
            run.log(trainer.metrics())
        run.save(trainer.steps, trainer.state_dict(), replace=True)
    except (OSError, EnvironmentFailed) as error:
        return f"this step cannot be saved: {error}; {_kept(run)}"
    kept = isinstance(trainer.episodes, VectorEnvironment)
    if is_given(trainer.config.env):
        return f"saved; {way_on(run.folder)} goes on with another episode"
    return f"saved; --resume {run.folder}{'' if kept else ' --new-episodes'} goes on with another episode"


def _resume(trainer: Trainer, run: Run, new_episodes: bool, unpickle: bool) -> list[str]:
    read = bool(run.checkpoints) and trainer.load(run, new_episodes=new_episodes, unpickle=unpickle)
    run.forget_metrics_after(trainer.steps)
    said = [f"going on after {trainer.steps:,} steps and {trainer.updates:,} updates", *narrow_notice(trainer)]
    if trainer.failures:
        said.append(f"failed episodes so far: {trainer.failures:,}; another began in the place of each")
    if new_episodes:
        said.append("other episodes begin; those that ran are dropped, and the run is not what it would have been")
    if read:
        said.append(f"the environments were read from a pickle in {run.checkpoints[-1]}, as --unpickle allows")
    elif unpickle:
        said.append("--unpickle was not needed: there is no pickle to read")
    return said


def narrow_notice(trainer: SourceTrainer) -> list[str]:
    """What is said about two-hot heads that were read with the bins of an earlier release; one line at most."""
    heads = [module for module in trainer.world_model.modules() if isinstance(module, ScalarHead)]
    found = [ends for head in heads if (ends := head.narrow)]
    if not found:
        return []
    low, high = max(low for low, _ in found), min(high for _, high in found)
    return [
        f"this run has the bins of an earlier release, which no longer widen: values beyond {low:.3g} and {high:.3g} "
        "reward scales count as these; a new run has wider ones (--init-from takes the other weights)"
    ]


def _loop(
    trainer: SourceTrainer, run: Run, display: Display, interrupt: Interrupt, evaluator: PolicyEvaluator | None
) -> None:
    if trainer.finished:
        display.say("nothing is left to do: give more --steps or --minutes")
        return
    logged = saved = trainer.seconds
    clock = CLOCKS[trainer.config.clock]
    mark, metrics, collapsed = clock(), trainer.metrics(), False
    trainer.evaluate()
    policy = None if evaluator is None else _Policy(trainer, run, display, interrupt, evaluator)
    while not (trainer.finished or interrupt.requested):
        trainer.iterate()
        # Minutes include logging and saving.
        now = clock()
        trainer.seconds, mark = trainer.seconds + now - mark, now
        if trainer.seconds - logged >= trainer.config.log_seconds:
            logged, metrics = trainer.seconds, trainer.metrics()
            measured, picture = trainer.evaluate()
            metrics |= measured
            if policy is not None:
                metrics |= policy.evaluate_in_time()
            collapsed = _say_collapse(display, metrics, collapsed)
            with display.going_on("the log"):
                run.log(metrics)
                if picture is not None:
                    run.log_picture("open_loop", picture, trainer.steps)
            display.show(metrics)
        if trainer.seconds - saved >= 60 * trainer.config.save_minutes:
            saved = trainer.seconds
            with display.going_on("a checkpoint"):
                run.save(trainer.steps, trainer.state_dict())
    evaluated = {} if policy is None else policy.evaluate_at_the_end()
    new = trainer.steps > metrics["steps"]
    if new or evaluated:
        newest = {name: metrics[name] for name in ("steps", "updates", "seconds")}
        if new:
            newest = trainer.metrics() | trainer.evaluate()[0]
            _say_collapse(display, newest, collapsed)
        with display.going_on("the log"):
            run.log({**newest, **evaluated})
        metrics |= newest | evaluated
    display.show(metrics, last=True)
    try:
        run.save(trainer.steps, trainer.state_dict())
    except OSError as error:
        raise RunError(f"the last checkpoint cannot be written: {error}; {_kept(run)}") from error


def _say_collapse(display: Display, metrics: Mapping[str, float], before: bool) -> bool:
    """Whether the latents have collapsed; says so once, and again after they had recovered."""
    notice = collapse_notice(metrics)
    if notice is not None and not before:
        display.say(notice)
    return notice is not None


class _Policy:
    """The policy's evaluations; the run keeps the weights of the best of those in the same episodes.

    After an error there are no more.
    """

    def __init__(
        self, trainer: SourceTrainer, run: Run, display: Display, interrupt: Interrupt, evaluator: PolicyEvaluator
    ) -> None:
        self._trainer, self._run, self._display, self._interrupt = trainer, run, display, interrupt
        self._evaluator: PolicyEvaluator | None = evaluator
        evaluator.begin(trainer.seconds)
        best = run.best_evaluation
        comparable = best is not None and best.get("evaluated") == to_json(evaluator.described)
        self._best = float(best["eval/return"]) if best is not None and comparable else -float("inf")
        self._updates = 0  # when it was evaluated
        self._failed = False

    def evaluate_in_time(self) -> dict[str, float]:
        """Metrics, of an evaluation if it is time for one."""
        due = self._evaluator is not None and self._evaluator.is_time(self._trainer.seconds)
        return self._evaluate() if due and self._trainer.updates else {}

    def evaluate_at_the_end(self) -> dict[str, float]:
        new = self._trainer.updates > self._updates and not self._interrupt.requested
        due = self._evaluator is not None and self._evaluator.is_time_at_the_end(self._trainer.seconds)
        return self._evaluate() if new and due else {}

    def _evaluate(self) -> dict[str, float]:
        trainer = self._trainer
        assert self._evaluator is not None
        try:
            found = self._evaluator.look(trainer.acting_model, trainer.seconds, lambda: self._interrupt.requested)
        except EnvironmentFailed as failure:
            self._display.say(f"the policy cannot be evaluated, and training goes on without: {failure}")
            self._evaluator = None
            return {}
        if found is None:
            return {}
        self._updates = trainer.updates
        metrics = metrics_of(found)
        if found.failures and not self._failed:
            self._failed = True
            count, line = len(found.failures), found.failures[0]
            self._display.say(f"{count} of {count + len(found.returns)} episodes of the evaluation failed: {line}")
        if found.mean >= self._best:
            self._best = found.mean
            counts = {"steps": trainer.steps, "updates": trainer.updates, "seconds": round(trainer.seconds, 3)}
            with self._display.going_on("the best checkpoint"):
                weights = {acting_part(trainer.config): trainer.acting_model.state_dict()}
                described = {"evaluated": to_json(self._evaluator.described), "returns": list(found.returns)}
                self._run.save_best(weights, {**counts, **metrics, **described})
        return metrics


def _subject(config: TrainConfig) -> str:
    """What is learned from."""
    return config.env or (config.data.stem if config.data else "batches")


class OpenLoopEvaluator:
    """Open-loop errors of the newest batch, every ``open_loop_minutes``."""

    def __init__(self) -> None:
        self._callback: OpenLoopCallback | None = None

    def __call__(self, trainer: SourceTrainer) -> tuple[dict[str, float], np.ndarray | None]:
        if self._callback is None:
            config = trainer.config
            self._callback = OpenLoopCallback(
                config.open_loop_minutes, trainer.seconds, trainer.environment, config.clock
            )
        drawn = trainer.world_model.perception.latent.decodes
        if trainer.batch is None or not drawn or not self._callback.is_time(trainer.seconds):
            return {}, None
        title = f"{_subject(trainer.config).rpartition(':')[2]}, after {trainer.steps:,} steps"
        return self._callback.look(trainer.world_model, trainer.batch, trainer.seconds, title)
