"""Settings: types and bounds of every field, the same in the constructor and from JSON."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from gymnasium import spaces

from worldmodel.commands.options import train_options
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.learning.presets import PRESETS, choose_preset, preset_notice, summaries
from worldmodel.learning.settings import CHOSEN, PRESET_FIELDS, TrainConfig, saved_config
from worldmodel.learning.trainer import Trainer
from worldmodel.model.block import Block
from worldmodel.model.blocks import Mamba2Block, Mamba3Block, RotaryScanBlock
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.evaluation import EvaluationConfig
from worldmodel.model.memory import MemoryConfig
from worldmodel.runs.configuration import ConfigurationError, from_json, to_json
from worldmodel.runs.fields import Bounds, field_hints
from worldmodel.runs.run import Run


def numbers(hint: Any, bounds: Bounds | None = None) -> Iterator[tuple[Any, Bounds | None]]:
    """The numbers in an annotation, each with its bounds."""
    if typing.get_origin(hint) is Annotated:
        yield from numbers(typing.get_args(hint)[0], hint.__metadata__[0])
    elif hint in (int, float):
        yield hint, bounds
    elif not dataclasses.is_dataclass(hint):
        for inner in typing.get_args(hint):
            yield from numbers(inner)


def configs(hint: Any) -> Iterator[type]:
    """All dataclasses reachable from an annotation."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
        for inner in field_hints(hint).values():
            yield from configs(inner)
    else:
        for inner in typing.get_args(hint):
            yield from configs(inner)


KINDS = sorted(set(configs(TrainConfig)), key=lambda kind: kind.__name__)


def made(kind: type, **changed: Any) -> Any:
    needed = {CustomBlock: {"block": "module:Class"}, TrainConfig: {"preset": "popgym"}}.get(kind, {})
    return kind(**needed | changed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_bounds_that_the_constructor_and_json_keep(kind: type) -> None:
    fields = to_json(made(kind))
    fields.pop("kind", None) if "kind" not in field_hints(kind) else None
    assert from_json(kind, json.loads(json.dumps(fields))) == made(kind)
    for name, hint in field_hints(kind).items():
        for number, bounds in numbers(hint):
            assert bounds is not None and math.isfinite(bounds.low) and math.isfinite(bounds.high), name
            if tuple in map(typing.get_origin, (hint, *typing.get_args(hint))):
                continue
            step = 1 if number is int else 1e-3
            wrong = [bounds.low - step, bounds.high * 2, math.nan, math.inf, True, "3", [1], {}]
            wrong += [bounds.low] * bounds.above + [bounds.high] * bounds.below + [1.5] * (number is int)
            for value in wrong:
                with pytest.raises(ConfigurationError, match=rf"^{kind.__name__}: {name} is .*, expected a "):
                    made(kind, **{name: value})
                with pytest.raises(ConfigurationError, match=rf"^here\.{name} is .*, expected a "):
                    from_json(kind, {**fields, name: value}, "here")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], r"train is \[\], expected the fields of TrainConfig"),
        ({"env": 3}, "train.env is 3, expected text"),
        ({"env": "x" * 5000}, "train.env has 5,000 characters, expected at least 0 and at most 4,096"),
        ({"environment_state": ["replay"]}, "train.environment_state is .*, expected 'replay' or 'pickle'"),
        ({"model": {"memory": {"blocks": "gru"}}}, "train.model.memory.blocks is 'gru', expected a list"),
        ({"model": {"memory": {"blocks": [{"kind": ["gru"]}]}}}, r"blocks\.0 is of kind \['gru'\], expected a kind"),
        ({"model": {"memory": {"blocks": [{"kind": "custom"}]}}}, r"blocks\.0 has no block, which CustomBlock needs"),
        ({"model": {"memory": {"blocks": [{"kind": "gru"}] * 10_000}}}, "blocks has 10,000 entries, expected at least"),
        ({"model": {"memory": {"blocks": [{"kind": "custom", "block": 1}]}}}, r"blocks\.0\.block is 1, expected text"),
        (
            {"model": {"memory": {"blocks": [{"kind": "custom", "block": "a:B", "options": {"x": math.nan}}]}}},
            r"blocks\.0\.options\['x'\] is nan, expected plain values",
        ),
        (
            {"model": {"memory": {"blocks": [{"kind": "conv_lstm", "map_size": [4]}]}}},
            r"blocks\.0\.map_size is \[4\], expected 2 entries",
        ),
        ({"model": {"perception": {"latent": None}}}, "latent is None, expected a kind among categorical, gaussian"),
        ({"model": {"perception": {"latent": {"kind": "gaussian", "stochastic": 1}}}}, "is 1, expected true or false"),
        ({"replay": {"burn_in": 300}}, "train.replay: ReplayConfig: burn_in is 300, expected at least 0 and below"),
    ],
)
def test_json_of_other_types_is_refused_in_one_line(fields: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as refused:
        from_json(TrainConfig, fields, "train")
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (RotaryScanBlock(d_state=3), "d_state is 3, expected an even number"),
        (RotaryScanBlock(groups=5), "expand is 2 and groups 5, expected groups to divide the 16 inner channels"),
        (RotaryScanBlock(expand=0.01), "expected at least one of the 0 inner channels"),
        (Mamba2Block(headdim=5), "headdim is 5, expected a divisor of the 16 inner channels"),
        (Mamba2Block(headdim=8, groups=4), "groups is 4, expected a divisor of the 2 heads"),
        (Mamba3Block(headdim=8, rope_fraction=0.75), "rope_fraction is 0.75, expected 0.5 or 1"),
        (Mamba3Block(d_state=3, headdim=8), "d_state is 3, expected at least 4"),
    ],
)
def test_a_block_that_cannot_be_built_is_refused_by_the_configuration(block: Block, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MemoryConfig(8, (block,))


def test_lists_and_numpy_numbers_become_plain_values() -> None:
    config = MemoryConfig(np.int64(8), [RotaryScanBlock(groups=2)])  # type: ignore[arg-type]
    assert type(config.width) is int and config == MemoryConfig(8, (RotaryScanBlock(groups=2),))
    assert json.dumps(to_json(EvaluationConfig(discount=np.float32(0.5)))).count("0.5") == 1  # type: ignore[arg-type]


ALIKE: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"preset": "popgym"}, ["--preset", "popgym"]),
    ({"preset": "control", "steps": 9, "num_envs": 3}, ["--preset", "control", "--steps", "9", "--num-envs", "3"]),
    ({"kinds": {"observation": "map"}}, ["--kinds", "observation=map"]),
]


