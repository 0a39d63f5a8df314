"""A run of ``imitate``: its settings, its sources of recorded episodes, and the policy that it trained."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.data.datasets import OBSERVED, Episodes, RecordedSource
from worldmodel.data.selection import SelectedEpisodes, held_out_split, open_episodes
from worldmodel.data.source import Source
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.single import make_single
from worldmodel.learning.imitation_trainer import ImitationTrainConfig
from worldmodel.learning.settings import saved_specs, usable_device
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.imitation import ImitationPolicy
from worldmodel.runs.configuration import from_json, to_json
from worldmodel.runs.fields import Checked, ConfigurationError, Count, Share, Text
from worldmodel.runs.memory import machine_memory
from worldmodel.runs.run import Run, RunError
from worldmodel.runs.trust import check_installed, installed_alone

PART = "policy"
HELD_OUT = "held_out/action"
TASK = "task"  # the part of an observation that names the task
_BATCHES = 8  # per evaluation of the held-out episodes, at most
_CHUNK = 256  # episodes whose first steps are read at once


@dataclasses.dataclass
class ImitationRunConfig(Checked):
    """Settings of a run, in ``config.json`` under "imitation".

    Attributes:
        data: recorded episodes.
        data_columns: as of ``TrainConfig``.
        tasks: indices of the tasks that are learned; all if empty.
        held_out: share of the episodes that is not learned from.
        env: environment that was recorded; empty where the data do not say.
        env_args: its arguments.
        train: the training, and the policy.
    """

    data: Path
    data_columns: tuple[Text, ...] = ()
    tasks: tuple[Count, ...] = ()
    held_out: Share = 0.1
    env: Text = ""
    env_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: ImitationTrainConfig = dataclasses.field(default_factory=ImitationTrainConfig)


def recorded_environment(files: Sequence[Episodes]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the environment that all ``files`` say they were recorded in; no name if they do not."""
    told = [getattr(file, "about", {}) for file in files]
    env, env_args = told[0].get("env"), told[0].get("env_args", {})
    alike = all(each.get("env") == env and each.get("env_args", {}) == env_args for each in told)
    return (env, env_args) if alike and isinstance(env, str) and isinstance(env_args, dict) else ("", {})


def task_names(env: str, env_args: dict[str, Any]) -> tuple[str, ...]:
    """Names of the environment's tasks, its attribute ``tasks``; none where it has none. Raises as ``make``."""
    made = make_single(env, **env_args)
    made.close()
    return tuple(str(name) for name in getattr(made.unwrapped, "tasks", ()))


def check_learnable(files: Sequence[Episodes]) -> None:
    """Raises RunError for recorded actions that no policy here imitates."""
    actions = files[0].action_spec
    if actions.kind != "continuous" or actions.parts:
        kind = "a Tuple or Dict" if actions.parts else actions.kind
        raise RunError(f"{files[0].path}: actions are {kind}, expected numbers, of a Box: `train --data` learns others")


def imitation_sources(
    config: ImitationRunConfig, files: Sequence[Episodes] | None = None
) -> tuple[RecordedSource, RecordedSource | None]:
    """Batches of what is learned from, and of the episodes held out, None without any.

    Args:
        config: of the run.
        files: of ``config.data``, if they are open.

    Raises:
        ConfigurationError: too few episodes or steps, or no episode of the tasks.
        RunError: actions that are no numbers of a Box, or as ``open_episodes``.
        MissingPackage: as ``open_episodes``.
    """
    files = open_episodes(config.data, config.data_columns) if files is None else files
    check_learnable(files)
    chosen = np.arange(sum(file.episodes for file in files))
    if config.tasks:
        chosen = np.flatnonzero(np.isin(np.concatenate([_tasks_of(file) for file in files]), config.tasks))
        if not len(chosen):
            raise ConfigurationError(f"--tasks is {config.tasks}, and {config.data} has no episode of these")
    learned, held_out = held_out_split(len(chosen), config.held_out, config.train.seed)
    rows, window, seed = config.train.batch_size, config.train.window, config.train.seed
    source = RecordedSource(SelectedEpisodes(files, chosen[learned]), rows, window, seed)
    if not len(held_out):
        return source, None
    others = SelectedEpisodes(files, chosen[held_out])
    return source, RecordedSource(others, rows, min(window, others.steps), seed)


