"""stable-worldmodel's interfaces: a stand-in for its solvers and its policy, and the package itself where it is."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import CONFIG

from worldmodel.acting.plan_costs import GoalCost, LatentRollout, encode_goal
from worldmodel.acting.planner import PlannerConfig
from worldmodel.acting.solvers import PlanningSolver, SolverModel
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.model.latents import EmbeddingConfig
from worldmodel.model.world_model import WorldModel

SIDE, COLOURS, BLOCK = 20, 3, 2
ENTRIES = {"observation": ("pixels", "goal")}


@dataclasses.dataclass
class Plans:
    """What a policy says of its plans."""

    horizon: int = 3
    receding_horizon: int = 2
    action_block: int = BLOCK


def solver_model() -> SolverModel:
    torch.manual_seed(0)
    perception = dataclasses.replace(CONFIG.perception, latent=EmbeddingConfig(size=6))
    pictures = spaces.Box(0, 255, (SIDE, SIDE, COLOURS), np.uint8)
    specs = ObservationSpec.from_space(pictures), ActionSpec.from_space(spaces.Box(-1, 1, (2 * BLOCK,), np.float32))
    return SolverModel(WorldModel(*specs, dataclasses.replace(CONFIG, perception=perception)))


def info_of(rows: int) -> dict[str, object]:
    """As a policy gives it to a solver: (rows, history, ...)."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (2, rows, 1, SIDE, SIDE, COLOURS), generator=generator, dtype=torch.uint8)
    return {"pixels": pictures[0], "goal": pictures[1], "seed": np.arange(rows), "id": "rooms"}


def standing_in(model, info, samples, horizon, width, rounds):
    """Actions of least cost by the calls of the package's solver: one row at a time, under inference mode."""
    found = []
    with torch.inference_mode():
        for row in range(len(info["pixels"])):
            own = {
                name: value[row : row + 1, None].expand(1, samples, *value.shape[1:])
                for name, value in info.items()
                if torch.is_tensor(value)
            }
            mean = torch.zeros(1, horizon, width)
            for _ in range(rounds):
                tried = mean[:, None] + torch.randn(1, samples, horizon, width)
                tried[:, 0] = mean
                costs = model.get_cost(own, tried)
                assert costs.shape == (1, samples)
                mean = tried[:, costs[0].topk(5, largest=False).indices].mean(1)
            found.append(mean)
    return torch.cat(found)


def cost_of(model: SolverModel, info, actions) -> torch.Tensor:
    repeated = {
        name: info[name][:, None].expand(-1, actions.shape[1], *info[name].shape[1:]) for name in ENTRIES["observation"]
    }
    return model.get_cost(repeated, actions)


def test_a_solver_plans_towards_the_goal_in_a_world_model():
    model, info = solver_model(), info_of(2)
    plans = standing_in(model, info, 64, 3, 2 * BLOCK, 6)
    found, still = (cost_of(model, info, actions[:, None]) for actions in (plans, torch.zeros_like(plans)))
    assert (found < still).all()
    inner, actions = model.world_model, torch.rand(2, 4, 3, 2 * BLOCK) * 1.4 - 0.7
    state, first = inner.init_state(2), torch.ones(2, dtype=torch.bool)
    _, state = inner.observe_step({"observation": info["pixels"][:, 0]}, state["action"], state, first)
    goal = encode_goal(inner, {"observation": info["goal"][:, 0]})
    expected = GoalCost(goal)(LatentRollout(inner)(state, actions))
    assert torch.allclose(cost_of(model, info, actions), expected, atol=1e-5)
    assert torch.equal(cost_of(model, info, 9 * torch.ones(2, 1, 3, 4)), cost_of(model, info, torch.ones(2, 1, 3, 4)))
    actions.requires_grad_()
    (gradient,) = torch.autograd.grad(
        model.criterion({"pixels": info["pixels"][:, None], "goal": info["goal"][:, None]}, actions).sum(), actions
    )
    assert (gradient.abs().sum((0, 1, 3)) > 0).all(), "solvers by gradient, too"


def test_the_planner_is_a_policy_s_solver():
    model, info = solver_model(), info_of(3)
    solver = PlanningSolver(model, PlannerConfig(samples=32, iterations=3, std=0.5))
    bounds = spaces.Box(np.float32(-0.4), np.float32(0.7), (3, 2))
    solver.configure(action_space=bounds, n_envs=3, config=Plans())
    assert (solver.n_envs, solver.horizon, solver.action_dim) == (3, 3, 2 * BLOCK)
    plan = solver(info)
    assert plan["actions"].shape == (3, 3, 2 * BLOCK) and len(plan["costs"]) == 3
    assert plan["actions"].min() >= -0.4 and plan["actions"].max() <= 0.7
    assert torch.allclose(cost_of(model, info, plan["actions"][:, None])[:, 0], torch.tensor(plan["costs"]), atol=1e-5)
    still = cost_of(model, info, torch.zeros(3, 1, 3, 2 * BLOCK))[:, 0]
    assert (torch.tensor(plan["costs"]) < still).all()
    fewer = {name: value[1:] if not isinstance(value, str) else value for name, value in info.items()}
    again = solver.solve(fewer, init_action=plan["actions"][1:, Plans.receding_horizon :])
    assert again["actions"].shape == (2, 3, 2 * BLOCK), "of the rows that have to plan"


def test_what_a_solver_gives_has_to_fit():
    model, info = solver_model(), info_of(1)
    actions = torch.zeros(1, 2, 3, 2 * BLOCK)
    with pytest.raises(ValueError, match="info's goal is missing, expected"):
        model.get_cost({"pixels": info["pixels"]}, actions)
    with pytest.raises(
        ValueError, match=r"info's goal is of shape \(1, 1, 20, 20, 3\), expected \(rows, samples, hist"
    ):
        model.get_cost({name: info[name] for name in ("pixels", "goal")}, actions)
    with pytest.raises(ValueError, match="entries are of place, expected observation"):
        SolverModel(model.world_model, {"place": ("place", "goal")})
    solver = PlanningSolver(model)
    with pytest.raises(ValueError, match=r"the action space is .*, expected finite bounds, or a project"):
        solver.configure(action_space=spaces.Box(-np.inf, np.inf, (1, 2)), n_envs=1, config=Plans())


def test_the_package_s_solver_plans_in_a_world_model_and_its_policy_by_the_planner():
    package = pytest.importorskip("stable_worldmodel")
    from stable_worldmodel.solver import CEMSolver

    model, info = solver_model(), {name: value for name, value in info_of(2).items() if torch.is_tensor(value)}
    plans = package.PlanConfig(horizon=3, receding_horizon=2, action_block=BLOCK)
    bounds = spaces.Box(-1, 1, (2, 2), np.float32)
    theirs = CEMSolver(model, num_samples=64, n_steps=6, topk=5)
    theirs.configure(action_space=bounds, n_envs=2, config=plans)
    found = cost_of(model, info, theirs.solve(info)["actions"][:, None])
    assert (found < cost_of(model, info, torch.zeros(2, 1, 3, 2 * BLOCK))).all()
    policy = package.policy.WorldModelPolicy(PlanningSolver(model, PlannerConfig(samples=32, std=0.5)), plans)

    class Environments:
        num_envs, action_space, single_action_space = 2, bounds, spaces.Box(-1, 1, (2,), np.float32)

    policy.set_env(Environments())
    taken = np.stack([policy.get_action(dict(info)) for _ in range(5)])
    assert taken.shape == (5, 2, 2) and np.abs(taken).max() <= 1 and taken.std() > 0
