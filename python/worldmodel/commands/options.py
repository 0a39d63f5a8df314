"""The command line as dataclasses."""

import argparse
import contextlib
import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from worldmodel.commands.command_line import parse
from worldmodel.data.selection import open_episodes
from worldmodel.learning.imitation_run import ImitationRunConfig, custom_blocks, saved_imitation_config
from worldmodel.learning.presets import choose_preset, summaries
from worldmodel.learning.settings import CHOSEN, TrainConfig, blocks_of, modules_of, saved_config
from worldmodel.model.blocks import BlockConfig, GatedConvBlock
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.latents import LatentConfig
from worldmodel.model.world_model import WorldModelConfig
from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.migration import MOST_BLOCKS
from worldmodel.runs.run import Run
from worldmodel.runs.trust import check_installed, installed_alone


@dataclasses.dataclass
class TrainOptions(TrainConfig):
    """Trains a world model on an environment, or on recorded episodes. Ctrl-C saves and stops.

    The preset, chosen by the environment's spaces if not given, sets the defaults of all other options. --memory and
    --latent choose kinds, whose settings become options: --memory rotary_scan,conv_lstm gives
    --model.memory.blocks.0.d-state and --model.memory.blocks.1.kernel.
    """

    env_args: tuple[str, ...] = ()  # type: ignore[assignment]
    """Arguments of the environment, NAME=VALUE ... or JSON: --env-args size=8 slippery=false. Values are JSON, else
    text."""
    eval_env_args: tuple[str, ...] = ()  # type: ignore[assignment]
    """Arguments of --eval-env, as --env-args."""
    memory: str | None = None
    """Memory blocks in order, separated by commas: rotary_scan, scan, mamba2, mamba3, delta, gated_conv, conv_lstm,
    gru, token_attention, block_scan, local_attention, memory_attention, place, none, or module:Class; KIND*N repeats
    one. The preset's settings of a kind stay. By default the preset's blocks."""
    latent: str | None = None
    """Latent: categorical, gaussian, or embedding, which is learned by predicting it, without a decoder. The preset's
    if not given."""

    run: Path | None = None
    """Folder of the new run; runs/ENV-DATE if not given."""
    resume: Path | None = None
    """Folder of a run to resume with its own settings; only limits, device and intervals may change."""
    init_from: Path | None = None
    """Folder of a run whose weights the new run starts from, where names and shapes agree, for instance to fine-tune
    on another --env. Without --preset, its settings are the defaults."""
    new_episodes: bool = False
    """With --resume: begin new episodes instead of continuing the saved ones. The run then differs from an
    uninterrupted one."""
    unpickle: bool = False
    """With --resume: read pickled environments from the checkpoint. This executes their content: only for files from
    someone you trust."""
    trust: bool = False
    """With --resume or --init-from: import the modules that the run names even if they are not installed, such as a
    file in the working directory. This executes them: only for runs of someone you trust."""


