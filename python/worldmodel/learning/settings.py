"""Settings of ``python -m worldmodel train``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from worldmodel.data.replay import ReplayConfig
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.given import PREFIX, is_given
from worldmodel.environments.making import specs_of
from worldmodel.environments.registry import name_of
from worldmodel.learning.interval import Clock
from worldmodel.learning.learner import LearnerConfig
from worldmodel.learning.presets import PRESETS, Preset, choose_preset, named_preset
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.world_model import WorldModelConfig, outline
from worldmodel.runs.configuration import ConfigurationError, differences, from_json, to_json
from worldmodel.runs.fields import (
    Bounds,
    Checked,
    Count,
    Limit,
    Positive,
    Share,
    Size,
    Text,
    Threads,
    Weight,
    checked_value,
    field_hints,
)
from worldmodel.runs.run import Run, RunError

CHOSEN = "auto"  # the preset is chosen by the spaces
_OF_DATA = ("data_columns", "action_steps", "held_out")
PRESET_FIELDS = tuple(field.name for field in dataclasses.fields(Preset))
_UNSET: Any = type("Unset", (), {"__repr__": lambda self: "of the preset"})()


@dataclasses.dataclass
class TrainConfig(Checked):
    """A training run, with the defaults of ``python -m worldmodel train``.

    What is not given of ``PRESET_FIELDS`` is the preset's. Without a preset, the environment is made once, and its
    spaces choose one (``presets.choose_preset``); without an environment, it is ``popgym``. Afterwards ``preset`` is a
    name, and all fields have values.

    Raises:
        ConfigurationError: an unknown preset, a value of another type or out of bounds, or the settings of one preset
            under the name of another, as from ``dataclasses.replace(config, preset=...)``.
        UnknownEnvironment, EnvironmentFailed: where the preset is chosen by the environment.

    Example:
        >>> config = TrainConfig(env="CartPole-v1", steps=10_000)
        >>> config.preset, config.replay.window
        ('control', 64)
        >>> TrainConfig(env="CartPole-v1", preset="popgym", num_envs=8).replay.window
        312
    """

    env: Text = ""
    """Environment: a gymnasium id, module:Env-v0, a name of popgym's, or module:function, which makes one. From Python
    also the function, a class, an EnvSpec or an environment, of which copies are used; what no name stands for (a
    lambda, a closure, an instance) is for this process: see ``train(..., env=...)``."""
    env_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the environment, plain values; evaluate, imagine and --resume use them, too."""
    data: Path | None = None
    """Recorded episodes to train from instead of an environment: an .npz that `record` wrote, a folder of them, HDF5 of
    flat columns, or the folder of a Minari or LeRobot data set. Their batches are replay.batch_size rows of
    replay.window steps; what collects is not used."""
    data_columns: tuple[Text, ...] = ()
    """Columns of HDF5 that are observed, by default pixels, or features of LeRobot, by default all that begin with
    observation. Other recorded episodes have what they were recorded with."""
    action_steps: Size = 1
    """Steps of the recorded episodes that make one action, whose moves are those of all."""
    held_out: Share = 0.1
    """Share of the recorded episodes that is not learned from: losses on them are the metrics held_out/..."""
    preset: Text = CHOSEN
    """Defaults of model, learner, replay and collection; chosen by the environment's spaces if not given."""
    kinds: dict[str, Text] = dataclasses.field(default_factory=dict)
    """How parts of the observation are read, NAME=KIND or NAME=KIND:LAYOUT. Kinds: image, grid (classes), map (numbers
    on a grid), vector, categorical. Layouts: HWC, CHW (channels first), HW, FHWC and FCHW (stacked frames). The other
    parts are read by their spaces; the start of a run says how."""
    num_envs: Size = _UNSET
    """Parallel environments."""
    train_ratio: Positive = _UNSET
    """Training steps per collected step."""
    prefill: Count = _UNSET
    """Random steps before learning."""
    random_envs: Count = _UNSET
    """Environments that always act at random, for data beyond the policy's."""
    image_size: Annotated[int, Bounds(8, 4096)] | None = _UNSET
    """Most pixels per side: larger images and maps are resized, each pixel to the mean of its area. None for no
    resizing."""
    steps: Limit | None = None
    """Stop after this many steps, over all environments."""
    updates: Limit | None = None
    """Stop after this many updates."""
    minutes: Positive | None = None
    """Stop after this many minutes of training, including those before a resume."""
    clock: Clock = "wall"
    """Clock of all minutes and seconds: wall, or cpu for processor time over all threads, which another program on the
    machine does not shorten."""
    device: Text = "cpu"
    """Device of the world model: cpu, cuda, cuda:1, ..."""
    threads: Threads | None = None
    """CPU threads. By default a new run takes as many as an update keeps busy, at most PyTorch's own number, and writes
    them into its settings."""
    update_megabytes: Positive = 1024
    """Memory of an update, in MiB, about, where observations have pictures: a new run that would take more lets
    perception take fewer steps at once, and if that is not enough lowers replay.batch_size."""
    chunk_steps: Limit | None = None
    """Steps that perception takes at once in an update. By default a new run takes as many as update_megabytes allows,
    and writes them into its settings."""
    seed: Annotated[int, Bounds(0, 2**64 - 1)] = 0
    """Seed of weights, environments, actions and batches."""
    log_seconds: Positive = 5
    """Seconds between lines of metrics."""
    save_minutes: Positive = 2
    """Minutes between checkpoints."""
    open_loop_minutes: Weight = 2
    """Minutes between open-loop predictions (a picture in TensorBoard and open_loop/... metrics); more where that would
    take over 1% of the time. 0 turns them off."""
    eval_minutes: Weight = 2
    """Minutes between evaluations of the policy, of the same episodes each time (eval/... metrics); more where that
    would take over 5% of the time. RUN/best keeps the weights of the best. 0 turns them off."""
    eval_episodes: Annotated[int, Bounds(1, 10_000)] = 10
    """Episodes of an evaluation."""
    eval_env: Text | None = None
    """Environment to evaluate in, with the spaces of the training one; that one if not given."""
    eval_env_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of --eval-env."""
    environment_state: Literal["replay", "pickle"] = "replay"
    """How a checkpoint holds the environments: replay repeats each episode's seed and actions on resume; pickle is
    for environments that this cannot restore, and needs --unpickle on resume."""
    model: WorldModelConfig = _UNSET
    """The five functions."""
    learner: LearnerConfig = _UNSET
    """Losses and optimisers."""
    replay: ReplayConfig = _UNSET
    """Limits and batch shape."""

    def __post_init__(self) -> None:
        for field in ("env", "eval_env"):
            given: Any = getattr(self, field)
            if not isinstance(given, str) and given is not None:
                name, arguments = name_of(given)
                setattr(self, field, name)
                setattr(self, f"{field}_args", {**arguments, **getattr(self, f"{field}_args")})
        unset = [name for name in PRESET_FIELDS if getattr(self, name) is _UNSET]
        if unset:
            self._fill(unset)
        super().__post_init__()
        if not unset:
            self._check_preset()
        if self.eval_env_args and self.eval_env is None:
            raise ConfigurationError("TrainConfig: eval_env_args are arguments of eval_env, which is not given")
        for name in _OF_DATA if self.data is None else ():
            if (value := getattr(self, name)) != getattr(TrainConfig, name):
                raise ConfigurationError(
                    f"TrainConfig: {name} is {value!r}, which is of recorded episodes, and data is not given"
                )
        if self.random_envs > self.num_envs:
            raise ConfigurationError(
                f"TrainConfig: random_envs is {self.random_envs}, expected at least 0 and at most num_envs = "
                f"{self.num_envs}"
            )

    def without_data(self) -> "TrainConfig":
        """The same without recorded episodes and what is of them."""
        return dataclasses.replace(self, data=None, **{name: getattr(TrainConfig, name) for name in _OF_DATA})

    def _fill(self, unset: list[str]) -> None:
        for name in ("env", "env_args", "preset", "kinds"):
            checked_value(field_hints(TrainConfig)[name], getattr(self, name), f"TrainConfig: {name}")
        if self.preset == CHOSEN:
            self.preset = (
                choose_preset(self.env, *specs_of(self.env, self.kinds, self.env_args))[0] if self.env else "popgym"
            )
        preset = named_preset(self.preset)
        for name in unset:
            setattr(self, name, getattr(preset, name))

    def _check_preset(self) -> None:
        def settings(of: "Preset | TrainConfig") -> tuple[Any, ...]:
            return tuple(getattr(of, name) for name in PRESET_FIELDS)

        if self.preset in PRESETS and settings(PRESETS[self.preset]()) != settings(self):
            for name, preset in PRESETS.items():
                if settings(preset()) == settings(self):
                    raise ConfigurationError(
                        f"TrainConfig: preset is {self.preset!r} and the settings are those of {name}; make a new "
                        f"TrainConfig(env=..., preset={self.preset!r})"
                    )


_OTHERS = {
    "imitate": "a policy without a world model, for evaluate and plot",
    "train-world": "a world that stays, for play",
}
# May change on resume.
_FREE = {
    "steps",
    "updates",
    "minutes",
    "clock",
    "device",
    "threads",
    "chunk_steps",
    "log_seconds",
    "save_minutes",
    "open_loop_minutes",
    "eval_minutes",
    "eval_episodes",
    "eval_env",
    "eval_env_args",
    "environment_state",
}


def saved_config(run: Run) -> TrainConfig:
    """The run's settings.

    Raises:
        ConfigurationError: another version's do not fit.
        RunError: another command's run.
    """
    if run.command in _OTHERS:
        raise RunError(f"{run.folder} is a run of {run.command}, {_OTHERS[run.command]}; expected a run of train")
    values = run.config.get("train")
    if isinstance(values, dict):
        values = {"preset": "popgym", "image_size": None, **values}  # the defaults of earlier releases
        if values.get("data_columns") == ["pixels"]:  # the default of earlier releases, which meant ()
            del values["data_columns"]
        missing = [name for name in PRESET_FIELDS if name not in values]
        if missing and values["preset"] == CHOSEN:  # no environment is made by reading a run
            raise ConfigurationError(f"train has no {', '.join(missing)}, and its preset is {CHOSEN!r}")
    return from_json(TrainConfig, values, "train")


def saved_specs(run: Run) -> tuple[ObservationSpec, ActionSpec]:
    """Raises ConfigurationError for damaged or missing specs."""
    spaces = run.config.get("spaces")
    observation, action = (spaces.get(name) if isinstance(spaces, dict) else None for name in ("observation", "action"))
    return ObservationSpec.from_json(observation), ActionSpec.from_json(action)


def modules_of(config: TrainConfig) -> list[str]:
    """Names of environments and blocks, of which those with a colon import a module."""
    return [name for name in (config.env, config.eval_env, *blocks_of(config)) if name]


def blocks_of(config: TrainConfig) -> list[str]:
    """Names of the memory's blocks that are not the package's own, ``module:Class``."""
    return [block.block for block in config.model.memory.blocks if isinstance(block, CustomBlock)]


def changed_spaces(run: Run, observation_spec: ObservationSpec, action_spec: ActionSpec) -> list[str]:
    """A line per difference of the run's saved spaces from these."""
    saved_observation, saved_action = saved_specs(run)
    observation = saved_observation.differences(observation_spec)
    action = differences(to_json(saved_action), to_json(action_spec))
    return [f"observation.{line}" for line in observation] + [f"action.{line}" for line in action]


