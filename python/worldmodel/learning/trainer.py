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

from worldmodel.commands.display import Display
from worldmodel.commands.interrupt import Interrupt
from worldmodel.data.batch import Batch
from worldmodel.data.replay import Replay
from worldmodel.environments.pickle_io import PickleRefused
from worldmodel.environments.registry import EnvironmentFailed, make, make_vector
from worldmodel.environments.vector import Episodes, VectorEpisodes, random_seeds
from worldmodel.learning.callback import Watch
from worldmodel.learning.collector import Collector
from worldmodel.learning.learner import Learner, NonFiniteError
from worldmodel.learning.metrics import Meter
from worldmodel.learning.settings import TrainConfig, check_resumable, usable_device
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.configuration import ConfigurationError, differences, to_json
from worldmodel.runs.optional_dependencies import MissingPackage, require
from worldmodel.runs.run import Run, RunError


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
        batch: what was learned from last.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = usable_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        weights, episodes, batches, actions = (int(x) for x in np.random.SeedSequence(config.seed).generate_state(4))
        torch.manual_seed(weights)
        self.episodes = make_episodes(config.env, config.num_envs, episodes, config.environment_state == "pickle")
        observation_spec, action_spec = self.episodes.observation_spec, self.episodes.action_spec
        self.world_model = WorldModel(observation_spec, action_spec, config.model).to(self.device)
        self.learner = Learner(self.world_model, config.learner)
        empty = {name: value[0].cpu().numpy() for name, value in self.world_model.init_state(1).items()}
        self.replay = Replay(observation_spec, action_spec, config.num_envs, config.replay, empty, batches)
        self.collector = Collector(self.episodes, self.replay, self.world_model, actions)
        self.updates = 0
        self.episodes_ended = 0
        self.seconds = 0.0
        self.batch: Batch | None = None
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
        self.batch = batch
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
        average = self.learner.average
        return {
            "world_model": self.world_model.state_dict(),
            **({"average": average.world_model.state_dict()} if average else {}),
            "learner": self.learner.state_dict(),
            "replay": self.replay.state_dict(),
            "collector": self.collector.state_dict(),
            "trainer": {**{name: getattr(self, name) for name in _COUNTS}, "random": random},
        }

    def load(self, run: Run, *, new_episodes: bool = False, unpickle: bool = False) -> bool:
        """Goes on from the newest checkpoint of ``run``.

        Args:
            run: to go on with.
            new_episodes: begin other episodes instead of going on with those that ran.
            unpickle: whether pickled environments may be read, which runs whatever is written in them.

        Returns:
            Whether a pickle was read.

        Raises:
            RunError: a file is missing or damaged, or was made by another configuration, or the environments cannot be
                brought back to where they were; what can be done about it is said.
        """
        anew = f"--resume {run.folder} --new-episodes goes on with other episodes, and then not as if nothing had been"
        run.load_weights(self.world_model, self.device)
        if self.learner.average:
            run.load_weights(self.learner.average.world_model, self.device, "average")
        with run.refusing("learner", "replay", "collector", "trainer"):
            self.learner.load_state_dict(run.load("learner", self.device))
            self.replay.load_state_dict(run.load("replay"))
            collected = run.load("collector")
            try:
                self.collector.load_state_dict(collected, new_episodes=new_episodes, unpickle=unpickle)
            except EnvironmentFailed as error:
                raise RunError(f"the episodes of {run.folder} cannot be gone on with: {error}. {anew}") from error
            except PickleRefused as error:
                trusted = "--unpickle reads it, if you trust who made the run"
                raise RunError(f"{run.checkpoints[-1]}: {error}; {trusted}. {anew}") from error
            saved = run.load("trainer")
            for name in _COUNTS:
                setattr(self, name, saved[name])
            torch.set_rng_state(saved["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in saved["random"]:
                torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)
        return not new_episodes and collected["episodes"]["pickle"] is not None


_COUNTS = ("updates", "episodes_ended", "seconds", "_owed")


def make_episodes(name: str, num_envs: int, seed: int, pickle: bool = False) -> Episodes | VectorEpisodes:
    """``num_envs`` environments called ``name``, as single ones where they exist as such.

    Args:
        name: as for ``worldmodel.environments.registry.resolve``.
        num_envs: how many.
        seed: from which their episodes get theirs.
        pickle: hold them as a pickle in checkpoints, which is tried at once.

    Raises:
        UnknownEnvironment: nothing goes by that name.
        EnvironmentFailed: they cannot be made, or not be pickled.
        ConfigurationError: their spaces are not supported.
    """
    try:
        environments = [make(name) for _ in range(num_envs)]
    except EnvironmentFailed as failure:
        try:
            vector = make_vector(name, num_envs)
        except EnvironmentFailed:
            raise failure from None
        episodes: Episodes | VectorEpisodes = VectorEpisodes(vector, seed, pickle)
    else:
        try:
            episodes = Episodes(environments, random_seeds(seed), pickle=pickle)
        except ValueError as error:
            raise ConfigurationError(f"environment {name!r}: {error}") from error
    if pickle:
        episodes.state_dict()  # rather now than at the first checkpoint
    return episodes


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    new_episodes: bool = False,
    unpickle: bool = False,
    quiet: bool = False,
) -> Run:
    """Trains until the steps or minutes of ``config`` are used up, or Ctrl-C; saves at the end either way.

    Args:
        config: what to train.
        folder: of the run.
        resume: go on with the run in ``folder``; ``config`` must agree with its configuration.
        new_episodes: when going on, begin other episodes instead of those that ran.
        unpickle: when going on, whether pickled environments may be read, which runs whatever is written in them.
        quiet: show nothing.

    Returns:
        The run.

    Raises:
        MissingPackage: safetensors is not installed.
        ConfigurationError: settings that cannot work, or that are not those of the run to go on with.
        RunError: a folder that is not empty, a run whose files are damaged, or one whose episodes cannot be gone on
            with; nothing in its folder has changed then.
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
    notices = _go_on(trainer, run, new_episodes, unpickle) if resume else []
    if isinstance(episodes, VectorEpisodes) and not episodes.pickle:
        notices.append(
            f"{episodes.name} is a vector environment of its own: if this run is interrupted, it goes on with other "
            "episodes alone (--new-episodes); --environment-state pickle keeps them"
        )
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


def _go_on(trainer: Trainer, run: Run, new_episodes: bool, unpickle: bool) -> list[str]:
    """From the newest checkpoint; from the start where the run ended before its first one. Returns what to say."""
    read = bool(run.checkpoints) and trainer.load(run, new_episodes=new_episodes, unpickle=unpickle)
    run.forget_metrics_after(trainer.steps)
    said = [f"going on after {trainer.steps:,} steps and {trainer.updates:,} updates"]
    if new_episodes:
        said.append("other episodes begin; those that ran are dropped, and the run is not what it would have been")
    if read:
        said.append(f"the environments were read from a pickle in {run.checkpoints[-1]}, as --unpickle allows")
    elif unpickle:
        said.append("--unpickle was not needed: there is no pickle to read")
    return said


def _loop(trainer: Trainer, run: Run, display: Display, interrupt: Interrupt) -> None:
    if trainer.finished:
        display.say("nothing is left to do: give more --steps or --minutes")
        return
    logged = saved = trainer.seconds
    mark, figures = time.perf_counter(), trainer.figures()
    single = trainer.episodes.environments[0] if isinstance(trainer.episodes, Episodes) else None
    watch = Watch(trainer.config.open_loop_minutes, trainer.seconds, single)
    while not (trainer.finished or interrupt.asked):
        trainer.iterate()
        # Logging and saving count, too: they are part of the minutes that a user waits.
        now = time.perf_counter()
        trainer.seconds, mark = trainer.seconds + now - mark, now
        if trainer.seconds - logged >= trainer.config.log_seconds:
            logged, figures = trainer.seconds, trainer.figures()
            figures |= _look(trainer, run, watch)
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


def _look(trainer: Trainer, run: Run, watch: Watch) -> dict[str, float]:
    """Open-loop prediction, where it is time for it: a picture for TensorBoard, and figures."""
    if trainer.batch is None or not watch.is_time(trainer.seconds):
        return {}
    title = f"{trainer.config.env.rpartition(':')[2]}, after {trainer.steps:,} steps"
    scale = trainer.learner.reward_scale
    figures, picture = watch.look(trainer.world_model, trainer.batch, scale, trainer.seconds, title)
    if picture is not None:
        run.log_picture("open_loop", picture, trainer.steps)
    return figures