def train_options(arguments: Sequence[str]) -> tuple[TrainConfig, Path | None, dict[str, Any]]:
    """Returns ``(config, folder, how)`` for ``train``; no folder for one that a new run names itself.

    ``how["trust"]`` is whether modules that are not installed may be imported: the user asked for all, or for some.

    Raises:
        ConfigurationError: an unknown preset, no environment, contradicting options.
        RunError: there is no run to resume, or it names a module that is not installed.
    """
    arguments = _pairs_split(arguments, "--kinds")
    # The other options' defaults depend on these.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--env", "--data", "--preset", "--resume", "--init-from", "--memory", "--latent", "--eval-env"):
        first.add_argument(name, nargs="?")  # a missing value is the full parser's to report
    for name in ("--kinds", "--env-args", "--eval-env-args", "--data-columns"):
        first.add_argument(name, nargs="*", default=[])
    early, _ = first.parse_known_args(list(arguments))
    if early.resume is not None and early.init_from is not None:
        raise ConfigurationError("--init-from gives a new run its weights, and --resume goes on with a run: give one")
    begun = early.resume or (early.init_from if early.preset is None else None)
    if begun is None:
        kinds = dict(zip(early.kinds[::2], early.kinds[1::2], strict=True))
        given = environment_arguments(early.env_args)
        preset = TrainConfig.preset if early.preset is None else early.preset
        if early.data is not None and preset == CHOSEN:
            preset = _preset_for(Path(early.data), early.data_columns)
        start = TrainConfig(env=early.env or "", env_args=given, preset=preset, kinds=kinds)
    else:
        start = saved_config(Run(begun))
        if early.init_from is not None and early.env is not None and early.data is None:
            start = start.without_data()  # fine-tunes in an environment
    start = dataclasses.replace(start, model=with_kinds(start.model, early.memory, early.latent))
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    default = TrainOptions(**{**{name: getattr(start, name) for name in fields}, "env_args": (), "eval_env_args": ()})
    default.kinds = {}  # with entries, the parser makes an option of each
    if begun is None and not early.env and not early.data and early.preset is None:
        default.preset = CHOSEN  # for --help
    if early.data is not None:
        default.image_size = None
    options: TrainOptions = parse(TrainOptions, arguments, "train", default, _description())
    options.kinds = options.kinds or start.kinds
    _, given = environment_of(
        start, early.env if begun is not None and early.env != start.env else None, options.env_args
    )
    given_to_eval = start.eval_env_args if options.eval_env == start.eval_env else {}
    if options.eval_env_args:
        given_to_eval = environment_arguments(options.eval_env_args, "--eval-env-args")
    values = {name: getattr(options, name) for name in fields}
    config = TrainConfig(**{**values, "env_args": given, "eval_env_args": given_to_eval})
    how: dict[str, Any] = {"trust": options.trust}
    if begun is None:
        if options.trust:
            raise ConfigurationError("--trust is for what a run names: --resume RUN, or --init-from without --preset")
        how["trust"] = True  # all is asked for here
    elif not options.trust:
        asked = [early.env, early.eval_env, *(early.memory or "").replace("*", ",").split(",")]
        check_installed(begun, [name for name in modules_of(config) if name not in asked])
        how["trust"] = any(":" in name for name in asked if name)
    if options.resume is not None:
        if options.run is not None:
            raise ConfigurationError("--run names a new run and --resume one that exists: give one of them")
        if options.new_episodes and options.unpickle:
            raise ConfigurationError("--new-episodes needs nothing that --unpickle would read: give one of them")
        how |= {"resume": True, "new_episodes": options.new_episodes, "unpickle": options.unpickle}
        return config, options.resume, how
    if options.new_episodes or options.unpickle:
        raise ConfigurationError("--new-episodes and --unpickle say how to go on with a run: --resume is missing")
    if config.data is not None:
        if config.image_size is not None:
            raise ConfigurationError("--image-size is of environments, and recorded pictures have theirs: leave it out")
        if early.kinds:
            raise ConfigurationError("--kinds is of environments, and recorded parts have theirs: leave it out")
    elif not config.env:
        raise ConfigurationError(
            "--env is missing: a gymnasium id, module:Env-v0, module:function, or a name of popgym's; or --data"
        )
    return config, options.run, {**how, "init_from": options.init_from}


def _preset_for(data: Path, columns: Sequence[str]) -> str:
    """The preset for recorded episodes."""
    file = open_episodes(data, columns)[0]
    return choose_preset("", file.observation_spec, file.action_spec)[0]


def environment_arguments(given: Sequence[str], option: str = "--env-args") -> dict[str, Any]:
    """Arguments of an environment from NAME=VALUE, with a value in JSON or text, or from a JSON object.

    Raises:
        ConfigurationError: neither.

    Example:
        >>> environment_arguments(["size=8", "map=4x4", '{"slippery": false}'])
        {'size': 8, 'map': '4x4', 'slippery': False}
    """
    arguments: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            try:
                arguments |= json.loads(text)
            except ValueError as error:
                raise ConfigurationError(f"{option} is {text!r}, expected a JSON object: {error}") from error
        elif name and equals:
            arguments[name] = _LITERALS[value] if value in _LITERALS else _json_or_text(value)
        else:
            raise ConfigurationError(f"{option} has {text!r}, expected NAME=VALUE or a JSON object")
    return arguments


