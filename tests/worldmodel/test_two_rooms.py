"""Two rooms: swept collisions, published walks and tasks, episodes by seed, commands turned by a hidden angle."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from worldmodel.environments.making import specs_of
from worldmodel.environments.registry import make
from worldmodel.environments.two_rooms.game import TurnedRoomsConfig, TwoRoomsConfig
from worldmodel.environments.two_rooms.moves import Layouts, is_free, move, shortened, travel, turned
from worldmodel.environments.two_rooms.pictures import pictures
from worldmodel.environments.two_rooms.walks import WalkConfig, sample_tasks, sample_walks
from worldmodel.runs.fields import ConfigurationError


def scene(count=400, seed=0, **options):
    """Rooms, and free places in them, many of which touch a wall."""
    random = np.random.default_rng(seed)
    layouts = Layouts.sampled(random, count)
    walks = sample_walks(random, layouts, 40, WalkConfig(**options))
    return random, layouts, walks


def test_a_long_move_ends_where_short_ones_first_meet_a_wall():
    random, layouts, walks = scene(bumping=0.6)
    layouts = Layouts(layouts.wall.double(), layouts.door.double())
    start = walks.positions[:, 20].double()
    for _ in range(2):  # in the second round, many are beside a wall
        way = torch.from_numpy(random.normal(0, 25, (400, 2)))
        end = move(start, way, layouts)
        path = travel(start, (way / 64)[:, None].expand(-1, 64, -1), layouts)
        met = ((path[:, 1:] - path[:, :-1]) - (way / 64)[:, None]).norm(dim=-1) > 1e-9
        first = torch.where(met.any(1), met.int().argmax(1) + 1, 64)
        assert torch.allclose(end, path[torch.arange(400), first], atol=1e-6) and is_free(end, layouts).all()
        assert torch.equal((end - start - way).norm(dim=-1) > 1e-9, met.any(1)) and 200 < int(met.any(1).sum()) < 390
        start = end


def test_the_door_is_the_only_way():
    layouts = Layouts.fixed(3)
    starts = torch.tensor([[20.0, 10.0], [20.0, 30.0], [20.0, 14.5]])
    ends = move(starts, torch.tensor([[30.0, 0.0]] * 3), layouts)
    assert torch.allclose(ends, torch.tensor([[50.0, 10.0], [30.7, 30.0], [30.7, 14.5]]))
    within = move(torch.tensor([[32.0, 10.0]]), torch.tensor([[0.5, 30.0]]), layouts[:1])
    assert torch.allclose(within, torch.tensor([[32 + 0.5 * 4 / 30, 13.7]])), "out of the door into its frame"
    assert torch.allclose(move(within, torch.tensor([[0.0, 1.0]]), layouts[:1]), within)
    border = move(torch.tensor([[20.0, 20.0]]), torch.tensor([[-40.0, 8.0]]), layouts[:1])
    assert torch.allclose(border, torch.tensor([[4.3, 20 + 8 * 16 / 40]])), "no sliding along a wall"


def test_gradients_pass_free_moves_and_are_finite_everywhere():
    _, layouts, walks = scene()
    first = walks.positions[:, 0].clone().requires_grad_()
    moves = (walks.moves * (torch.arange(40) % 3 > 0)[:, None]).requires_grad_()  # with moves of zero length
    path = travel(first, moves, layouts)
    gradients = torch.autograd.grad(path[:, -1].sum(), [first, moves])
    assert all(gradient.isfinite().all() for gradient in gradients)
    met = ((path[:, 1:] - path[:, :-1] - moves).norm(dim=-1) > 1e-5).any(1)
    assert (gradients[0][~met] == 1).all() and (gradients[1][~met] == 1).all() and 20 < int(met.sum()) < 380


def test_walks_are_as_published():
    random = np.random.default_rng(0)
    layouts = Layouts.sampled(random, 1000)
    walks = sample_walks(random, layouts, 90, WalkConfig())
    assert is_free(walks.positions, layouts[:, None]).all()
    assert walks.positions[:, 1:].equal(travel(walks.positions[:, 0], walks.moves, layouts)[:, 1:])
    lengths = walks.moves.norm(dim=-1)
    assert lengths.min() > 0.199 and lengths.max() < 1.801 and abs(lengths.mean() - 1) < 0.01
    cosines = torch.nn.functional.cosine_similarity(walks.moves[:, 1:], walks.moves[:, :-1], dim=-1)
    assert abs(cosines.mean() - 0.8934) < 0.01, "I1(5) / I0(5), the mean cosine of von Mises noise"

    def crossed(crossing):
        walks = sample_walks(np.random.default_rng(1), layouts, 90, WalkConfig(crossing=crossing))
        right = walks.positions[..., 0] > layouts.wall[:, None]
        return (right.any(1) & ~right.all(1)).double().mean()

    assert crossed(1.0) > 0.75 > 0.15 > crossed(0.0)


def test_starts_and_goals_lie_in_different_rooms_away_from_walls():
    random = np.random.default_rng(0)
    layouts = Layouts.sampled(random, 2000)
    start, goal = sample_tasks(random, layouts)
    sides = torch.stack([start, goal])[..., 0] - layouts.wall
    assert (sides.sign().prod(0) == -1).all() and (sides.abs() >= 3.6 - 1e-4).all()
    assert 900 < int((sides[0] < 0).sum()) < 1100, "either room is the first"
    assert min(start.min(), goal.min()) >= 6.6 - 1e-4 and max(start.max(), goal.max()) <= 57.4 + 1e-4


@pytest.mark.filterwarnings("ignore:.*(render_mode|symmetric and normalized).*:UserWarning")
@pytest.mark.parametrize("name", ["TwoRooms", "TurnedRooms"])
def test_gymnasium_accepts_them_and_a_seed_repeats_an_episode(name):
    options = {"layout": "random", "goal_channel": True, "length": 5} | ({"wander": 2} if name == "TurnedRooms" else {})
    environment = gymnasium.make(f"worldmodel/{name}-v0", render_mode="rgb_array", **options).unwrapped
    check_env(environment, skip_render_check=True)

    def episode(seed):
        observation, info = environment.reset(seed=seed)
        seen = [observation, *info.values()]
        for _ in range(4):
            observation, reward, _, _, info = environment.step(environment.explore())
            seen += [observation, reward, *info.values()]
        return seen

    first, again, other = episode(5), episode(5), episode(6)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert environment.render().shape == (260, 260, 3)


def test_an_environment_moves_as_a_batch_does():
    environment = make("worldmodel/TwoRooms-v0", length=30, layout="random").unwrapped
    _, info = environment.reset(seed=1)
    random, place = np.random.default_rng(0), torch.from_numpy(info["position"])[None]
    for step in range(30):
        command = random.uniform(-2.45, 2.45, 2).astype(np.float32)
        observation, _, terminated, truncated, info = environment.step(command)
        place = move(place, shortened(torch.from_numpy(command), 2.45)[None], environment.layouts)
        assert np.array_equal(place[0], info["position"]) and not terminated and truncated == (step == 29)
        expected = (pictures(place, environment.layouts)[0] * 255).to(torch.uint8)
        assert np.array_equal(observation, expected.permute(1, 2, 0))
    rows, columns = np.indices((65, 65))
    dot = observation[..., 0] / observation[..., 0].sum()
    assert np.allclose([(dot * columns).sum(), (dot * rows).sum()], info["position"], atol=0.1), "x, then y"
    observations, actions = specs_of("worldmodel/TwoRooms-v0")
    assert observations.modalities["observation"].kind == "image" and actions.kind == "continuous"


@pytest.mark.parametrize("name", ["TwoRooms", "TurnedRooms"])
def test_a_recorded_walk_ends_at_its_goal(name):
    """For TurnedRooms, ``explore`` turns the walk's moves back and rests."""
    options = {"wander": 12, "rest": 7, "angles": 0} if name == "TurnedRooms" else {}
    environment = make(f"worldmodel/{name}-v0", task="walk", length=25, crossing=1.0, **options).unwrapped
    for seed in range(4):
        observation, info = environment.reset(seed=seed)
        places, done = [info["position"]], False
        while not done:
            observation, reward, _, done, info = environment.step(environment.explore())
            places.append(info["position"])
        assert np.allclose(places[-1], info["goal_position"], atol=0.02) and reward == 1 and info["success"]
        assert np.abs(observation.astype(int) - info["goal"]).max() <= 4
        stays = [np.array_equal(a, b) for a, b in zip(places[1:], places[:-1], strict=True)]
        assert all(stays[12:19]) == (name == "TurnedRooms")


