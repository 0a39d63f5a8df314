"""Settings: types and bounds of every field, the same in the constructor and from JSON."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pytest

from worldmodel.learning.settings import TrainConfig
from worldmodel.model.blocks import CustomBlock, RotaryScanBlock
from worldmodel.model.evaluation import EvaluationConfig
from worldmodel.model.memory import MemoryConfig
from worldmodel.runs.configuration import ConfigurationError, from_json, to_json
from worldmodel.runs.fields import Bounds, field_hints


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
    return kind(**({"block": "module:Class"} if kind is CustomBlock else {}) | changed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_bounds_that_the_constructor_and_json_keep(kind: type) -> None:
    fields = to_json(made(kind))
    fields.pop("kind", None) if "kind" not in field_hints(kind) else None
    assert from_json(kind, json.loads(json.dumps(fields))) == made(kind)
    for name, hint in field_hints(kind).items():
        for number, bounds in numbers(hint):
            assert bounds is not None and math.isfinite(bounds.low) and math.isfinite(bounds.high), name
            if typing.get_origin(hint) is tuple:
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
    ],
)
def test_a_block_that_cannot_be_built_is_refused_by_the_configuration(block: RotaryScanBlock, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MemoryConfig(8, (block,))


def test_lists_and_numpy_numbers_become_plain_values() -> None:
    config = MemoryConfig(np.int64(8), [RotaryScanBlock(groups=2)])  # type: ignore[arg-type]
    assert type(config.width) is int and config == MemoryConfig(8, (RotaryScanBlock(groups=2),))
    assert json.dumps(to_json(EvaluationConfig(discount=np.float32(0.5)))).count("0.5") == 1  # type: ignore[arg-type]
