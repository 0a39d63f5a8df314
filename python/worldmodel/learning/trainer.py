"""Training in one process: learning, collection, checkpoints.

An iteration depends only on counts and random generators, which checkpoints hold: a resumed run repeats the
uninterrupted one.
"""

import dataclasses
import functools
from typing import Any, Protocol

import numpy as np
import torch

from worldmodel.data.batch import Batch
from worldmodel.data.replay import Replay
from worldmodel.data.source import RefreshedSource, Source
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.making import make_environments
from worldmodel.environments.pickle_io import PickleRefused
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.learning.collector import Collector
from worldmodel.learning.learner import Learner, NonFiniteError
from worldmodel.learning.memory_use import UpdateMemory, has_pictures
from worldmodel.learning.metrics import MetricMeans
from worldmodel.learning.settings import TrainConfig, acting_part, check_fits, saved_config, saved_specs, usable_device
from worldmodel.learning.threads import threads_for
from worldmodel.model.deciders import Decider, policy_sample
from worldmodel.model.world_model import WorldModel, outline
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import shown
from worldmodel.runs.run import Run, RunError
from worldmodel.runs.template import check_like
from worldmodel.runs.warm_start import warm_start


class TrainingFailed(RuntimeError):
    """Training cannot continue; saved checkpoints are intact."""


class Evaluator(Protocol):
    """Measures progress without moving a random generator."""

    def __call__(self, trainer: "SourceTrainer") -> tuple[dict[str, float], np.ndarray | None]:
        """Returns metrics, and a picture, uint8 (height, width, 3), or None."""