def test_success_ends_an_episode_and_does_not_count_before_the_rest_is_over():
    environment = make("worldmodel/TurnedRooms-v0", angles=0, wander=3, rest=2, length=10).unwrapped
    environment.reset(seed=0)
    environment.goal = environment.position.clone()
    told = [environment.step(np.zeros(2))[1:4] for _ in range(6)]
    assert told == [(0.0, False, False)] * 5 + [(1.0, True, False)]
    stays = make("worldmodel/TwoRooms-v0", ends=False, length=2).unwrapped
    stays.reset(seed=0)
    stays.goal = stays.position + torch.tensor([2.7, 3.7])  # 4.58 away
    assert stays.step([0.1, 0.1])[1:4] == (1.0, False, False) and stays.step([-1.0, -1.0])[1:4] == (0.0, False, True)


def test_hidden_angles_turn_commands_and_no_picture_shows_them():
    angles = TurnedRoomsConfig(angles=4).turns(np.random.default_rng(0), 1000)
    assert sorted({round(float(angle), 4) for angle in angles}) == [0, 1.5708, 3.1416, 4.7124]
    environment = make("worldmodel/TurnedRooms-v0", angles=0).unwrapped
    _, info = environment.reset(seed=3)
    first = environment.step([1.0, 0.5])[-1]["position"] - info["position"]
    expected = turned(torch.tensor([1.0, 0.5]), environment.angle)
    assert np.allclose(first, expected, atol=1e-5) and not np.allclose(first, [1.0, 0.5], atol=0.1)
    plain = make("worldmodel/TwoRooms-v0").unwrapped
    assert environment.observation_space == plain.observation_space


