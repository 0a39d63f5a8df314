"""Training in one process: collect, learn, and the checkpoint of both.

Every iteration takes one step in each environment, and as many updates as the train ratio allows. What it does depends
on counts and random generators alone, and a checkpoint holds all of them: a resumed run goes on as if it had not been
interrupted, and work after the last checkpoint is done again.
"""

from typing import Any

import numpy as np
import torch

from worldmodel.data.batch import Batch
from worldmodel.data.replay import Replay
from worldmodel.environments.making import make_environments
from worldmodel.environments.pickle_io import PickleRefused
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.learning.collector import Collector
from worldmodel.learning.learner import Learner, NonFiniteError
from worldmodel.learning.metrics import Meter
from worldmodel.learning.settings import TrainConfig, usable_device
from worldmodel.model.world_model import WorldModel
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
        self.episodes = make_environments(config.env, config.num_envs, episodes, config.environment_state == "pickle")
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
            "replay/epochs": self.replay.epochs,
        }

    def state_dict(self) -> dict[str, Any]:
        """The parts of a checkpoint."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        ema = self.learner.ema
        return {
            "world_model": self.world_model.state_dict(),
            **({"ema": ema.module.state_dict()} if ema else {}),
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
        if self.learner.ema:
            run.load_weights(self.learner.ema.module, self.device, "ema")
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
