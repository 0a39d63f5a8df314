import json
import logging

import gymnasium as gym
import minigrid  # noqa: F401 (registers its environments)
import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldmodel.data.spaces import ActionSpec, ObservationSpec

NESTED = spaces.Dict(
    card=spaces.Discrete(4, start=2),
    hand=spaces.MultiDiscrete([[3, 5], [2, 300]]),
    lights=spaces.MultiBinary([2, 3]),
    body=spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
    pair=spaces.Tuple(
        [spaces.Box(0, 255, (32, 24, 3), np.uint8), spaces.Dict(frame=spaces.Box(0, 255, (3, 40, 30), np.uint8))]
    ),
    gray=spaces.Box(0, 255, (16, 20), np.uint8),
)


def test_leaves_have_the_kind_shape_and_dtype_of_their_space():
    found = {
        name: (modality.kind, modality.shape, modality.dtype)
        for name, modality in ObservationSpec.from_space(NESTED).modalities.items()
    }
    assert found == {
        "card": ("categorical", (1,), "uint8"),
        "hand": ("categorical", (4,), "int32"),
        "lights": ("categorical", (6,), "uint8"),
        "body": ("vector", (6,), "float32"),
        "pair/0": ("image", (32, 24, 3), "uint8"),
        "pair/1/frame": ("image", (40, 30, 3), "uint8"),
        "gray": ("image", (16, 20, 1), "uint8"),
    }


def test_every_value_of_a_space_is_encoded_alone_as_in_a_batch():
    spec = ObservationSpec.from_space(NESTED)
    NESTED.seed(0)
    samples = [NESTED.sample() for _ in range(5)]
    batch = gym.vector.utils.create_empty_array(NESTED, 5)
    batch = gym.vector.utils.concatenate(NESTED, samples, batch)
    together = spec.encode_batch(batch)
    for index, sample in enumerate(samples):
        alone = spec.encode(sample)
        for name, modality in spec.modalities.items():
            assert alone[name].shape == modality.shape and alone[name].dtype == modality.dtype
            np.testing.assert_array_equal(together[name][index], alone[name])
    first = spec.encode(samples[0])
    assert first["card"] == samples[0]["card"] - 2
    np.testing.assert_array_equal(first["hand"], samples[0]["hand"].ravel())
    np.testing.assert_array_equal(first["pair/1/frame"], samples[0]["pair"][1]["frame"].transpose(1, 2, 0))


def test_a_space_without_keys_is_one_leaf():
    assert list(ObservationSpec.from_space(spaces.Discrete(4)).modalities) == ["observation"]


def test_minigrid_views_are_classes_and_its_mission_is_left_out(caplog):
    environment = gym.make("MiniGrid-MemoryS9-v0", agent_view_size=3)
    with caplog.at_level(logging.INFO):
        spec = ObservationSpec.from_space(environment.observation_space)
    assert {name: (modality.kind, modality.shape) for name, modality in spec.modalities.items()} == {
        "direction": ("categorical", (1,)),
        "image": ("grid", (3, 3, 3)),
    }
    assert spec.dropped == ("mission",) and "'mission' is text" in caplog.text
    assert "mission: text, which is left out" in spec.description()
    observation, _ = environment.reset(seed=0)
    np.testing.assert_array_equal(spec.encode(observation)["image"], observation["image"])


def test_a_kind_can_be_chosen():
    space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    assert ObservationSpec.from_space(space, {"observation": "image"}).modalities["observation"].kind == "image"
    assert ObservationSpec.from_space(space, {"observation": "vector"}).modalities["observation"].shape == (192,)


