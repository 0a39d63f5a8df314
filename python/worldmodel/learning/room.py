"""Memory and disk that a run takes, said and refused before it collects anything."""

import math
import shutil
from pathlib import Path

from worldmodel.data.replay import Replay, ReplayConfig
from worldmodel.data.spaces import ObservationSpec
from worldmodel.learning.settings import TrainConfig
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.memory import machine_memory

_OPTIMISER = 2  # Adam's two means per parameter
_LOWER = "lower --replay.max-megabytes, --replay.window or --num-envs"


def batch_bytes(observation_spec: ObservationSpec, config: ReplayConfig) -> int:
    """Of a batch's observations; perception makes pixels numbers by chunks (``memory_use``)."""
    return config.batch_size * config.window * sum(array.nbytes for array in observation_spec.zeros(1).values())


def imagined_bytes(config: TrainConfig, world_model: WorldModel) -> int:
    """Of the features that an update imagines, which are all kept."""
    objective, replay = config.learner.objective, config.replay
    tries = math.prod(world_model.action_spec.sizes) if config.model.decision.gradient == "all_action" else 1
    starts = replay.batch_size * min(objective.imagination_starts, replay.window)
    return starts * tries * objective.horizon * world_model.init_state(1)["features"].nbytes


def room_notice(config: TrainConfig, world_model: WorldModel, replay: Replay, folder: Path | None) -> str:
    """What a batch, the replay and a checkpoint take; ``folder`` is where a new run is written, None for no look.

    Raises:
        ConfigurationError: the machine's memory, or the disk, has less.
    """
    batch, stored = batch_bytes(replay.observation_spec, replay.config), replay.most_bytes(config.steps)
    weights = sum(value.nbytes for value in world_model.state_dict().values())
    learned = weights * (1 + _OPTIMISER + bool(config.learner.ema))
    memory, checkpoint = stored + batch + learned + weights, stored + learned  # gradients are not saved
    present = machine_memory()
    if (imagined := imagined_bytes(config, world_model)) > present:
        raise ConfigurationError(
            f"imagination takes at least {_size(imagined)}, and this machine's memory is {_size(present)}: lower "
            "--learner.objective.horizon, --learner.objective.imagination-starts or --replay.batch-size"
        )
    if memory > present:
        raise ConfigurationError(
            f"the replay takes up to {_size(stored)} and a batch {_size(batch)}, and this machine's memory is "
            f"{_size(present)}: {_LOWER}"
        )
    if folder is not None and checkpoint > (free := shutil.disk_usage(_existing(folder)).free):
        raise ConfigurationError(
            f"a checkpoint takes up to {_size(checkpoint)}, and the disk of {folder} has {_size(free)} left: {_LOWER}"
        )
    steps, capacity = replay.capacity
    return (
        f"one batch {_size(batch)}; replay holds {steps:,} steps ({_size(capacity)}); a checkpoint up to "
        f"{_size(checkpoint)}"
    )


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit / 10:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
