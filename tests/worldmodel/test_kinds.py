"""How parts of observations are read: kinds, layouts, and what is refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import random_batch, small_model

from worldmodel.acting.agent import Agent
from worldmodel.commands.options import train_options
from worldmodel.data.spaces import ActionSpec, Modality, ObservationSpec
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.model.codecs import StandardisedCodec
from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.migration import upgrade_config


def pixels(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def only(space: Any, kind: Any = None, first: Any = None) -> Modality:
    example = None if first is None else lambda: np.asarray(first)
    (modality,) = ObservationSpec.from_space(space, kind and {"observation": kind}, example).modalities.values()
    return modality


BRIGHT, DARK = np.full((10, 10, 3), 200, np.uint8), np.full((10, 10, 3), 9, np.uint8)
PLANES = np.eye(4, dtype=np.float32)[np.arange(64).reshape(8, 8) % 4]


@pytest.mark.parametrize(
    ("space", "first", "kind", "shape", "layout"),
    [
        (pixels(84, 84), None, "image", (84, 84, 1), "HW"),
        (pixels(84, 84, 4), None, "image", (84, 84, 4), "HWC"),
        (pixels(4, 84, 84), None, "image", (84, 84, 4), "CHW"),
        (pixels(12, 64, 64), None, "image", (64, 64, 12), "CHW"),
        (pixels(2, 210, 160), None, "image", (210, 160, 2), "CHW"),
        (pixels(210, 160, 3), None, "image", (210, 160, 3), "HWC"),
        (pixels(4, 84, 84, 3), None, "image", (84, 84, 12), "FHWC"),
        (pixels(4, 3, 84, 84), None, "image", (84, 84, 12), "FCHW"),
        (pixels(7, 7, 3), DARK[:7, :7], "grid", (7, 7, 3), "HWC"),
        (pixels(10, 10, 3), DARK, "grid", (10, 10, 3), "HWC"),
        (pixels(10, 10, 3), BRIGHT, "image", (10, 10, 3), "HWC"),
        (pixels(3, 10, 10), BRIGHT.transpose(2, 0, 1), "image", (10, 10, 3), "CHW"),
        (spaces.Box(0, 1, (84, 84, 3)), None, "image", (84, 84, 3), "HWC"),
        (spaces.Box(0, 1, (3, 64, 64)), None, "image", (64, 64, 3), "CHW"),
        (spaces.Box(0, 1, (64, 48)), None, "image", (64, 48, 1), "HW"),
        (spaces.Box(0, 255, (64, 64, 3), np.float32), None, "image", (64, 64, 3), "HWC"),
        (spaces.Box(0, 255, (64, 64, 3), np.int32), None, "image", (64, 64, 3), "HWC"),
        (spaces.Box(-1, 1, (1, 32, 32)), None, "image", (32, 32, 1), "CHW"),
        (spaces.Box(0, 1, (8, 8, 4)), PLANES, "grid", (8, 8, 4), "HWC"),
        (spaces.Box(0, 1, (8, 8, 4)), PLANES / 2, "image", (8, 8, 4), "HWC"),
        (spaces.Box(0, 1, (8, 8, 4)), PLANES * 0, "image", (8, 8, 4), "HWC"),
        (spaces.Box(0, 1, (10, 10, 6), bool), None, "grid", (10, 10, 6), "HWC"),
        (spaces.Box(0, 1, (17, 19, 19), np.int8), None, "grid", (19, 19, 17), "CHW"),
        (spaces.Box(-1, 1, (6, 7), np.int8), None, "grid", (6, 7, 1), "HW"),
        (spaces.Box(0, 11, (4, 4), np.int64), None, "grid", (4, 4, 1), "HW"),
        (spaces.MultiBinary((6, 7, 2)), None, "grid", (6, 7, 2), "HWC"),
        (spaces.MultiDiscrete(np.full((3, 3), 3)), None, "grid", (3, 3, 1), "HW"),
        (spaces.MultiDiscrete([3, 4]), None, "categorical", (2,), ""),
        (spaces.Box(0, 2**17, (4, 4), np.int64), None, "vector", (16,), ""),
        (spaces.Box(-np.inf, np.inf, (4, 17)), None, "vector", (68,), ""),
        (spaces.Box(0, 1, (4, 17)), None, "vector", (68,), ""),
        (pixels(128), None, "vector", (128,), ""),
        (spaces.Box(-np.inf, np.inf, (2, 32, 32)), None, "map", (32, 32, 2), "CHW"),
        (spaces.Box(-3, 3, (11, 11, 4)), None, "map", (11, 11, 4), "HWC"),
    ],
)
def test_a_space_is_read_by_the_rules(space: Any, first: Any, kind: str, shape: tuple[int, ...], layout: str) -> None:
    modality = only(space, None, first)
    assert (modality.kind, modality.shape, modality.layout) == (kind, shape, layout)
    assert modality.kind in modality.description and str(space.shape) in modality.description
    spec = ObservationSpec.from_space(space, None, None if first is None else lambda: first)
    assert ObservationSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert ObservationSpec.from_space(space, spec) == spec  # as saved, without an example
    space.seed(0)
    encoded = spec.encode(space.sample() if first is None else first)["observation"]
    assert encoded.shape == shape and encoded.dtype == modality.dtype


@pytest.mark.parametrize(
    ("layout", "moved"),
    [("HWC", (0, 1, 2, 3)), ("CHW", (0, 3, 1, 2)), ("FHWC", (0, 1, 2, 3)), ("FCHW", (0, 3, 1, 2))],
)
def test_every_layout_puts_each_value_in_its_place(layout: str, moved: tuple[int, ...]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), np.uint8)  # frames, height, width, channels
    given = frames.transpose(moved)
    expected = np.concatenate(list(frames), -1) if layout[0] == "F" else frames[0]
    given = given if layout[0] == "F" else given[0]
    spec = ObservationSpec.from_space(pixels(*given.shape), {"observation": f"image:{layout}"})
    np.testing.assert_array_equal(spec.encode(given)["observation"], expected)
    np.testing.assert_array_equal(spec.encode_batch(np.stack([given] * 2))["observation"][1], expected)


def test_pixels_of_any_range_become_256_levels() -> None:
    levels = np.arange(256, dtype=np.float32).reshape(16, 16)
    for space, given in (
        (spaces.Box(0, 1, (16, 16)), levels / 255),
        (spaces.Box(-1, 1, (16, 16)), levels / 127.5 - 1),
        (spaces.Box(0, 255, (16, 16)), levels),
        (spaces.Box(0, 255, (16, 16), np.int32), levels.astype(np.int32)),
    ):
        encoded = ObservationSpec.from_space(space).encode(given)["observation"]
        np.testing.assert_array_equal(encoded[..., 0], levels.astype(np.uint8))


@pytest.mark.parametrize(
    ("space", "kind", "message"),
    [
        (
            pixels(10, 10, 3),
            "imgae",
            "is 'imgae', expected categorical, vector, image, grid, map, or KIND:",
        ),
        (pixels(10, 10, 3), "image:HW", "expected .* a layout for its 3 dimensions, HWC or CHW"),
        (pixels(10, 10, 3), "vector:HWC", "expected no layout: a vector has none"),
        (pixels(10), "image", "cannot be read as 'image': it needs 2 to 4 dimensions"),
        (spaces.Discrete(3), "image", "cannot be read as 'image': it needs 2 to 4 dimensions"),
        (spaces.Box(-np.inf, np.inf, (8, 8, 2)), "image", "has no bounds that could be black and white; map reads it"),
        (spaces.Box(0, 1, (3,)), "categorical", "its values are not whole numbers within bounds"),
        (spaces.Box(-9, 9, (8, 8), np.float32), "categorical", "not whole numbers"),
        (
            spaces.Box(np.arange(300, dtype=np.int16), np.arange(1, 301, dtype=np.int16), (300,), np.int16),
            "image",
            r"is Box\(.*\.\.\., which cannot be read",
        ),
        (spaces.Box(0, 0.5, (8, 8)), "grid", "its values are not 2 to 4,096 whole numbers"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(space: Any, kind: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as refused:
        only(space, kind)
    assert len(str(refused.value).splitlines()) == 1


def test_a_kind_is_honoured_for_every_space() -> None:
    assert only(spaces.Discrete(1000, start=5), "vector").kind == "vector"
    assert only(spaces.Box(2, 9, (3,), np.int16), "categorical").sizes == (8, 8, 8)
    assert only(pixels(7, 7, 3), "image").kind == "image" and only(pixels(7, 7, 3), "grid").sizes == (256,) * 3
    assert only(pixels(84, 84, 3), "map").dtype == "float32"
    assert only(pixels(3, 5, 7), "image:HWC").shape == (3, 5, 7)


CASES = [
    (pixels(4, 84, 84), np.zeros((84, 84, 4), np.uint8), r"shape \(84, 84, 4\), .*\(4, 84, 84\), uint8 from 0 to 255"),
    (pixels(4, 84, 84), np.zeros((4, 84, 84), np.float32), "dtype float32 and values from 0 to 0, expected .* uint8"),
    (pixels(4, 84, 84), np.zeros((2, 4, 84, 84), np.uint8), r"shape \(2, 4, 84, 84\), expected shape \(4, 84, 84\)"),
    (pixels(84, 84), np.full((84, 84), 256), "values from 256 to 256, expected .* from 0 to 255"),
    (spaces.Box(0, 1, (64, 64, 3)), np.full((64, 64, 3), 200, np.uint8), "from 200 to 200, .*float32 from 0 to 1"),
    (spaces.Box(0, 1, (64, 64, 3)), np.full((64, 64, 3), np.nan), "values from nan to nan, expected .* from 0 to 1"),
    (spaces.Box(0, 1, (3, 64, 64)), np.zeros((64, 64, 3)), r"has shape \(64, 64, 3\), expected shape \(3, 64, 64\)"),
    (spaces.Box(-1, 1, (6, 7), np.int8), np.full((6, 7), 2), "values from 3 to 3, expected classes below 3"),
    (spaces.Box(-1, 1, (6, 7), np.int8), np.zeros((6, 7)), "dtype float64 .*, expected shape .*int8 from -1 to 1"),
    (spaces.Discrete(4), 1.5, "dtype float64 .*, expected .* from 0 to 3"),
    (spaces.Discrete(4), "three", "dtype <U5, expected"),
    (spaces.Box(-1, 1, (2,)), [[0.0], [0.0]], r"shape \(2, 1\), expected shape \(2,\), float32, finite"),
    (spaces.Box(-1, 1, (2,)), [np.inf, 0.0], "holds NaN or infinity"),
    (spaces.Box(-1, 1, (2,)), [1e300, 0.0], "holds NaN or infinity"),
    (spaces.Box(-1, 1, (2,)), [1j, 0.0], "dtype complex128, expected"),
    (spaces.Box(-1, 1, (2,)), [[0.0, 1.0], [0.0]], "is a list: .* expected shape"),
]


@pytest.mark.parametrize(("space", "observation", "message"), CASES)
def test_what_a_world_model_was_not_trained_on_is_refused(space: Any, observation: Any, message: str) -> None:
    for spec, given, name in (
        (ObservationSpec.from_space(space), observation, "observation"),
        (ObservationSpec.from_space(spaces.Dict(eye=space)), {"eye": observation}, "eye"),
    ):
        with pytest.raises(ValueError, match=f"^observation '{name}' .*{message}") as refused:
            spec.encode(given)
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"observation has no part 'eye' .*, expected shape"):
        spec.encode({})


def test_an_agent_refuses_it_and_batches_in_other_layouts() -> None:
    space = pixels(3, 16, 16)
    model = small_model(seen=space, dtype=torch.float32)
    agent = Agent(model, ObservationSpec.from_space(space), ActionSpec.from_space(spaces.Discrete(3)))
    frame = np.zeros((3, 16, 16), np.uint8)
    agent.act(frame)
    agent.act(frame.astype(np.int64))
    for wrong in (frame.transpose(1, 2, 0), frame / 255, frame[None], np.full((3, 16, 16), np.nan)):
        with pytest.raises(ValueError, match=r"observation 'observation' has .*expected shape \(3, 16, 16\), uint8"):
            agent.act(wrong)
    encoded = {"observation": np.zeros((2, 16, 16, 3), np.uint8)}
    agent.act_encoded(encoded, None, np.ones(2, bool))
    for other in (np.zeros((2, 3, 16, 16), np.uint8), np.full((2, 16, 16, 3), 0.5), np.zeros((1, 16, 16, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"^Agent.act_encoded: observations\['observation'\] has"):
            agent.act_encoded({"observation": other}, None, np.ones(2, bool))


@pytest.mark.parametrize("kind", ["image", "grid", "map", "vector"])
def test_a_picture_is_learned_from_as_each_kind(kind: str) -> None:
    space = spaces.Box(0, 7, (2, 6, 6), np.uint8)
    spec = ObservationSpec.from_space(space, {"observation": kind})
    model = small_model(dtype=torch.float32)
    model = type(model)(spec, ActionSpec.from_space(spaces.Discrete(3)), model.config)
    batch = random_batch(model, batch=2, time=8)
    losses = []
    optimizer = torch.optim.Adam(model.perception.parameters(), 1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.perception.reconstruction_loss(model.observe(batch).latent, batch.observations).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for codec in model.perception.codecs for p in codec.parameters())
    decoded = model.perception.reconstruct(model.observe(batch).latent)["observation"]
    assert decoded.shape == batch.observations["observation"].shape


def test_a_map_is_standardised_per_channel() -> None:
    spec = ObservationSpec.from_space(spaces.Box(-np.inf, np.inf, (5, 6, 2)))
    codec = small_model(seen=spaces.Box(-np.inf, np.inf, (5, 6, 2)), dtype=torch.float32).perception.codecs[0]
    assert isinstance(codec, StandardisedCodec) and spec.modalities["observation"].kind == "map"
    numbers = torch.randn(50, 5, 6, 2) * torch.tensor([0.1, 3.0]) + torch.tensor([5.0, -1.0])
    codec.update(codec.moments(numbers)[None])
    standard = codec.standardised(numbers)
    torch.testing.assert_close(standard.mean((0, 1, 2)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std((0, 1, 2)), torch.ones(2), atol=1e-2, rtol=0)
    torch.testing.assert_close(codec.restored(standard), numbers, atol=1e-4, rtol=1e-4)


class Frames:
    """An environment of small pictures, dark or bright at its first step."""

    spec = None

    def __init__(self, value: int) -> None:
        self.observation_space, self.action_space = pixels(10, 10, 3), spaces.Discrete(2)
        self.value, self.unwrapped, self.resets = value, self, []

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.resets.append(seed)
        return np.full((10, 10, 3), self.value, np.uint8), {}


def test_an_environment_is_looked_at_where_its_space_does_not_tell() -> None:
    def made(value: int, **options: Any) -> tuple[Frames, VectorEnvironment]:
        frames = Frames(value)
        return frames, VectorEnvironment([frames], lambda episode: 7 + episode, **options)  # type: ignore[list-item]

    frames, running = made(200)
    assert running.observation_spec.modalities["observation"].kind == "image" and frames.resets == [7]
    with pytest.raises(ConfigurationError, match="the first observation has no part 'eye'"):
        ObservationSpec.from_space(spaces.Dict(eye=pixels(10, 10, 3)), None, dict)
    frames, again = made(0, kinds=running.observation_spec)  # a saved run's
    assert again.observation_spec == running.observation_spec and frames.resets == [7]
    assert made(0)[1].observation_spec.modalities["observation"].kind == "grid"
    assert made(0, kinds={"observation": "vector"})[1].observation_spec.modalities["observation"].kind == "vector"


def test_kinds_are_an_option_and_a_setting() -> None:
    given = ["--env", "CartPole-v1", "--preset", "popgym", "--kinds", "a=image:CHW", "b/0=map", "--seed", "3"]
    config = train_options(given)[0]
    assert config.kinds == {"a": "image:CHW", "b/0": "map"} and config.seed == 3
    assert train_options([*given[:4], "--kinds=a=image"])[0].kinds == {"a": "image"}
    with pytest.raises(ConfigurationError, match="--kinds has 'image', expected NAME=VALUE"):
        train_options([*given[:4], "--kinds", "image"])


def test_pictures_of_earlier_runs_are_read_as_they_were() -> None:
    old = {"kind": "image", "shape": [40, 30, 3], "dtype": "uint8", "path": [], "sizes": [], "starts": []}
    saved = {"spaces": {"observation": {"modalities": {"eye": {**old, "channels_first": True}}, "dropped": []}}}
    spec = ObservationSpec.from_json(upgrade_config(saved)["spaces"]["observation"])
    frame = np.random.default_rng(0).integers(0, 256, (3, 40, 30), np.uint8)
    eye = {"eye": spec.modalities["eye"]}
    path = dataclasses.replace(eye["eye"], path=("eye",))
    spec = dataclasses.replace(spec, modalities={"eye": path})
    np.testing.assert_array_equal(spec.encode({"eye": frame})["eye"], frame.transpose(1, 2, 0))
    with pytest.raises(ValueError, match=r"has shape \(40, 30, 3\), expected shape \(3, 40, 30\)"):
        spec.encode({"eye": frame.transpose(1, 2, 0)})
    now = ObservationSpec.from_space(spaces.Dict(eye=pixels(3, 40, 30)), spec)
    assert not spec.differences(now)
    other = ObservationSpec.from_space(spaces.Dict(eye=pixels(3, 40, 31)), spec)
    assert spec.differences(other) == ["modalities.eye.shape.1 is 30 there and 31 here"]