class SourceTrainer:
    """Learns from a source of batches.

    Attributes:
        updates: of the weights.
        seconds: of training, over all processes.
        batch: the newest.
    """

    def __init__(self, config: TrainConfig, source: Source, evaluator: Evaluator | None = None) -> None:
        self._begin(config)
        self._build(source)
        self._evaluator = evaluator

    def _begin(self, config: TrainConfig) -> tuple[int, list[int]]:
        """Returns seeds of environments, and of batches and actions."""
        self.config = config
        self.device = usable_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        weights, environments, *others = (int(x) for x in np.random.SeedSequence(config.seed).generate_state(4))
        torch.manual_seed(weights)
        return environments, others

    def _build(self, source: Source, world_model: WorldModel | None = None) -> None:
        self.source = source
        self.world_model = world_model or self._world_model(source.observation_spec, source.action_spec)
        self.world_model.chunk_steps = self.config.chunk_steps
        self.learner = Learner(self.world_model, self.config.learner)
        self.updates = 0
        self.seconds = 0.0
        self.batch: Batch | None = None
        self.metric_means = MetricMeans()

    @functools.cached_property
    def update_memory(self) -> UpdateMemory:
        return UpdateMemory.of(self.world_model, self.config.learner, self.config.replay.window)

    def bound_memory(self) -> list[str]:
        """Fixes ``config.chunk_steps``, if it is None, by ``update_megabytes``; says what else changed.

        Raises:
            ConfigurationError: an update with one row takes more.
        """
        if self.config.chunk_steps is None and has_pictures(self.world_model.observation_spec):
            limit = self.config.update_megabytes * 2**20
            chunk_steps = self.update_memory.chunk_steps(self.config.replay.batch_size, limit)
            self.config = dataclasses.replace(self.config, chunk_steps=chunk_steps)
            self.world_model.chunk_steps = chunk_steps
        return []

    def choose_threads(self) -> None:
        """Fixes ``config.threads``, if it is None, by the widest array of an update."""
        if self.config.threads is None:
            replay = self.config.replay
            threads = threads_for(self.world_model, replay.batch_size * replay.window)
            self.config = dataclasses.replace(self.config, threads=threads)
            torch.set_num_threads(threads)

    def _world_model(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> WorldModel:
        copies = 5 if self.config.learner.ema else 4  # weights, gradients, Adam's two means, averaged weights
        outline(observation_spec, action_spec, self.config.model, copies)
        return WorldModel(observation_spec, action_spec, self.config.model).to(self.device)

    def warm_start(self, run: Run) -> str:
        """Takes the weights of ``run`` that fit, its averaged ones if it has them; says which. Raises RunError."""
        said = warm_start(self.world_model, run, acting_part(saved_config(run)))
        if self.learner.ema:
            self.learner.ema.module.load_state_dict(self.world_model.state_dict())
        return said

    @property
    def acting_model(self) -> WorldModel:
        """With averaged weights, if there are any."""
        if self.learner.ema is None:
            return self.world_model
        averaged = self.learner.ema.module
        assert isinstance(averaged, WorldModel)
        return averaged

    def evaluate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Metrics and picture; the first call starts the intervals."""
        return ({}, None) if self._evaluator is None else self._evaluator(self)

    @property
    def environment(self) -> Any:
        """For rendering, or None."""
        return None

    @property
    def steps(self) -> int:
        """Updates, or a ``Trainer``'s collected transitions."""
        return self.updates

    @property
    def finished(self) -> bool:
        limits = self.config
        return (
            (limits.steps is not None and self.steps >= limits.steps)
            or self._updated
            or (limits.minutes is not None and self.seconds >= 60 * limits.minutes)
        )

    @property
    def _updated(self) -> bool:
        """Whether the limit of updates is reached."""
        return self.config.updates is not None and self.updates >= self.config.updates

    def iterate(self) -> None:
        self.update()

    def update(self) -> None:
        """Raises TrainingFailed for NaN or infinite loss or gradient."""
        with self.metric_means.clock("milliseconds/replay"):
            batch, metrics = self.source.sample(self.updates)
            batch = batch.to(self.device)
        with self.metric_means.clock("milliseconds/update"):
            try:
                learned = self.learner.update(batch)
            except NonFiniteError as error:
                raise TrainingFailed(f"update {self.updates + 1}, after {self.steps} steps: {error}") from error
        if self.learner.carried is not None and isinstance(self.source, RefreshedSource):
            self.source.refresh(self.learner.carried, self.updates)
        self.updates += 1
        self.batch = batch
        self.metric_means.add({f"replay/{name}": value for name, value in metrics.items()})
        self.metric_means.add(learned)

    def metrics(self) -> dict[str, float]:
        return {
            "steps": self.steps,
            "updates": self.updates,
            "seconds": round(self.seconds, 3),
            **self.metric_means.means(),
            "replay/steps": self.source.transitions,
            "replay/megabytes": self.source.nbytes / 2**20,
            "replay/epochs": self.source.epochs,
        }

    def state_dict(self) -> dict[str, Any]:
        ema = self.learner.ema
        return {
            "world_model": self.world_model.state_dict(),
            **({"ema": ema.module.state_dict()} if ema else {}),
            "learner": self.learner.state_dict(),
            "replay": self.source.state_dict(),
            "trainer": self._own_state(),
        }

    def _own_state(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {**{name: getattr(self, name) for name in self._counts}, "random": random}

    @property
    def _counts(self) -> tuple[str, ...]:
        return ("updates", "seconds")

    def load(self, run: Run) -> bool:
        """Restores the newest checkpoint; false, as no pickle was read. Raises RunError as ``Trainer.load``."""
        self._load_learned(run)
        with run.refusing("trainer"):
            self._load_counts(run)
        return False

    def _load_learned(self, run: Run) -> None:
        run.load_weights(self.world_model, self.device)
        if self.learner.ema:
            run.load_weights(self.learner.ema.module, self.device, "ema")
        with run.refusing("learner", "replay"):
            self.learner.load_state_dict(run.load("learner", self.device))
            self.source.load_state_dict(run.load("replay"))

    def _load_counts(self, run: Run) -> None:
        """Restores random generators: call last."""
        saved = run.load("trainer")
        check_like(saved, self._own_state(), "trainer")
        for name in self._counts:
            setattr(self, name, saved[name])
        torch.set_rng_state(saved["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)


class Trainer(SourceTrainer):
    """Trains and collects; ``decider`` chooses the actions.

    With ``resumed``, the run to ``load``, the observation's parts are read as they were, and its weights have to fit.
    ``env``, as in ``TrainConfig``, replaces that of ``config``.

    Attributes:
        episodes_ended: over all environments.
        replay: the source of batches.
    """

    def __init__(
        self,
        config: TrainConfig,
        decider: Decider = policy_sample,
        evaluator: Evaluator | None = None,
        resumed: Run | None = None,
        env: Any = None,
    ) -> None:
        if env is not None:
            config = dataclasses.replace(config, env=env)
        environments, (batches, actions) = self._begin(config)
        self.episodes = make_environments(
            config.env,
            config.num_envs,
            environments,
            config.environment_state == "pickle",
            config.kinds if resumed is None else saved_specs(resumed)[0],
            config.env_args,
            config.image_size,
        )
        specs = self.episodes.observation_spec, self.episodes.action_spec
        if resumed is not None:
            check_fits(resumed, config, *specs, config.env)
        world_model = self._world_model(*specs)
        empty = {name: value[0].cpu().numpy() for name, value in world_model.init_state(1).items()}
        self.replay = Replay(*specs, config.num_envs, config.replay, empty, batches)
        self._build(self.replay, world_model)
        self.collector = Collector(self.episodes, self.replay, self.world_model, actions, decider)
        self._evaluator = evaluator
        self.episodes_ended = 0
        self._owed = 0.0  # updates due

    def bound_memory(self) -> list[str]:
        said = self._bound_rows() if has_pictures(self.world_model.observation_spec) else []
        return said + super().bound_memory()

    def _bound_rows(self) -> list[str]:
        config, replay = self.config, self.config.replay
        rows = self.update_memory.most_rows(config.update_megabytes * 2**20)
        if rows >= replay.batch_size:
            return []
        if rows < 1:
            raise ConfigurationError(
                f"update_megabytes is {config.update_megabytes:g}, and an update with one row of {replay.window} steps "
                f"takes {self.update_memory.total(1, 1) / 2**20:,.0f}: raise it, or lower image_size or replay.window"
            )
        self.config = dataclasses.replace(config, replay=dataclasses.replace(replay, batch_size=rows))
        self.replay.config = self.config.replay
        return [
            f"batches have {rows} rows of {replay.window} steps, not {replay.batch_size}: more would take an update "
            f"past {config.update_megabytes:g} MiB, which --update-megabytes changes"
        ]

    @property
    def environment(self) -> Any:
        return self.episodes.environments[0] if isinstance(self.episodes, VectorEnvironment) else None

    @property
    def steps(self) -> int:
        return self.collector.steps

    @property
    def failures(self) -> int:
        """Episodes that ended with an environment's error, where it is not a vector environment of its own."""
        return self.episodes.failures if isinstance(self.episodes, VectorEnvironment) else 0

    def iterate(self) -> None:
        if self._owed < 1:  # else a limit of updates ended the last iteration
            self._collect()
        while self._owed >= 1 and not self._updated:
            self._owed -= 1
            self.update()
        if self.collector.failure is not None:
            raise self.collector.failure

    def _collect(self) -> None:
        prefilling = self.steps < self.config.prefill or not len(self.replay)
        before = self.steps
        random_rows = self.config.num_envs if prefilling else self.config.random_envs
        with self.metric_means.clock("milliseconds/collect"):
            for episode_return, length in self.collector.collect(random_rows=random_rows, version=self.updates):
                self.metric_means.add({"episode/return": episode_return, "episode/length": length})
                self.episodes_ended += 1
        if not prefilling:
            replay = self.config.replay
            self._owed += (self.steps - before) * self.config.train_ratio / (replay.batch_size * replay.window)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "environments": self.episodes.num_envs, "episodes": self.episodes_ended}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "collector": self.collector.state_dict()}

    @property
    def _counts(self) -> tuple[str, ...]:
        return ("updates", "episodes_ended", "seconds", "_owed")

    def load(self, run: Run, *, new_episodes: bool = False, unpickle: bool = False) -> bool:
        """Restores the newest checkpoint; returns whether a pickle was read.

        Args:
            run: to resume.
            new_episodes: start new episodes instead.
            unpickle: allow pickled environments, whose code runs.

        Raises:
            RunError: a file is missing, damaged or of another configuration, or environments cannot be restored.
        """
        anew = f"--resume {run.folder} --new-episodes goes on with other episodes, and then not as if nothing had been"
        self._load_learned(run)
        with run.refusing("collector", "trainer"):
            collected = run.load("collector")
            like = self.collector.state_dict()
            like["episodes"] = like["episodes"] and {**like["episodes"], "pickle": None}  # of any length
            check_like(collected, like, "collector")
            try:
                self.collector.load_state_dict(collected, new_episodes=new_episodes, unpickle=unpickle)
            except EnvironmentFailed as error:
                raise RunError(
                    f"the episodes of {run.folder} cannot be gone on with: {shown(error, 400)}. {anew}"
                ) from error
            except PickleRefused as error:
                trusted = "--unpickle reads it, if you trust who made the run"
                raise RunError(f"{run.checkpoints[-1]}: {error}; {trusted}. {anew}") from error
            self._load_counts(run)
        return not new_episodes and collected["episodes"]["pickle"] is not None