def _tasks_of(file: Episodes) -> np.ndarray:
    """The task of each episode, int (episodes,), by its first observation."""
    modality = file.observation_spec.modalities.get(TASK)
    if modality is None or modality.kind != "categorical" or modality.shape != (1,):
        raise ConfigurationError(
            f"--tasks chooses among recorded tasks, and {file.path} has no part 'task' with one index: leave it out"
        )
    starts = file.episode_starts
    found = [file.rows(starts[at : at + _CHUNK], 1)[OBSERVED + TASK] for at in range(0, len(starts), _CHUNK)]
    return np.concatenate(found)[:, 0, 0].astype(np.int64)


class HeldOutActions:
    """The mean loss of the actions of held-out episodes, of the same batches each time.

    Args:
        source: of these episodes.
    """

    def __init__(self, source: RecordedSource) -> None:
        self._source, self._begin = source, source.state_dict()

    @torch.no_grad()
    def __call__(self, policy: ImitationPolicy) -> float:
        """Per action. Raises RunError for values that the specs do not have."""
        self._source.load_state_dict(self._begin)
        total, count = 0.0, 0
        for _ in range(min(_BATCHES, -(-len(self._source) // self._source.batch_size))):
            batch, _ = self._source.sample()
            features, _, _ = policy(batch.observations, batch.state, batch.is_first)
            acts = batch.valid & ~batch.is_last
            losses = policy.head.loss(features[acts], batch.actions[acts])
            total, count = total + float(losses.double().sum()), count + losses.numel()
        return total / max(count, 1)


def described_run(config: ImitationRunConfig, source: Source) -> dict[str, Any]:
    """``config.json`` of a new run."""
    spaces = {"observation": source.observation_spec.to_json(), "action": source.action_spec.to_json()}
    return {"imitation": to_json(config), "spaces": to_json(spaces)}


def saved_imitation_config(run: Run) -> ImitationRunConfig:
    """Raises RunError for another kind of run, ConfigurationError for damaged settings."""
    if not isinstance(run.config.get("imitation"), dict):
        raise RunError(f"{run.folder} is a run of {run.command}, expected one of imitate")
    return from_json(ImitationRunConfig, run.config["imitation"], "imitation")


def custom_blocks(config: ImitationRunConfig) -> list[str]:
    """Names of the memory's blocks that are not the package's own, ``module:Class``."""
    return [block.block for block in config.train.policy.memory.blocks if isinstance(block, CustomBlock)]


def load_policy(run: Run, device: str = "cpu", *, trust: bool = False) -> ImitationPolicy:
    """The policy of the newest checkpoint, or of the best one for ``Run.at_best``.

    Args:
        run: of ``imitate``.
        device: as PyTorch names it.
        trust: import memory blocks that the run names also if their modules are not installed.

    Raises:
        RunError: another kind of run, no checkpoint, a damaged one, or a block that is not installed, without
            ``trust``.
        ConfigurationError: an unusable device, settings of another version, or more weights than memory.
    """
    config, where, specs = saved_imitation_config(run), usable_device(device), saved_specs(run)
    if not trust:
        check_installed(run.folder, custom_blocks(config))
    with installed_alone(run.folder, trust):
        if not custom_blocks(config):  # of which some cannot be outlined
            _check_weights(run, config, *specs)
        policy = ImitationPolicy(*specs, config.train.policy).to(where)
    run.load_weights(policy, where, PART)
    return policy.eval()


def _check_weights(run: Run, config: ImitationRunConfig, seen: ObservationSpec, done: ActionSpec) -> None:
    """Compares sizes in settings with those of the weights, before anything is allocated by them."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            outline = ImitationPolicy(seen, done, config.train.policy)
        needed = 2 * sum(tensor.nbytes for tensor in outline.state_dict().values())
    except (RuntimeError, ArithmeticError) as error:  # sizes beyond 64 bits
        raise ConfigurationError(f"ImitationPolicy: these sizes are too large: {str(error).splitlines()[0]}") from error
    if needed > machine_memory():
        raise ConfigurationError(f"ImitationPolicy: its weights need {needed:,} bytes, more than this machine has")
    run.weights_of(outline, part=PART)