@pytest.mark.parametrize(("given", "options"), ALIKE)
def test_the_constructor_has_the_defaults_of_the_command_line(given: dict[str, Any], options: list[str]) -> None:
    env = "worldmodel/HiddenBall-v0" if "kinds" in given else "CartPole-v1"
    config = TrainConfig(env=env, **given)
    assert config == train_options(["--env", env, *options])[0]
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
    preset = PRESETS[config.preset]()
    assert all(getattr(config, name) == getattr(preset, name) for name in PRESET_FIELDS if name not in given)


@pytest.mark.parametrize(
    ("env", "observation", "action", "preset"),
    [
        ("Env-v0", spaces.Box(-1, 1, (3,)), spaces.Discrete(4), "control"),
        ("Env-v0", spaces.Box(-1, 1, (3,)), spaces.Discrete(40), "popgym"),
        ("Env-v0", spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), "continuous"),
        ("popgym-PositionOnlyCartPoleEasy-v0", spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "popgym"),
        ("Env-v0", spaces.Dict(a=spaces.Box(-1, 1, (3,)), b=spaces.Discrete(2)), spaces.Discrete(2), "popgym"),
        ("Env-v0", spaces.Box(0, 255, (7, 7, 3), np.uint8), spaces.Discrete(2), "grid"),
        ("Env-v0", spaces.Dict(a=spaces.Box(0, 9, (7, 7, 3), np.uint8)), spaces.Box(-1, 1, (2,)), "grid"),
        ("worldmodel/MemoryLength-v0", spaces.Box(-1, 1, (3,)), spaces.Discrete(2), "popgym"),
        ("Env-v0", spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.Discrete(2), "pixels"),
    ],
)
def test_the_spaces_choose_the_preset_and_a_run_says_so(env: str, observation: Any, action: Any, preset: str) -> None:
    specs = ObservationSpec.from_space(observation), ActionSpec.from_space(action)
    chosen, reason = choose_preset(env, *specs)
    assert chosen == (preset if preset in PRESETS else "popgym")
    said = preset_notice(chosen, env, *specs)
    assert said.startswith(f"preset {chosen} (") and reason in said and "--preset chooses another: " in said
    assert preset_notice("moving", env, *specs).endswith(f"{reason}, {chosen} would be the default")


def test_a_constructor_refuses_a_preset_that_it_cannot_honour() -> None:
    with pytest.raises(
        ConfigurationError, match=r"no preset 'huge', expected one of popgym \(.*\); control \("
    ) as error:
        TrainConfig(env="CartPole-v1", preset="huge")
    assert len(str(error.value).splitlines()) == 1 and all(name in str(error.value) for name in PRESETS)
    config = TrainConfig(preset="popgym")
    with pytest.raises(ConfigurationError, match="preset is 'control' and the settings are those of popgym"):
        dataclasses.replace(config, preset="control")
    assert dataclasses.replace(config, steps=3).steps == 3
    with pytest.raises(ConfigurationError, match="TrainConfig: kinds is 3, expected a dict"):
        TrainConfig(env="CartPole-v1", kinds=3)  # type: ignore[arg-type]


def test_reading_a_run_makes_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldmodel.learning.settings.specs_of", lambda *_: pytest.fail("an environment is made"))
    written = to_json(TrainConfig(preset="control"))
    run = Run.create(tmp_path / "run", {"train": {**written, "env": "nowhere:Env-v0"}})
    assert saved_config(run).preset == "control"
    run.config["train"] = {"env": "nowhere:Env-v0"}
    assert saved_config(run) == TrainConfig(env="nowhere:Env-v0", preset="popgym")  # as earlier releases
    run.config["train"] = {"env": "nowhere:Env-v0", "preset": CHOSEN}
    with pytest.raises(ConfigurationError, match=r"train has no model, .*, and its preset is 'auto'"):
        saved_config(run)


def test_help_lists_the_presets_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_options(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {line}" in said for name, line in summaries().items()) and set(summaries()) == set(PRESETS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"decision": {"gradient": "all_action"}}}, "gradient is 'all_action' for continuous actions"),
        ({"replay": {"max_megabytes": 1e-3}}, "max_megabytes is 0.001, expected at least"),
        ({"device": "meta"}, "device is 'meta', which PyTorch cannot use here"),
    ],
)
def test_settings_that_do_not_fit_the_environment_are_errors_of_configuration(changes: Any, message: str) -> None:
    written = to_json(TrainConfig(env="Pendulum-v1", num_envs=1))
    for name, inside in changes.items():
        written[name] = inside if isinstance(inside, str) else {**written[name], **inside}
    with pytest.raises(ConfigurationError, match=message):
        Trainer(from_json(TrainConfig, written))