def test_specs_come_back_from_json():
    spec = ObservationSpec.from_space(NESTED)
    assert ObservationSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    for space in (spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 5]), spaces.Box(-1, 2, (2,))):
        actions = ActionSpec.from_space(space)
        assert ActionSpec.from_json(json.loads(json.dumps(actions.to_json()))) == actions


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([[2, 5], [3, 2]]),
        spaces.MultiBinary(3),
        spaces.Box(np.float32([-2, 0]), np.float32([2, 10])),
        spaces.Box(0, 9, (2, 2), np.int32),
    ],
    ids=repr,
)
def test_actions_are_of_the_space_and_survive_encoding(space):
    spec = ActionSpec.from_space(space)
    actions = spec.sample(np.random.default_rng(0), 6, 4)
    assert actions.shape == (6, 4, *spec.shape) and actions.dtype == spec.dtype
    assert spec.zeros(2).shape == (2, *spec.shape)
    encoded = spec.encode(torch.as_tensor(actions))
    assert encoded.shape == (6, 4, spec.width) and encoded.dtype == torch.float32
    np.testing.assert_array_equal(spec.decode(encoded).numpy(), actions)
    given = spec.to_env(actions)
    assert given.shape == (6, 4, *space.shape) and given.dtype == space.dtype
    for action in given.reshape(-1, *space.shape):
        assert space.contains(action if space.shape else space.dtype.type(action))


def test_a_box_of_actions_is_scaled_and_clipped():
    spec = ActionSpec.from_space(spaces.Box(np.float32([-2, 0]), np.float32([2, 10])))
    given = spec.to_env(np.float32([[-1, -1], [1, 1], [0, 0], [5, -5]]))
    np.testing.assert_allclose(given, [[-2, 0], [2, 10], [0, 5], [2, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ObservationSpec.from_space(spaces.Text(5)), "holds nothing but text"),
        (lambda: ObservationSpec.from_space(spaces.Sequence(spaces.Discrete(2))), "is a Sequence .* not supported"),
        (lambda: ObservationSpec.from_space(spaces.Discrete(2), {"card": "vector"}), r"kinds names \['card'\]"),
        (
            lambda: ObservationSpec.from_space(spaces.Box(0, 1, (3,)), {"observation": "image"}),
            "cannot be read as 'image'",
        ),
        (
            lambda: ObservationSpec.from_space(spaces.Discrete(4)).encode(4),
            "values from 4 to 4, expected classes below",
        ),
        (
            lambda: ObservationSpec.from_space(spaces.Box(0, 255, (7, 7, 3), np.uint8)).encode(np.full((7, 7, 3), 99)),
            "values from 99 to 99, expected classes .*reads it as pixels",
        ),
        (lambda: ObservationSpec.from_space(spaces.Box(-1, 1, (2,))).encode([0.0, np.nan]), "NaN or infinity"),
        (
            lambda: ObservationSpec.from_space(spaces.Box(-1, 1, (2,))).encode([0.0]),
            r"has shape \(1,\), expected shape \(2,\), float32, finite",
        ),
        (lambda: ActionSpec.from_space(spaces.Box(-np.inf, 1, (2,))), "no finite bounds"),
        (lambda: ActionSpec.from_space(spaces.Text(3)), "is not supported, expected Discrete"),
    ],
)
def test_an_error_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([3.0, 1.0], np.float32)),
        spaces.Box(-1, 1, (2, 2)),
        spaces.Discrete(4, start=-1),
        spaces.MultiDiscrete([2, 5]),
        spaces.MultiBinary(3),
    ],
)
def test_an_action_of_the_environment_is_encoded_and_back(space):
    spec = ActionSpec.from_space(space)
    space.seed(0)
    for _ in range(5):
        action = space.sample()
        encoded = spec.from_env(action)
        assert encoded.shape == spec.shape and encoded.dtype == spec.dtype
        assert np.allclose(spec.rows_to_env(encoded[None])[0], action, atol=1e-6)
    with pytest.raises(ValueError, match=r"ActionSpec.from_env: an action has shape \(7,\), expected"):
        spec.from_env(np.zeros(7))
    with pytest.raises(ValueError, match=r"ActionSpec.from_env: actions has .*, expected"):
        spec.from_env(np.full(spec.env_shape, 9))
