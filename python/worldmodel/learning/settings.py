"""What a training run is told: the dataclass behind ``python -m worldmodel train``."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

from worldmodel.data.replay import ReplayConfig
from worldmodel.learning.learner import LearnerConfig
from worldmodel.model.world_model import WorldModelConfig
from worldmodel.runs.configuration import ConfigurationError, differences, from_json, to_json
from worldmodel.runs.run import Run


@dataclasses.dataclass
class TrainConfig:
    """A training run. Fields of model, learner and replay come from the preset, and can be overridden one by one."""

    env: str = ""
    """Environment: a gymnasium id, module:Env-v0, or a name of popgym's."""
    preset: str = "popgym"
    """Where model, learner and replay start from."""
    num_envs: int = 16
    """Environments that are stepped side by side."""
    train_ratio: float = 64
    """Steps that are learned from for each step collected."""
    prefill: int = 2000
    """Steps of random actions before learning begins."""
    random_envs: int = 0
    """Environments that go on acting at random, so that what is learned from is not only what the policy does."""
    steps: int | None = None
    """Stop after so many steps of the environments, all together."""
    updates: int | None = None
    """Stop after so many updates of the weights."""
    minutes: float | None = None
    """Stop after so many minutes of training, those before a resume included."""
    device: str = "cpu"
    """Where the world model lives: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """Threads that PyTorch uses on a CPU; as PyTorch chooses if not given."""
    seed: int = 0
    """Of weights, environments, actions and batches."""
    log_seconds: float = 5
    """Seconds between lines of metrics."""
    save_minutes: float = 2
    """Minutes between checkpoints."""
    open_loop_minutes: float = 2
    """Minutes between looks at open-loop prediction, a picture in TensorBoard and open_loop/... among the metrics; more
    where that would take over 1% of the time. 0 turns them off."""
    environment_state: Literal["replay", "pickle"] = "replay"
    """How a checkpoint holds the environments: replay keeps the seed and the actions of each episode, which are done
    again on resume; pickle pickles them, where that does not lead back, and then resume asks for --unpickle."""
    model: WorldModelConfig = dataclasses.field(default_factory=WorldModelConfig)
    """The five functions."""
    learner: LearnerConfig = dataclasses.field(default_factory=LearnerConfig)
    """Losses and optimisers."""
    replay: ReplayConfig = dataclasses.field(default_factory=ReplayConfig)
    """What is kept, and how batches are packed."""

    def __post_init__(self) -> None:
        """Raises ConfigurationError for numbers that cannot work."""
        for name in (
            "num_envs",
            "threads",
            "train_ratio",
            "steps",
            "updates",
            "minutes",
            "log_seconds",
            "save_minutes",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name} is {value}, expected more than 0")
        for name in ("prefill", "seed", "open_loop_minutes"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.environment_state not in ("replay", "pickle"):
            raise ConfigurationError(f"environment_state is {self.environment_state!r}, expected 'replay' or 'pickle'")
        if not 0 <= self.random_envs <= self.num_envs:
            raise ConfigurationError(
                f"random_envs is {self.random_envs}, expected at least 0 and at most num_envs = {self.num_envs}"
            )


# How long, where and how often: what may change when a run is resumed.
_FREE = {
    "steps",
    "updates",
    "minutes",
    "device",
    "threads",
    "log_seconds",
    "save_minutes",
    "open_loop_minutes",
    "environment_state",
}


def saved_config(run: Run) -> TrainConfig:
    """The configuration in a run's folder.

    Raises:
        ConfigurationError: it was written by a version with other settings.
    """
    return from_json(TrainConfig, run.config.get("train"), "train")


def acting_part(config: TrainConfig) -> str:
    """Which part of a checkpoint holds the weights that an agent acts with."""
    return "ema" if config.learner.ema else "world_model"


def check_resumable(run: Run, config: TrainConfig) -> None:
    """Raises ConfigurationError where ``config`` is not the one that the checkpoints of ``run`` were made with."""

    def fixed(everything: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in everything.items() if name not in _FREE}

    found = differences(fixed(to_json(saved_config(run))), fixed(to_json(config)))
    if found:
        raise ConfigurationError(
            f"the checkpoints in {run.folder} were made with another configuration: {'; '.join(found)}. Without these "
            "options the run goes on as it was; a new run can have them"
        )


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigurationError: there is no such device, or PyTorch cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device is {name!r}, which PyTorch cannot use here: {reason}") from error
    return device


def default_folder(env: str, stamp: str) -> Path:
    """Where a run goes that was not told where.

    Example:
        >>> default_folder("module:Env-v0", "20260101-120000").as_posix()
        'runs/module-Env-v0-20260101-120000'
    """
    return Path("runs") / f"{env.replace(':', '-').replace('/', '-')}-{stamp}"