def acting_part(config: TrainConfig) -> str:
    """The checkpoint part with the agent's weights."""
    return "ema" if config.learner.ema else "world_model"


def check_weights(run: Run, config: TrainConfig, part: str) -> None:
    """Raises RunError or ConfigurationError if ``part`` has not the weights of ``config``; allocates none of them."""
    expected = outline(*saved_specs(run), config.model, copies=2)  # the file's and the model's
    if not blocks_of(config):  # of which some cannot be outlined
        run.weights_of(expected, part=part)


def check_fits(
    run: Run, config: TrainConfig, observation_spec: ObservationSpec, action_spec: ActionSpec, what: str
) -> None:
    """Before a world model is built: raises ConfigurationError for other spaces of ``what``, RunError for weights."""
    if changed := changed_spaces(run, observation_spec, action_spec):
        raise ConfigurationError(f"{what} is not what it was when {run.folder} began: {'; '.join(changed)}")
    if run.checkpoints:
        check_weights(run, config, "world_model")


def check_resumable(run: Run, config: TrainConfig) -> None:
    """Raises ConfigurationError if ``config`` differs from the checkpoints'."""

    def fixed(everything: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in everything.items() if name not in _FREE}
        return {**kept, "env": PREFIX} if is_given(kept["env"]) else kept  # its spaces and episodes are compared

    found = differences(fixed(to_json(saved_config(run))), fixed(to_json(config)))
    if found:
        raise ConfigurationError(
            f"the checkpoints in {run.folder} were made with another configuration: {'; '.join(found)}. Without these "
            "options the run goes on as it was; a new run can have them"
        )


def usable_device(name: str) -> torch.device:
    """The named device; raises ConfigurationError if PyTorch cannot use it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device "meta" has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device is {name!r}, which PyTorch cannot use here: {reason}") from error
    return device


def default_folder(env: str, stamp: str) -> Path:
    """Default folder of a run.

    Example:
        >>> default_folder("module:Env-v0", "20260101-120000").as_posix()
        'runs/module-Env-v0-20260101-120000'
    """
    return Path("runs") / f"{env.replace(':', '-').replace('/', '-')}-{stamp}"