@pytest.mark.filterwarnings("ignore:.*(render_mode|symmetric and normalized).*:UserWarning")
def test_the_place_may_be_observed_instead_of_a_picture():
    environment = gymnasium.make("worldmodel/TurnedRooms-v0", observes="place", wander=2, rest=2, length=5).unwrapped
    check_env(environment, skip_render_check=True)
    observation, info = environment.reset(seed=2)
    for _ in range(4):
        assert np.allclose((observation + 0.5) * 65, info["position"], atol=1e-4)
        assert np.allclose((info["goal"] + 0.5) * 65, info["goal_position"], atol=1e-4)
        observation, _, _, _, info = environment.step(environment.explore())
    observations, _ = specs_of("worldmodel/TwoRooms-v0", env_args={"observes": "place"})
    assert observations.modalities["observation"].kind == "vector"


def test_bad_input_is_told():
    environment = make("worldmodel/TwoRooms-v0").unwrapped
    for call in (lambda: environment.step([0.0, 0.0]), environment.explore, environment.render):
        with pytest.raises(gymnasium.error.ResetNeeded, match="TwoRooms: there is no episode yet: call reset first"):
            call()
    environment.reset(seed=0)
    for action in ([2.5, 0.0], [np.nan, 0.0], [1.0], 0, np.zeros((1, 2))):
        with pytest.raises(
            ConfigurationError, match=r"TwoRooms: action is .*, expected \(dx, dy\), each from -2.45 to"
        ):
            environment.step(action)
    for options, message in (
        ({"layout": "both"}, "layout is 'both', expected 'fixed' or 'random'"),
        ({"crossing": 0.7, "bumping": 0.4}, r"crossing is 0\.7 and bumping 0\.4, expected a sum of at most 1"),
        ({"radius": 0.0}, r"radius \(pixels\) is 0\.0, expected a number, more than 0"),
        ({"max_step": float("nan")}, r"max_step \(pixels\) is nan, expected a finite number"),
        ({"goal_channel": True, "observes": "place"}, "goal_channel is true and observes 'place', which has no"),
        ({"max_step": 1.7}, r"max_step \(pixels\) is 1\.7, expected a number, at least 1\.8"),  # shorter than of walks
    ):
        with pytest.raises(ConfigurationError, match=message):
            TwoRoomsConfig(**options)
    with pytest.raises(ValueError, match="sample_walks: steps is 0, expected at least 1"):
        sample_walks(np.random.default_rng(0), Layouts.fixed(1), 0, WalkConfig())


def test_places_are_within_the_walls_around_both_rooms():
    _, layouts, walks = scene(seed=2)
    far = move(walks.positions[:, 0], torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 1e4, layouts)
    assert far.min() >= 4 and far.max() <= 60 and is_free(far, layouts).all()
