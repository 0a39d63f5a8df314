"""The grid worlds as gymnasium environments."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env

from worldmodel.environments.grid_env import TILE
from worldmodel.environments.making import specs_of
from worldmodel.environments.registry import EnvironmentFailed, make
from worldmodel.environments.rooms import RoomsConfig, RoomWorlds
from worldmodel.runs.fields import ConfigurationError

ENVIRONMENTS = {
    "rooms": ("Rooms-v0", {}),
    "rooms in pixels": ("Rooms-v0", {"pixels": 4, "noise": 0.05, "view": 3, "size": 5}),
    "rooms with an own heading": ("Rooms-v0", {"own_heading": True, "edits": 0.2, "view": 3, "size": 5}),
    "drift": ("Drift-v0", {"pause": 2}),
    "drift in pixels": ("Drift-v0", {"pixels": 2}),
}


@pytest.mark.filterwarnings("ignore:.*render_mode.*:UserWarning")
@pytest.mark.parametrize("name, options", ENVIRONMENTS.values(), ids=list(ENVIRONMENTS))
def test_gymnasium_accepts_them(name, options):
    environment = gymnasium.make(f"worldmodel/{name}", render_mode="rgb_array", **options).unwrapped
    check_env(environment, skip_render_check=True)
    environment.reset(seed=3)
    picture = environment.render()
    side = environment.worlds.side
    assert picture.shape == (side * TILE, side * TILE, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("name, options", ENVIRONMENTS.values(), ids=list(ENVIRONMENTS))
def test_a_seed_and_actions_repeat_an_episode(name, options):
    def episode(seed):
        environment = make(f"worldmodel/{name}", length=20, **options)
        seen, ended = [environment.reset(seed=seed)[0]], False
        actions = np.random.default_rng(0).integers(environment.action_space.n, size=20)
        for action in actions:
            assert not ended
            observation, reward, terminated, ended, info = environment.step(action)
            seen += [observation, reward, *info.values()]
            assert environment.observation_space.contains(observation) and 0 <= reward <= 1 and not terminated
        assert ended, "truncated after `length` steps"
        return seen

    first, again, other = episode(5), episode(5), episode(6)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_environment_is_a_batch_of_one():
    options = {"size": 6, "edits": 0.5, "view": 3}
    environment = make("worldmodel/Rooms-v0", **options).unwrapped
    first, _ = environment.reset(seed=7)
    drawn = int(seeding.np_random(7)[0].integers(2**62))
    worlds = RoomWorlds(1, RoomsConfig(**options), torch.Generator().manual_seed(drawn))
    assert environment.explore() == worlds.choose()
    actions = [2, 1, 0, 3]
    steps = worlds.rollout(4, torch.tensor([actions]))
    assert np.array_equal(first.ravel(), steps["tokens"][0, 0])
    for t, action in enumerate(actions):
        observation, reward, *_, info = environment.step(action)
        assert np.array_equal(observation.ravel(), steps["next_tokens"][0, t])
        for name in ("gap", "inside", "edited", "fresh"):
            assert np.array_equal(info[name].ravel(), steps[name][0, t])
        assert reward == ((steps["gap"][0, t] < 0) & steps["inside"][0, t]).double().mean()
        assert info["displacement"].tolist() == steps["displacement"][0, t].tolist()


def test_info_has_the_heading_of_the_observation():
    environment = make("worldmodel/Rooms-v0", own_heading=True, size=5).unwrapped
    heading = environment.reset(seed=0)[1]["heading"]
    for action, turn in ((1, 3), (0, 0), (2, 1)):
        assert (
            environment.step(action)[4]["heading"] == environment.worlds.headings == (heading := (heading + turn) % 4)
        )


def test_cells_are_read_as_classes_and_pixels_as_a_picture():
    kinds = {}
    for name, options in ENVIRONMENTS.values():
        observation, action = specs_of(f"worldmodel/{name}", env_args=options)
        (part,) = observation.modalities.values()
        kinds[(name, *options)] = part.kind, part.sizes
        assert action.sizes == ((3,) if "own_heading" in options else (4,))
    assert kinds["Rooms-v0",] == ("grid", (9,)) and kinds["Drift-v0", "pause"] == ("grid", (5,))
    assert kinds["Drift-v0", "pixels"] == ("image", ()) and len(make("worldmodel/Rooms-v0").metadata["cells"]) == 9


def test_bad_options_and_actions_are_told():
    for options, said in (
        ({"sise": 3}, "unexpected keyword argument 'sise'"),
        ({"size": 1}, "size is 1, expected a whole number, at least 2"),
        ({"agents": 2}, "agents is 2, expected 1"),
        ({"length": 0}, "length is 0, expected a whole number, at least 1"),
        ({"length": 1.5}, "length is 1.5, expected a whole number"),
    ):
        with pytest.raises(EnvironmentFailed, match=said):
            make("worldmodel/Rooms-v0", **options)
    environment = make("worldmodel/Rooms-v0").unwrapped
    for method in (lambda: environment.step(0), environment.explore, environment.render):
        with pytest.raises(gymnasium.error.ResetNeeded, match="Rooms: there is no world yet: call reset first"):
            method()
    environment.reset(seed=0)
    for action in (4, -1, 2**70, 1.7, True, "2", None, np.array([1, 2])):
        with pytest.raises(ConfigurationError, match=r"Rooms: action is .*, expected a whole number"):
            environment.step(action)
    assert environment.steps == 0
    for action in (1, np.int64(1), np.array(1), torch.tensor(1)):
        environment.step(action)
    for actions in (torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=rf"RoomWorlds: actions are {actions.dtype}, expected torch.int64"):
            environment.worlds.rollout(3, actions)
