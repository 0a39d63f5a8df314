"""Training: collect, learn, log, save, until the steps or the minutes are used up.

Every iteration takes one step in each environment, and as many updates as the train ratio allows. What it does depends
on counts and random generators alone, and a checkpoint holds all of them: a resumed run goes on as if it had not been
interrupted, and work after the last checkpoint is done again.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.collector import Collector
from worldmodel.configuration import ConfigurationError, differences, to_json
from worldmodel.display import Display
from worldmodel.environments import EnvironmentFailed, make, make_vector
from worldmodel.episodes import Episodes, VectorEpisodes, random_seeds
from worldmodel.extras import MissingPackage, require
from worldmodel.interrupt import Interrupt
from worldmodel.learner import Learner, NonFiniteError
from worldmodel.meter import Meter
from worldmodel.replay import Replay
from worldmodel.run import Run
from worldmodel.settings import TrainConfig, check_resumable, usable_device
from worldmodel.world_model import WorldModel


class TrainingFailed(RuntimeError):
    """Training cannot go on; checkpoints already saved are as they were."""


class Trainer:
    """Everything that trains, in one process.

    Args:
        config: what to train, on what, for how long.

    Attributes:
        updates: of the weights.
        episodes_ended: of all environments.
        seconds: of training, over all processes that worked on the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = usable_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        weights, episodes, batches, actions = (int(x) for x in np.random.SeedSequence(config.seed).generate_state(4))
        torch.manual_seed(weights)
        self.episodes = make_episodes(config.env, config.num_envs, episodes)
        observation_spec, action_spec = self.episodes.observation_spec, self.episodes.action_spec
        self.world_model = WorldModel(observation_spec, action_spec, config.model).to(self.device)
        self.learner = Learner(self.world_model, config.learner)
        empty = {name: value[0].cpu().numpy() for name, value in self.world_model.init_state(1).items()}
        self.replay = Replay(observation_spec, action_spec, config.num_envs, config.replay, empty, batches)
        self.collector = Collector(self.episodes, self.replay, self.world_model, actions)
        self.updates = 0
        self.episodes_ended = 0
        self.seconds = 0.0
        self.meter = Meter()
        self._owed = 0.0  # updates that the train ratio allows and that have not been made

    @property
    def steps(self) -> int:
        """Transitions collected."""
        return self.collector.steps

    @property
    def finished(self) -> bool:
        """Whether the steps or the minutes are used up."""
        steps, minutes = self.config.steps, self.config.minutes
        return (steps is not None and self.steps >= steps) or (minutes is not None and self.seconds >= 60 * minutes)

    def iterate(self) -> None:
        """One step in each environment, and the updates that it pays for."""
        prefilling = self.steps < self.config.prefill or not len(self.replay)
        before = self.steps
        random_rows = self.config.num_envs if prefilling else self.config.random_envs
        with self.meter.clock("milliseconds/collect"):
            for episode_return, length in self.collector.collect(random_rows=random_rows, version=self.updates):
                self.meter.add({"episode/return": episode_return, "episode/length": length})
                self.episodes_ended += 1
        if not prefilling:
            replay = self.config.replay
            self._owed += (self.steps - before) * self.config.train_ratio / (replay.batch_size * replay.window)
        while self._owed >= 1:
            self._owed -= 1
            self.update()

    def update(self) -> None:
        """One update of the weights.

        Raises:
            TrainingFailed: a loss or a gradient is NaN or infinite.
        """
        with self.meter.clock("milliseconds/replay"):
            batch, figures = self.replay.sample(self.updates)
            batch = batch.to(self.device)
        with self.meter.clock("milliseconds/update"):
            try:
                learned = self.learner.update(batch)
            except NonFiniteError as error:
                raise TrainingFailed(f"update {self.updates + 1}, after {self.steps} steps: {error}") from error
        self.updates += 1
        self.meter.add({f"replay/{name}": value for name, value in figures.items()})
        self.meter.add(learned)

    def figures(self) -> dict[str, float]:
        """A line for the log: counts, and means since the last line."""
        return {
            "steps": self.steps,
            "updates": self.updates,
            "environments": self.episodes.num_envs,
            "seconds": round(self.seconds, 3),
            "episodes": self.episodes_ended,
            **self.meter.means(),
            "replay/steps": self.replay.transitions,
            "replay/megabytes": self.replay.nbytes / 2**20,
            "replay/passes": self.replay.passes,
        }

    def state_dict(self) -> dict[str, Any]:
        """The parts of a checkpoint."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "world_model": self.world_model.state_dict(),
            "learner": self.learner.state_dict(),
            "replay": self.replay.state_dict(),
            "collector": self.collector.state_dict(),
            "trainer": {**{name: getattr(self, name) for name in _COUNTS}, "random": random},
        }

    def load(self, run: Run) -> str | None:
        """Goes on from the newest checkpoint of ``run``.

        Returns:
            Why the episodes that were running are lost, if they are.

        Raises:
            RunError: a file is missing or damaged, or was made by another configuration.
        """
        run.load_weights(self.world_model, self.device)
        with run.refusing("learner", "replay", "collector", "trainer"):
            self.learner.load_state_dict(run.load("learner", self.device))
            self.replay.load_state_dict(run.load("replay"))
            lost = self.collector.load_state_dict(run.load("collector"))
            saved = run.load("trainer")
            for name in _COUNTS:
                setattr(self, name, saved[name])
            torch.set_rng_state(saved["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in saved["random"]:
                torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)
        return lost


_COUNTS = ("updates", "episodes_ended", "seconds", "_owed")


def make_episodes(name: str, num_envs: int, seed: int) -> Episodes | VectorEpisodes:
    """``num_envs`` environments called ``name``, as single ones where they exist as such.

    Raises:
        UnknownEnvironment: nothing goes by that name.
        EnvironmentFailed: they cannot be made.
        ConfigurationError: their spaces are not supported.
    """
    try:
        environments = [make(name) for _ in range(num_envs)]
    except EnvironmentFailed as failure:
        try:
            vector = make_vector(name, num_envs)
        except EnvironmentFailed:
            raise failure from None
        return VectorEpisodes(vector, seed)
    try:
        return Episodes(environments, random_seeds(seed))
    except ValueError as error:
        raise ConfigurationError(f"environment {name!r}: {error}") from error


def train(config: TrainConfig, folder: Path, *, resume: bool = False, quiet: bool = False) -> Run:
    """Trains until the steps or minutes of ``config`` are used up, or Ctrl-C; saves at the end either way.

    Args:
        config: what to train.
        folder: of the run.
        resume: go on with the run in ``folder``; ``config`` must agree with its configuration.
        quiet: show nothing.

    Returns:
        The run.

    Raises:
        MissingPackage: safetensors is not installed.
        ConfigurationError: settings that cannot work, or that are not those of the run to go on with.
        RunError: a folder that is not empty, or a run whose files are damaged.
        EnvironmentFailed: an environment raised an error or gave NaN.
        TrainingFailed: a loss became NaN. Here and above, checkpoints already saved stay as they were.
    """
    require("safetensors.torch", "write checkpoints")  # rather now than after an hour
    if resume:
        run = Run(folder)
        check_resumable(run, config)
    trainer = Trainer(config)
    episodes = trainer.episodes
    spaces = {"observation": episodes.observation_spec.to_json(), "action": episodes.action_spec.to_json()}
    described = {"train": to_json(config), "spaces": to_json(spaces)}
    if not resume:
        run = Run.create(folder, described)
    elif changed := differences(run.config["spaces"], described["spaces"]):
        raise ConfigurationError(f"{config.env} is not what it was when {folder} began: {'; '.join(changed)}")
    notices = _go_on(trainer, run) if resume else []
    try:
        require("torch.utils.tensorboard", "write for TensorBoard")
    except MissingPackage as error:
        notices.append(f"metrics.jsonl alone is written: {error}")
    if resume:
        run.configure({**run.config, **described})
    with Display(config, folder, quiet=quiet) as display, Interrupt() as interrupt:
        for notice in notices:
            display.say(notice)
        try:
            _loop(trainer, run, display, interrupt)
        except (EnvironmentFailed, TrainingFailed) as failure:
            kept = f"the newest checkpoint is {run.checkpoints[-1]}" if run.checkpoints else "nothing was saved yet"
            raise type(failure)(f"{failure}; {kept}") from failure
        finally:
            trainer.episodes.close()
            run.close()
        if interrupt.asked:
            display.say(f"interrupted and saved; go on with --resume {folder}")
    return run


def _go_on(trainer: Trainer, run: Run) -> list[str]:
    """From the newest checkpoint; from the start where the run ended before its first one. Returns what to say."""
    lost = trainer.load(run) if run.checkpoints else None
    run.forget_metrics_after(trainer.steps)
    said = [f"going on after {trainer.steps:,} steps and {trainer.updates:,} updates"]
    return said if lost is None else [*said, f"the episodes that were running are lost, others begin: {lost}"]


def _loop(trainer: Trainer, run: Run, display: Display, interrupt: Interrupt) -> None:
    if trainer.finished:
        display.say("nothing is left to do: give more --steps or --minutes")
        return
    logged = saved = trainer.seconds
    mark, figures = time.perf_counter(), trainer.figures()
    while not (trainer.finished or interrupt.asked):
        trainer.iterate()
        # Logging and saving count, too: they are part of the minutes that a user waits.
        now = time.perf_counter()
        trainer.seconds, mark = trainer.seconds + now - mark, now
        if trainer.seconds - logged >= trainer.config.log_seconds:
            logged, figures = trainer.seconds, trainer.figures()
            run.log(figures)
            display.show(figures)
        if trainer.seconds - saved >= 60 * trainer.config.save_minutes:
            saved = trainer.seconds
            run.save(trainer.steps, trainer.state_dict())
    if trainer.steps > figures["steps"]:
        figures = trainer.figures()
        run.log(figures)
    display.show(figures, last=True)
    run.save(trainer.steps, trainer.state_dict())