_LITERALS = {"True": True, "False": False, "None": None}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def environment_of(
    config: TrainConfig | ImitationRunConfig, env: str | None, env_args: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the environment: those of ``config`` where others are not given."""
    if env_args:
        return env or config.env, environment_arguments(env_args)
    return (config.env, config.env_args) if env is None else (env, {})


@contextlib.contextmanager
def named_environment(
    run: Run, env: str | None, env_args: Sequence[str], trust: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``environment_of`` the run; inside, what it names is imported only if it is installed, or with ``trust``.

    An ``env`` is asked for by the user. Raises NotTrusted; ConfigurationError without an environment.
    """
    config: TrainConfig | ImitationRunConfig
    if run.command == "imitate":
        config = saved_imitation_config(run)
        blocks = custom_blocks(config)
    else:
        config = saved_config(run)
        blocks = blocks_of(config)
    name, arguments = environment_of(config, env, env_args)
    if not name:
        raise ConfigurationError(f"{run.folder} learned from recorded episodes: --env names an environment to act in")
    if not trust:
        check_installed(run.folder, [*blocks, *([] if env else [name])])
    with installed_alone(run.folder, trust or env is not None):
        yield name, arguments


def _pairs_split(arguments: Sequence[str], option: str) -> list[str]:
    """``option NAME=VALUE ...`` as the pairs that the parser of a dict takes.

    Example:
        >>> _pairs_split(["--kinds", "a=image:CHW", "b=map,c=grid", "--seed", "1"], "--kinds")
        ['--kinds', 'a', 'image:CHW', 'b', 'map', 'c', 'grid', '--seed', '1']
    """
    split: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            name, _, rest = argument.partition("=")
            inside = name == option
            split.append(name if inside else argument)
            given = [rest] if inside and rest else []
        else:
            given = [argument] if inside else []
            split += [] if inside else [argument]
        for pair in ",".join(given).split(",") if given else ():
            key, equals, value = pair.partition("=")
            if not (key and equals and value):
                raise ConfigurationError(f"{option} has {pair!r}, expected NAME=VALUE")
            split += [key, value]
    return split


def _description() -> str:
    presets = "\n".join(f"  {name}: {summary}" for name, summary in summaries().items())
    return f"{inspect.getdoc(TrainOptions)}\n\nPresets:\n{presets}"


def preset_config(name: str) -> TrainConfig:
    """A preset's settings, without an environment. Raises ConfigurationError for an unknown preset."""
    return TrainConfig(preset=name)


def with_kinds(model: WorldModelConfig, memory: str | None, latent: str | None) -> WorldModelConfig:
    """Replaces the memory's blocks and the latent by named kinds.

    Raises:
        ConfigurationError: an unknown kind, or one that does not fit the memory's width.

    Example:
        >>> [block.kind for block in with_kinds(WorldModelConfig(), "rotary_scan*2,conv_lstm", None).memory.blocks]
        ['rotary_scan', 'rotary_scan', 'conv_lstm']
    """
    if memory is not None:
        known = {block.kind: block for block in reversed(model.memory.blocks)}
        blocks = blocks_named(memory, known)
        try:
            model = dataclasses.replace(model, memory=dataclasses.replace(model.memory, blocks=tuple(blocks)))
        except ValueError as error:
            raise ConfigurationError(f"--memory is {memory!r}: {error}") from error
    if latent is not None and latent != model.perception.latent.kind:
        kinds = {kind.kind: kind for kind in get_args(LatentConfig)}
        if latent not in kinds:
            raise ConfigurationError(f"--latent is {latent!r}, expected one of {', '.join(kinds)}")
        perception = dataclasses.replace(model.perception, latent=kinds[latent]())
        model = dataclasses.replace(model, perception=perception)
    return model


def blocks_named(memory: str, known: Mapping[str, BlockConfig] | None = None) -> list[BlockConfig]:
    """Blocks by ``--memory``, with the settings of those ``known`` by kind. Raises ConfigurationError."""
    return [block for text in memory.split(",") for block in _blocks(text.strip(), known or {})]


def _blocks(text: str, known: Mapping[str, BlockConfig]) -> list[BlockConfig]:
    name, star, times = text.partition("*")
    kinds = {kind.kind: kind for kind in get_args(BlockConfig) if kind is not CustomBlock}
    if not (star == "" or (times.isdecimal() and 1 <= int(times) <= MOST_BLOCKS)):
        raise ConfigurationError(f"--memory has {text!r}, expected KIND*N with N from 1 to {MOST_BLOCKS}")
    if name == "none":
        block: BlockConfig = GatedConvBlock(d_conv=1)
    elif ":" in name:
        block = CustomBlock(name)
    elif name in kinds:
        block = known.get(name) or kinds[name]()
    else:
        raise ConfigurationError(f"--memory has {name!r}, expected {', '.join(kinds)}, none or module:Class")
    return [block] * int(times or 1)
