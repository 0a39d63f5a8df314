"""Planners: perfect under the true dynamics, bounded, warm-started; costs; planning in a world model's latents."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import CONFIG

from worldmodel.acting.plan_costs import (
    GoalCost,
    LatentGoalCost,
    LatentRollout,
    ReturnCost,
    Trajectories,
    WorldModelRollout,
    encode_goal,
)
from worldmodel.acting.plan_decider import PlanningDecider
from worldmodel.acting.planner import Planner, PlannerConfig, shifted, within_norm
from worldmodel.acting.room_episodes import LearnedDynamics, TrueDynamics, drive
from worldmodel.data.batch import Batch
from worldmodel.data.selection import repeated
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.making import specs_of
from worldmodel.environments.two_rooms.game import TurnedRoomsConfig
from worldmodel.environments.two_rooms.moves import Layouts, travel, turned
from worldmodel.environments.two_rooms.pictures import places
from worldmodel.environments.two_rooms.walks import sample_tasks
from worldmodel.model.latents import CategoricalConfig, EmbeddingConfig, GaussianConfig
from worldmodel.model.perception import PerceptionConfig
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.fields import ConfigurationError

METHODS = ("cem", "mppi", "gradient")


@pytest.mark.parametrize("layout", ["fixed", "random"])
def test_plans_under_the_true_dynamics_are_perfect(layout):
    random = np.random.default_rng(3)
    layouts = Layouts.sampled(random, 5) if layout == "random" else Layouts.fixed(5)
    start, goal = sample_tasks(random, layouts)
    driven = drive(TrueDynamics(goal, layouts), start, goal, layouts, until_hit=True)
    assert driven.hit.all()
    straight = drive(lambda places: (goal - places)[:, None], start, goal, layouts, steps=60)
    assert straight.hit.sum() <= 2, "most tasks need the door"


def point(width=2):
    """A point that moves by a tenth of each action, towards targets of three rows."""
    target = torch.tensor([[0.9, -0.3], [-1.0, 1.0], [0.0, 0.2]])

    def rollout(position, actions):
        return position[:, None, None] + 0.1 * actions.cumsum(2)

    return rollout, GoalCost(target), torch.zeros(3, width)


def plan(method, seed=0, iterations=4, warm=None, **options):
    rollout, cost, state = point()
    config = PlannerConfig(method=method, horizon=16, samples=64, first=2, iterations=iterations, **options)
    planner = Planner(rollout, cost, 2, config, generator=torch.Generator().manual_seed(seed))
    return planner.plan(state, 3, warm)


@pytest.mark.parametrize("method", METHODS)
def test_each_row_has_a_plan_to_its_own_goal_whose_cost_is_told(method):
    rollout, cost, state = point()
    for elitism in (True, False):
        found = plan(method, elitism=elitism, iterations=20 if method == "gradient" else 6)
        assert found.actions.shape == (3, 16, 2) and found.actions.abs().max() <= 1 and not found.actions.requires_grad
        assert torch.allclose(found.cost, cost(rollout(state, found.actions[:, None]))[:, 0])
        ends = (0.1 * found.actions.sum(1) - cost.goal).norm(dim=-1)
        assert (ends < (0.35 if method == "mppi" else 0.25)).all()
        if elitism:
            assert (found.costs.diff(dim=0) <= 1e-6).all(), "never worse than before"


@pytest.mark.parametrize("method", METHODS)
def test_seeds_repeat_plans_and_warm_starts_are_kept(method):
    first, again, other = plan(method), plan(method), plan(method, seed=1)
    assert torch.equal(first.actions, again.actions) and not torch.equal(first.actions, other.actions)
    better = plan(method, seed=2, warm=first.actions, iterations=1)
    assert (better.cost <= first.cost + 1e-6).all()
    assert (
        torch.equal(shifted(first.actions, 3)[:, :-3], first.actions[:, 3:])
        and not shifted(first.actions, 3)[:, -3:].any()
    )


def test_proposals_of_mixed_persistence_reach_farther_than_white_noise():
    white = {"turns": (1.0,), "correlations": (0.0,), "rests": 0.0}
    mixed, noisy = (torch.stack([plan("cem", seed, 1, **options).cost for seed in range(3)]) for options in ({}, white))
    assert mixed.mean() < 0.6 * noisy.mean()


def test_gradients_improve_what_samples_found():
    assert (plan("gradient", iterations=40).cost < 0.7 * plan("gradient", iterations=1).cost).all()


def test_all_tried_actions_are_allowed():
    rollout, cost, state = point()
    seen = []

    def spied(position, actions):
        seen.append(actions.detach())
        return rollout(position, actions)

    for method in METHODS:
        config = PlannerConfig(method=method, horizon=5, samples=16, iterations=3)
        Planner(spied, cost, 2, config, project=within_norm(0.5)).plan(state, 3)
    assert max(actions.norm(dim=-1).max() for actions in seen) <= 0.5 + 1e-6
    assert {actions.shape[1] for actions in seen} == {128, 16, 6}


@pytest.mark.parametrize("samples", [4, 5, 64])
@pytest.mark.parametrize("elitism", [True, False])
def test_each_round_tries_as_many_plans_as_asked(samples, elitism):
    rollout, cost, state = point()
    tried = []
    for fresh in (0.0, 0.3, 0.5):
        config = PlannerConfig(horizon=3, samples=samples, fresh=fresh, first=2, elites=3, iterations=3)
        config = dataclasses.replace(config, elitism=elitism)
        Planner(lambda *given: tried.append(given[1].shape[1]) or rollout(*given), cost, 2, config).plan(state, 3)
    rounds = [2 * samples, samples, samples]
    assert tried == 3 * (rounds if elitism else [*rounds, 1]), "without elitism, the mean is tried at the end"


def test_costs_of_a_path():
    path = torch.zeros(2, 1, 3, 2)
    path[0, 0, :, 0] = torch.tensor([3.0, 1.0, 2.0])
    cost = GoalCost(torch.zeros(2, 2), nearest=1, mean=10, last=100)
    assert cost(path).tolist() == [[1 + 10 * 2 + 100 * 2], [0]]
    pictures = torch.rand(2, 4, 3, 2, 5, 5)
    at_goal = GoalCost(pictures[:, 1, 2])(pictures)
    assert at_goal.argmin(1).tolist() == [1, 1]


def test_bad_input_is_told():
    rollout, cost, state = point()

    def planned(cost, **options):
        return Planner(rollout, cost, 2, PlannerConfig(horizon=5, samples=16)).plan(state, 3, **options)

    for wrong, message in (
        (lambda path: path, r"costs are \(3, 128, 5, 2\), expected \(rows, samples\) \(3, 128\)"),
        (lambda path: None, r"costs are NoneType, expected"),
        (lambda path: cost(path) * torch.tensor([[1.0], [torch.nan], [1.0]]), "all costs of row 1 are NaN or infinite"),
        (GoalCost(torch.zeros(3, 3)), r"goal has shape \(3, 3\), expected \(3, 2\), as the path has"),
        (GoalCost(torch.zeros(2, 2)), r"goal has shape \(2, 2\), expected \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(wrong)
    some = planned(lambda path: torch.where(path[:, :, 0, 0] > 0, torch.nan, cost(path)))
    assert some.cost.isfinite().all() and (some.actions[:, 0, 0] <= 0).all(), "what is NaN is not taken"
    with pytest.raises(ValueError, match=r"warm_start has shape \(3, 4, 2\), expected \(3, 5, 2\)"):
        planned(cost, warm_start=torch.zeros(3, 4, 2))
    with pytest.raises(ValueError, match="goal holds NaN or infinity"):
        GoalCost(torch.full((1, 2), torch.nan))
    with pytest.raises(ConfigurationError, match="elites is 20 and samples 16, expected elites <= samples"):
        PlannerConfig(samples=16, elites=20)


LATENTS = {
    "categorical": CategoricalConfig(variables=3, classes=4),
    "probabilities": CategoricalConfig(variables=3, classes=4, stochastic=False),
    "gaussian": GaussianConfig(size=6),
    "embedding": EmbeddingConfig(size=6),
}


def world_model(latent="gaussian", actions=None):
    torch.manual_seed(0)
    seen = spaces.Dict(place=spaces.Box(-1, 1, (3,)))
    specs = ObservationSpec.from_space(seen), ActionSpec.from_space(actions or spaces.Box(-2, 2, (2,)))
    perception = PerceptionConfig(LATENTS[latent], hidden=16)
    model = WorldModel(*specs, dataclasses.replace(CONFIG, perception=perception))
    with torch.no_grad():  # heads begin with weights of zero
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("by", ["goal", "return"])
def test_a_plan_s_gradient_reaches_the_first_observation(latent, by):
    model = world_model(latent)
    place = torch.tensor([[0.3, -0.2, 0.9], [0.1, 0.4, -0.7]], requires_grad=True)
    _, state = model.observe_step(
        {"place": place}, torch.zeros(2, 2), model.init_state(2), torch.ones(2, dtype=torch.bool)
    )
    actions = torch.rand(2, 5, 4, 2, requires_grad=True)
    imagined = WorldModelRollout(model)(state, actions)
    goal = encode_goal(model, {"place": torch.rand(2, 3)}).detach()
    costs = (LatentGoalCost(goal) if by == "goal" else ReturnCost(model))(imagined)
    assert costs.shape == (2, 5)
    assert torch.equal(LatentRollout(model)(state, actions), imagined.latents)
    to_place, to_actions = torch.autograd.grad(costs[0].sum(), [place, actions])
    assert to_place[0].abs().min() > 0 and not to_place[1].any(), "rows are independent"
    assert (to_actions[0].abs().sum(-1) > 0).all() and not to_actions[1].any()


def test_the_return_of_a_plan():
    model = world_model()
    rewards, continues = torch.rand(1, 2, 3), torch.rand(1, 2, 3)
    features = torch.rand(1, 2, 4, model.features)
    found = ReturnCost(model)(Trajectories(torch.zeros(1, 2, 3, 6), features, rewards, continues))
    discount = model.config.evaluation.discount
    value = model.evaluation.value(features[:, :, 3])
    for step in (2, 1, 0):
        value = rewards[..., step] + discount * continues[..., step] * value
    assert torch.allclose(found, -value, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_planner_decides_in_act_and_goes_on_with_its_plan(method):
    model, random = world_model(), torch.Generator().manual_seed(0)
    config = PlannerConfig(method=method, horizon=4, samples=16, iterations=2, std=0.5)
    decider = PlanningDecider(config=config, every=2)
    state, reset = model.init_state(2), torch.ones(2, dtype=torch.bool)
    plans, starts = [], []
    searched = Planner.plan

    def spied(planner, state, rows, warm_start=None, cost=None):
        starts.append(warm_start)
        plans.append(searched(planner, state, rows, warm_start, cost))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "plan", spied)
        taken = []
        for step in range(5):
            is_first = reset if step == 0 else torch.tensor([step == 3, False])
            seen = {"place": torch.rand(2, 3, generator=random)}
            actions, state = model.act(seen, state, is_first, decider)
            taken.append(model.action_spec.encode(actions))
    assert len(plans) == 3, "at steps 0 and 2; at 3, where a row begins anew"
    used = [plans[0].actions[:, 0], plans[0].actions[:, 1], plans[1].actions[:, 0], plans[2].actions[:, 0]]
    for expected, found in zip([*used, plans[2].actions[:, 1]], taken, strict=True):
        assert torch.allclose(expected, found, atol=1e-6)
    assert not starts[0].any() and torch.equal(starts[1], shifted(plans[0].actions, 2))
    assert not starts[2][0].any() and torch.equal(starts[2][1], shifted(plans[1].actions, 1)[1])


def test_an_episode_that_begins_is_planned_alike_beside_any_others():
    model, config = world_model(), PlannerConfig(horizon=4, samples=16, iterations=2, std=0.1)
    seen = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0))  # (steps, rows, place)

    def taken(rows, seeds):
        decider, state = PlanningDecider(config=config, seed=5), model.init_state(len(rows))
        for _ in range(2):  # the first of a decider, and another after it
            for row, seed in enumerate(seeds):
                decider.begin(row, seed)
            found = []
            for step in range(3):
                is_first = torch.full((len(rows),), step == 0)
                _, state = model.act({"place": seen[step, rows]}, state, is_first, decider)
                found.append(state["action"])
        return torch.stack(found, 1)

    together = taken([0, 1, 2], [7, 8, 9])
    assert torch.allclose(taken([1], [8]), together[1:2], atol=1e-5)
    assert not torch.allclose(taken([1], [7]), together[1:2], atol=1e-2)
    assert torch.allclose(taken([0, 1], []), taken([0, 1], []), atol=0), "by the decider's seed if none was begun"
    planner = Planner(lambda state, actions: actions.sum((-1, -2)), None, 2, generator=[torch.Generator()])
    with pytest.raises(ValueError, match="there are 1 generators, expected one for 3 rows"):
        planner.plan(None, 3)


def test_a_first_search_may_be_another_than_those_that_go_on():
    model, tried = world_model(), []
    small, large = (PlannerConfig(horizon=4, samples=count, first=1, iterations=1) for count in (8, 32))

    def cost(trajectories):
        tried.append(trajectories.rewards.shape[1])
        return -trajectories.rewards.sum(-1)

    decider = PlanningDecider(cost, small, fresh=large)
    state = model.init_state(2)
    for begins in ([True, True], [False, False], [False, True], [False, False]):
        observation = {"place": torch.rand(2, 3)}
        _, state = model.act(observation, state, torch.tensor(begins), decider)
    assert tried == [32, 8, 32, 8]
    with pytest.raises(ValueError, match="fresh has a horizon of 5, expected config's 4"):
        PlanningDecider(cost, small, fresh=PlannerConfig(horizon=5))


def test_a_planner_needs_continuous_actions_and_fitting_goals():
    with pytest.raises(ValueError, match="WorldModelRollout: actions are discrete, expected continuous ones"):
        WorldModelRollout(world_model(actions=spaces.Discrete(3)))
    with pytest.raises(ValueError, match="every is 5, expected 1 to the horizon of 4"):
        PlanningDecider(config=PlannerConfig(horizon=4), every=5)
    for goal, said in (({}, "place is missing"), ({"place": torch.zeros(2, 4)}, r"place is of shape \(2, 4\)")):
        with pytest.raises(ValueError, match=f"encode_goal: {said}, expected"):
            encode_goal(world_model(), goal)


def test_equal_parts_of_an_action_are_searched_as_one_move():
    model = world_model("embedding", spaces.Box(-2, 2, (4,)))
    config = PlannerConfig(horizon=4, samples=16, iterations=2, std=0.5)
    cost = LatentGoalCost(encode_goal(model, {"place": torch.rand(3, 3)}).detach())
    decider = PlanningDecider(cost, config, every=2, project=within_norm(0.3), repeats=2)
    state, reset = model.init_state(3), torch.ones(3, dtype=torch.bool)
    for step in range(3):
        _, state = model.act({"place": torch.rand(3, 3)}, state, reset & (step == 0), decider)
        action = state["action"]
        assert torch.equal(action[:, :2], action[:, 2:]) and (action[:, :2].norm(dim=-1) <= 0.3 + 1e-6).all()
        assert action.abs().sum() > 0
    assert decider._used == 1, "the third is of a second plan"
    with pytest.raises(ValueError, match="repeats is 3, expected a divisor of the 4 numbers"):
        model.act({"place": torch.rand(3, 3)}, state, reset, PlanningDecider(cost, config, repeats=3))


def turned_scene(rows):
    random = np.random.default_rng(5)
    layouts = Layouts.fixed(rows)
    return layouts, *sample_tasks(random, layouts), TurnedRoomsConfig(angles=0).turns(random, rows)


def test_plans_under_true_dynamics_arrive_where_commands_are_turned_by_known_angles():
    layouts, start, goal, angles = turned_scene(3)
    knows = TrueDynamics(goal, layouts, angles=angles)
    assert drive(knows, start, goal, layouts, until_hit=True, angles=angles).hit.all()
    back = drive(lambda places: turned(goal - places, -angles)[:, None], start, goal, layouts, 60, angles=angles)
    straight = drive(lambda places: (goal - places)[:, None], start, goal, layouts, 60)
    assert torch.allclose(back.path, straight.path, atol=1e-3)
    unaware = drive(lambda places: (goal - places)[:, None], start, goal, layouts, 60, angles=angles)
    assert not torch.allclose(unaware.path, straight.path, atol=1)


def test_a_controller_of_places_remembers_moves_that_it_did_not_plan():
    """Its state is that of observing the same steps, so that its plans differ with what it was told."""
    observation, action = specs_of("worldmodel/TurnedRooms-v0", env_args={"observes": "place"})
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, perception=PerceptionConfig(EmbeddingConfig(size=2)))
    model = WorldModel(observation, repeated(action, 4), config)
    layouts, start, goal, _ = turned_scene(3)
    moves = torch.linspace(-2.4, 2.4, 3 * 5 * 2).view(3, 5, 1, 2).expand(-1, -1, 4, -1)
    path = travel(start, moves.flatten(1, 2), layouts)[:, ::4]
    controller = LearnedDynamics(model, goal, layouts, PlannerConfig(horizon=3, samples=8, iterations=1), fresh=None)
    for step in range(5):
        controller.follow(path[:, step], moves[:, step])
    observations, flags = {"observation": places(path)}, torch.zeros(3, 6, dtype=torch.bool)
    encoded = torch.cat([(moves / 2.45).flatten(2), torch.zeros(3, 1, 8)], 1)
    first = flags.clone()
    first[:, 0] = True
    batch = Batch(observations, encoded, flags.float(), flags, flags, first, ~flags)
    planned = controller(path[:, 5])
    assert planned.shape == (3, 4, 2)
    observed = model.observe(batch)
    assert torch.allclose(controller._state["features"], observed.features[:, -1], atol=1e-4)
    with pytest.raises(ValueError, match="an action has shape"):
        controller.follow(path[:, 5], moves[:, 0, :3])
