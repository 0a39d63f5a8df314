"""Losses, the learner, and small problems for every learning method."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from worldmodel_examples import MEMORIES, random_batch, set_reward_scale, small_model

from worldmodel.acting.agent import Agent
from worldmodel.data.batch import Batch
from worldmodel.learning.learner import Learner, LearnerConfig, NonFiniteError
from worldmodel.learning.objectives import ObjectiveConfig, model_loss, replayed_value_loss
from worldmodel.learning.reduction import Reduction
from worldmodel.learning.running_stats import (
    ReturnNormaliser,
    update_reward_scale,
    update_standardisation,
)
from worldmodel.model.decision import DecisionConfig
from worldmodel.model.evaluation import EvaluationConfig, lambda_returns
from worldmodel.model.exploration import ExplorationConfig
from worldmodel.model.latents import CategoricalConfig
from worldmodel.model.networks import ScalarConfig, ScalarHead
from worldmodel.model.perception import PerceptionConfig
from worldmodel.model.policies import ContinuousPolicy
from worldmodel.model.prediction import PredictionConfig
from worldmodel.model.reward_scale import RewardScale
from worldmodel.runs.fields import ConfigurationError

BOX = spaces.Box(-1, 1, (2,))
WAYS = [("all_action", None), ("reinforce", None), ("pathwise", None), ("reinforce", BOX), ("pathwise", BOX)]
EVERY_WAY = pytest.mark.parametrize(
    ("gradient", "done"), WAYS, ids=[f"{w}-{'box' if d else 'discrete'}" for w, d in WAYS]
)


def learner_of(model, **objective):
    return Learner(
        model, LearnerConfig(objective=ObjectiveConfig(**{"horizon": 3, "imagination_starts": 3, **objective}))
    )


@EVERY_WAY
@pytest.mark.parametrize("memory", ["rotary_scan", "gru", "gated_conv"])
def test_the_joint_loss_reaches_all_five_functions(gradient, done, memory):
    model = small_model(done=done, memory=MEMORIES[memory], decision=DecisionConfig(hidden=16, gradient=gradient))
    learner_of(model).losses(random_batch(model)).total.backward()
    functions = (model.perception, model.memory, model.prediction, model.evaluation.network, model.decision)
    for function in (*functions, model.entry):
        for name, parameter in function.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (type(function).__name__, name)


@EVERY_WAY
def test_the_gain_of_the_policy_changes_the_policy_alone(gradient, done):
    model = small_model(done=done, decision=DecisionConfig(hidden=16, gradient=gradient))
    learner, other, batch = learner_of(model), learner_of(copy.deepcopy(model)), random_batch(model)
    other._update_batch_statistics(batch)
    torch.manual_seed(3)
    forward = other._forward(batch)
    other._update_return_statistics(forward.found)
    losses, copied = other._losses(forward), other.world_model
    rest, other_rest = (
        [p for part in (m.perception, m.memory, m.prediction) for p in part.parameters()] for m in (model, copied)
    )
    expected = torch.autograd.grad(losses.model + losses.value, other_rest, retain_graph=True)
    policy = torch.autograd.grad(losses.policy, list(copied.decision.parameters()))
    norm = torch.stack([g.norm() for g in policy]).norm()
    torch.manual_seed(3)
    metrics = learner.update(batch)
    assert metrics["gradient/policy"] == pytest.approx(norm.item())
    scale = min(1.0, learner.config.max_grad_norm / metrics["gradient/model"])
    for parameter, gradient in zip(rest, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * scale, rtol=1e-5, atol=1e-12)


def test_losses_count_every_step_that_they_should_and_no_other():
    model = small_model()
    batch = random_batch(model)
    batch.loss_mask[:, :2] = False
    set_reward_scale(model, 2.0)
    observed = model.observe(batch)
    _, parts = model_loss(model, batch, observed, ObjectiveConfig(free_nats=0.5))
    predicted = model.predict(observed, batch)
    sums = {name: [] for name in ("reward", "continuation", "dynamics", "representation", "reconstruction")}
    reconstruction = model.perception.reconstruction_loss(observed.latent, batch.observations)
    for row in range(3):
        for t in range(2, 14):
            if not batch.valid[row, t]:
                continue
            sums["reconstruction"].append(reconstruction[row, t])
            if batch.is_last[row, t]:
                continue
            sums["reward"].append((predicted.reward[row, t, 0] - batch.rewards[row, t] / 2).square())
            goes_on = torch.tensor(0.0 if batch.terminated[row, t] else 1.0, dtype=torch.float64)
            sums["continuation"].append(F.binary_cross_entropy_with_logits(predicted.continues[row, t], goes_on))
            if t + 1 < 14:
                p, q = observed.posterior[row, t + 1], predicted.prior[row, t]
                sums["dynamics"].append((p * (p.log() - q.log())).sum())
                sums["representation"].append(sums["dynamics"][-1].clamp(min=0.5))
    for name, values in sums.items():
        torch.testing.assert_close(parts[f"loss/{name}"], torch.stack(values).mean(), rtol=1e-10, atol=1e-10)


def test_what_stands_on_padding_is_never_read():
    model = small_model()
    batch = random_batch(model)
    dirty = batch.map(torch.clone)
    dirty.rewards[batch.is_last] = torch.nan
    dirty.actions[batch.is_last] = 2
    dirty.observations["place"][~batch.valid] = 1e6
    gradients = []
    for given in (batch, dirty):
        learner = learner_of(copy.deepcopy(model))
        torch.manual_seed(1)
        losses = learner.losses(given)
        losses.total.backward()
        gradients.append([losses.total, *(p.grad for p in learner.world_model.parameters() if p.grad is not None)])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_rewards_of_any_size_are_learned_alike():
    model = small_model(dtype=torch.float32)
    batch = random_batch(model)
    found, units = [], []
    for scale in (1.0, 2.0**-10):
        learner = learner_of(copy.deepcopy(model))
        torch.manual_seed(1)
        given = dataclasses.replace(batch, rewards=batch.rewards * scale)
        metrics = [learner.update(given) for _ in range(2)][-1]
        assert metrics["scale/reward"] == pytest.approx(batch.rewards[~batch.is_last].square().mean().sqrt() * scale)
        found.append({name: value for name, value in metrics.items() if name[:4] in ("loss", "grad")})
        agent = Agent(learner.world_model, model.observation_spec, model.action_spec)
        state = learner.world_model.observe(batch).state
        q, actions = agent.action_values(state)
        rewards = agent.imagined_rewards(state, np.ones((3, 4), np.int64))
        units.append([values / scale for values in (agent.value(state), q, rewards)])
        assert actions.tolist() == [0, 1, 2] and q.shape == (3, 3) and rewards.shape == (3, 4)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    for one, other in zip(*units, strict=True):  # agents use the environment's units
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bonus", [0.0, 0.5])
def test_values_of_replayed_steps_are_those_of_the_rewards_that_were_got(bonus):
    """Returns end where an episode does, and go on from the target's value at a truncation and at a row's end."""
    model = small_model(
        evaluation=EvaluationConfig(16, discount=0.9, lambda_=0.7), exploration=ExplorationConfig(bonus)
    )
    batch = random_batch(model, time=16)
    batch.loss_mask[:, :2] = False
    batch.reward_mask[0, 11] = False
    set_reward_scale(model, 2.0)
    observed = model.observe(batch)
    with torch.no_grad():
        values = model.evaluation.value(observed.features, target=True)
        more = torch.zeros(values.shape)
        if bonus:
            actions = model.action_spec.encode(batch.actions).to(values.dtype)
            more = model.exploration.bonus(observed.features, actions)

    def return_from(row, t):
        if t + 1 == 16 or batch.is_last[row, t] or not batch.valid[row, t] or not batch.reward_mask[row, t]:
            return None
        later, value = return_from(row, t + 1), values[row, t + 1]
        goes_on = value if later is None else 0.3 * value + 0.7 * later
        return batch.rewards[row, t] / 2 + more[row, t] + (0 if batch.terminated[row, t] else 0.9 * goes_on)

    errors = [
        (model.evaluation.value(observed.features[row, t]) - found).square()
        for row in range(3)
        for t in range(2, 16)
        if (found := return_from(row, t)) is not None
    ]
    loss = replayed_value_loss(model, batch, observed, ObjectiveConfig(value_gradient=0.25))
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    weights = list(model.memory.parameters())
    for gradient, whole in zip(
        torch.autograd.grad(loss, weights, retain_graph=True),
        torch.autograd.grad(torch.stack(errors).mean(), weights),
        strict=True,
    ):
        torch.testing.assert_close(gradient, 0.25 * whole)


def test_replayed_values_are_a_part_of_the_value_loss():
    model = small_model()
    batch, losses = random_batch(model), []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        losses.append(learner_of(model, replayed_value=weight).losses(batch))
    assert "loss/replayed_value" not in losses[0].metrics
    torch.testing.assert_close(losses[1].value, losses[0].value + 0.5 * losses[1].metrics["loss/replayed_value"])


def test_values_of_actions_that_cannot_be_enumerated_are_refused():
    model = small_model(done=BOX, dtype=torch.float32)
    agent = Agent(model, model.observation_spec, model.action_spec)
    with pytest.raises(ValueError, match="expected at most 16 discrete ones"):
        agent.action_values(model.init_state(1))


def test_the_scale_is_that_of_rewards_that_are_not_zero():
    scale = RewardScale(memory=4)
    assert float(scale.scale) == 1.0
    update_reward_scale(scale, torch.zeros(10))
    assert float(scale.scale) == 1.0
    update_reward_scale(scale, torch.tensor([0.0, 3.0, 0.0, -3.0]))
    assert float(scale.scale) == pytest.approx(3.0)
    update_reward_scale(scale, torch.tensor([4.0, 4.0]))
    assert float(scale.scale) == pytest.approx(((9 + 9 + 16 + 16) / 4) ** 0.5)
    update_reward_scale(scale, torch.full((4,), 5.0))
    assert float(scale.scale) == pytest.approx(5.0)
    other = RewardScale(memory=4)
    other.load_state_dict(scale.state_dict())
    assert other.scale == scale.scale


def test_returns_are_measured_by_their_percentiles_above_a_floor():
    normaliser = ReturnNormaliser(floor=1.0, decay=0.5)
    normaliser.update(torch.full((100,), 7.0))
    assert normaliser.scale == 1.0
    normaliser.update(torch.linspace(0, 100, 101))
    assert normaliser.scale == pytest.approx((95 - 7) / 2 + 7 - (7 + 5) / 2 - 0, abs=1e-3)
    other = ReturnNormaliser(floor=1.0, decay=0.5)
    other.load_state_dict(normaliser.state_dict())
    for each in (other, normaliser):
        each.update(torch.zeros(3))
        each.update(torch.tensor([torch.inf]))
    assert other.scale == normaliser.scale < 100
    for name in ("low", "high"):
        with pytest.raises(ValueError, match=f"returns.{name} is nan, expected a finite number"):
            other.load_state_dict({**normaliser.state_dict(), name: float("nan")})
    fresh = ReturnNormaliser(floor=1.0)
    fresh.load_state_dict({"low": None, "high": 0.0})  # of release 0.1.0
    assert fresh.state_dict() == {"low": None, "high": None}


def test_lambda_returns_are_their_recursion():
    rewards, discounts, values = (torch.rand(3, 9, dtype=torch.float64) for _ in range(3))
    expected, after = torch.zeros(3, 9, dtype=torch.float64), values[:, -1]
    for t in reversed(range(9)):
        after = rewards[:, t] + discounts[:, t] * (0.3 * values[:, t] + 0.7 * after)
        expected[:, t] = after
    torch.testing.assert_close(lambda_returns(rewards, discounts, values, 0.7), expected, rtol=1e-12, atol=1e-12)
    one_step = rewards + discounts * values
    torch.testing.assert_close(lambda_returns(rewards, discounts, values, 0.0), one_step, rtol=1e-12, atol=1e-12)


def test_the_probability_of_clipped_actions_is_that_of_their_draws():
    torch.manual_seed(0)
    policy = ContinuousPolicy(torch.tensor([[1.5, 3.0]]).expand(200_000, 2), min_std=0.1, max_std=1.0)
    drawn = policy.sample()
    for end, sign in ((-1.0, -1), (1.0, 1)):
        share = (drawn == end).float().mean()
        said = policy.log_probability(torch.full((200_000, 1), end))[0].exp()
        torch.testing.assert_close(said, share, rtol=0, atol=0.005)
        assert sign * end == 1.0
    inside = torch.linspace(-1, 1, 2001)[1:-1, None]
    density = ContinuousPolicy(torch.tensor([[1.5, 3.0]]), 0.1, 1.0).log_probability(inside).exp()
    torch.testing.assert_close(density.sum() * 0.001, (drawn.abs() < 1).float().mean(), rtol=0, atol=0.005)


@pytest.mark.parametrize("kind", ["mean", "two_hot"])
def test_a_number_head_comes_to_say_the_mean(kind):
    torch.manual_seed(0)
    head = ScalarHead(2, ScalarConfig(kind, bins=21))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    which = F.one_hot(torch.arange(2).repeat(64), 2).float()
    assert head.mean(head(which)).abs().max() < 1e-6
    for _ in range(400):
        noise = torch.randint(0, 2, (128,)) * 2.0 - 1
        target = torch.where(which[:, 0] > 0, 5 + 3 * noise, -0.25 + 0.1 * noise)
        optimizer.zero_grad()
        head.loss(head(which), target).mean().backward()
        optimizer.step()
    torch.testing.assert_close(head.mean(head(torch.eye(2))), torch.tensor([5.0, -0.25]), rtol=0, atol=0.5)


def test_a_learner_that_is_saved_and_loaded_goes_on_bit_for_bit():
    model = small_model(dtype=torch.float32)
    batches = [random_batch(model) for _ in range(5)]
    learner = learner_of(model)
    for batch in batches[:3]:
        learner.update(batch)
    weights, state = copy.deepcopy((model.state_dict(), learner.state_dict()))
    other = learner_of(small_model(dtype=torch.float32))
    other.world_model.load_state_dict(weights)
    other.load_state_dict(state)
    ends = []
    for each in (learner, other):
        torch.manual_seed(9)
        metrics = [each.update(batch) for batch in batches[3:]]
        ends.append(
            (each.world_model.state_dict(), [{k: v for k, v in f.items() if "seconds" not in k} for f in metrics])
        )
    assert ends[0][1] == ends[1][1]
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert learner.updates == other.updates == 5


@pytest.mark.parametrize("what", ["reward", "weight"])
def test_nan_stops_an_update_before_anything_changes(what):
    model = small_model(dtype=torch.float32)
    learner, batch = learner_of(model), random_batch(model)
    learner.update(batch)
    if what == "reward":
        batch.rewards[0, 0] = torch.nan
    else:
        with torch.no_grad():
            model.entry.weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match="at update 1"):
        learner.update(batch)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    batch.rewards[0, 0] = 0.0
    if what == "reward":
        learner.update(batch)


@EVERY_WAY
def test_losses_move_nothing_but_the_random_generator_and_held_out_losses_not_even_that(gradient, done):
    model = small_model(
        done=done,
        dtype=torch.float32,
        decision=DecisionConfig(hidden=16, gradient=gradient),
        prediction=PredictionConfig(hidden=16, reward=ScalarConfig("two_hot")),
        evaluation=EvaluationConfig(hidden=16, value=ScalarConfig("two_hot")),
    )
    learner, batch = learner_of(model), random_batch(model)
    learner.update(batch)
    batch.rewards *= 1e3  # would change every statistic
    before = copy.deepcopy((model.state_dict(), learner.state_dict()))
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    held_out = learner.held_out_losses(batch, seed=4)
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(4)
    losses = learner.losses(batch)
    assert held_out == {name: float(value) for name, value in losses.metrics.items()}
    assert held_out["loss/model"] == losses.model.item() and held_out["loss/policy"] == losses.policy.item()
    for now, then in zip((model.state_dict(), learner.state_dict()), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0)
    learner.update(batch)
    assert model.reward_scale.scale > 10 * before[0]["reward_scale.mean_square"].sqrt()


@EVERY_WAY
def test_an_unknown_reward_is_never_read(gradient, done):
    model = small_model(done=done, dtype=torch.float32, decision=DecisionConfig(hidden=16, gradient=gradient))
    batch = random_batch(model)
    batch.reward_mask[0] = batch.reward_mask[1, 3:] = False
    found = []
    for unknown in (0.0, torch.nan, 1e6):
        given = batch.map(torch.clone)
        given.rewards[~given.reward_mask] = unknown
        learner = learner_of(copy.deepcopy(model))
        torch.manual_seed(1)
        metrics = learner.update(given)
        found.append(
            (
                {name: value for name, value in metrics.items() if "seconds" not in name},
                learner.world_model.state_dict(),
                learner.state_dict(),
            )
        )
    assert found[0][0] == found[1][0] == found[2][0]
    for other in found[1:]:
        torch.testing.assert_close(other[1:], found[0][1:], rtol=0, atol=0)
    # Unknown rewards have no loss.
    observed = model.observe(batch)
    _, parts = model_loss(model, batch, observed, ObjectiveConfig())
    predicted = model.predict(observed, batch).reward.squeeze(-1)
    expected = (predicted - batch.rewards)[batch.reward_mask & ~batch.is_last & batch.valid].square().mean()
    torch.testing.assert_close(parts["loss/reward"], expected.detach())


@EVERY_WAY
def test_without_any_reward_the_world_is_learned_and_nothing_else(gradient, done):
    model = small_model(done=done, dtype=torch.float32, decision=DecisionConfig(hidden=16, gradient=gradient))
    batch = random_batch(model)
    batch.reward_mask[:] = False
    batch.rewards[:] = torch.nan
    before = copy.deepcopy(model.state_dict())
    metrics = learner_of(model).update(batch)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("memory") for name in changed) and any(name.startswith("perception") for name in changed)
    kept = ("evaluation.network", "decision", "prediction.reward", "reward_scale")
    assert not [name for name in changed if name.startswith(kept)]
    assert metrics["loss/reward"] == metrics["loss/value"] == metrics["loss/policy"] == 0


def test_targets_that_are_not_finite_reach_no_buffer():
    scale = RewardScale()
    update_reward_scale(scale, torch.tensor([torch.nan, 2.0, torch.inf]))
    assert scale.scale == 2.0
    model = small_model(dtype=torch.float32)
    batch = random_batch(model)
    update_standardisation(model.perception, batch.observations, batch.valid)
    before = copy.deepcopy(model.state_dict())
    batch.observations["place"][:] = torch.nan
    update_standardisation(model.perception, batch.observations, batch.valid)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Doubled(Reduction):
    """Simulates a second process with the same batch."""

    def __init__(self):
        self.gradients = []

    def reduce_statistics(self, values):
        return torch.cat([values, values])

    def reduce_gradients(self, parameters):
        self.gradients.append([parameter.grad.clone() for parameter in parameters])
        for parameter in parameters:
            parameter.grad.mul_(0.5)


def test_statistics_and_gradients_pass_through_the_reduction():
    model = small_model(
        dtype=torch.float32,
        prediction=PredictionConfig(hidden=16, reward=ScalarConfig("two_hot")),
        evaluation=EvaluationConfig(hidden=16, value=ScalarConfig("two_hot")),
    )
    batch, doubled = random_batch(model), Doubled()
    ends = []
    for reduction in (Reduction(), doubled):
        learner = Learner(copy.deepcopy(model), LearnerConfig(max_grad_norm=1e9), reduction)
        torch.manual_seed(1)
        ends.append((learner.update(batch), dict(learner.world_model.named_buffers()), learner.state_dict()))
    (alone, buffers, learned), (both, twice, learned_twice) = ends
    for group in ("model", "value", "policy"):
        assert both[f"gradient/{group}"] == pytest.approx(alone[f"gradient/{group}"] / 2, rel=1e-5)
    assert len(doubled.gradients) == 3
    # Duplicated values keep mean, range and percentiles, and double the count.
    for name, value in buffers.items():
        if name.endswith("count"):
            assert twice[name] == 2 * value > 0, name
        else:
            torch.testing.assert_close(twice[name], value, rtol=1e-6, atol=1e-6)
    assert learned_twice["returns"] == pytest.approx(learned["returns"], abs=0.1)


def test_a_failed_update_puts_statistics_back(monkeypatch):
    model = small_model(dtype=torch.float32, evaluation=EvaluationConfig(hidden=16, value=ScalarConfig("two_hot")))
    learner, batch = learner_of(model), random_batch(model)
    learner.update(batch)
    before = copy.deepcopy((model.state_dict(), learner.state_dict()))
    batch.rewards *= 100
    handle = model.decision.network[0].weight.register_hook(lambda value: value * torch.nan)
    with pytest.raises(NonFiniteError, match="the gradient of the policy group is nan at update 1"):
        learner.update(batch)
    handle.remove()
    for now, then in zip((model.state_dict(), learner.state_dict()), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def coin_flips(model, batch=8, time=32):
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    is_first[:, 0] = True
    ones = torch.ones_like(is_first)
    observations = {"observation": torch.randint(2, (batch, time, 1), dtype=torch.uint8)}
    return Batch(observations, torch.randint(2, (batch, time)), torch.zeros(batch, time), ~ones, ~ones, is_first, ones)


def test_a_latent_keeps_what_is_random():
    """Without free nats, a KL loss on the posterior makes it ignore unpredictable coin flips."""
    kept = {}
    for name, objective in (("ours", {}), ("all costs", {"representation": 1.0, "free_nats": 0.0})):
        torch.manual_seed(0)
        model = small_model(
            seen=spaces.Discrete(2),
            done=spaces.Discrete(2),
            dtype=torch.float32,
            perception=PerceptionConfig(CategoricalConfig(variables=2, classes=4), hidden=16),
        )
        config = ObjectiveConfig(imagination_starts=1, horizon=1, **objective)
        learner = Learner(model, LearnerConfig(model_lr=0.01, warm_up=1, objective=config))
        for _ in range(120):
            learner.update(coin_flips(model))
        batch = coin_flips(model)
        with torch.no_grad():
            mode = model.perception.latent.mode(model.observe(batch).posterior)
            said = model.perception.reconstruct(mode)["observation"]
        kept[name] = (said == batch.observations["observation"]).float().mean().item()
    assert kept["ours"] > 0.99
    assert kept["all costs"] < 0.8


@EVERY_WAY
def test_every_way_of_deciding_learns_to_answer_what_is_seen(gradient, done):
    torch.manual_seed(0)
    box = done is not None
    model = small_model(
        seen=spaces.Box(-1, 1, (2,)) if box else spaces.Discrete(3),
        done=done,
        dtype=torch.float32,
        memory=dataclasses.replace(MEMORIES["none"], width=32),
        perception=PerceptionConfig(CategoricalConfig(variables=4, classes=8), hidden=32),
        prediction=PredictionConfig(hidden=32),
        decision=DecisionConfig(hidden=32, gradient=gradient, entropy=0.01),
    )
    config = LearnerConfig(
        model_lr=0.01,
        value_lr=0.01,
        policy_lr=3e-3,
        warm_up=1,
        objective=ObjectiveConfig(horizon=2, imagination_starts=4),
    )
    learner = Learner(model, config)

    def batch():
        given = random_batch(model, batch=16, time=8, resets=False)
        if box:
            modality = given.observations["observation"].uniform_(-0.8, 0.8)
            given.rewards = -(modality - given.actions).square().sum(-1)
        else:
            given.rewards = (given.observations["observation"].squeeze(-1) == given.actions).float()
        return given

    for _ in range(300 if box else 200):
        learner.update(batch())
    test = batch()
    with torch.no_grad():
        answers = model.action_spec.decode(model.decision(model.observe(test).features).mode())
    asked = test.observations["observation"]
    if box:
        assert (answers - asked).square().sum(-1).mean() < 0.12 < asked.square().sum(-1).mean() / 3
    else:
        assert (answers == asked.squeeze(-1)).float().mean() > 0.95


def test_rows_that_are_sampled_see_what_imagination_sees_and_the_others_their_means():
    """With the recorded actions, memory is in the state that as many imagined steps with the same latents reach."""
    model = small_model()
    batch = random_batch(model)
    batch.is_first[:, 1:] = False
    batch.is_last[:] = False
    sampled = torch.tensor([True, False, True])
    observed = model.observe(batch, states_after=[1], sampled=sampled)
    state = observed.states_after
    latents = iter(observed.latent[:, 1:].unbind(1))
    actions = model.action_spec.encode(batch.actions)[:, :-1]
    imagined = model.imagine_actions(state, actions, sample=lambda prior: next(latents))
    same = torch.isclose(imagined.features, observed.features, rtol=1e-9, atol=1e-9).all(-1)
    assert same[sampled].all() and not same[~sampled, 1:].any()
    torch.testing.assert_close(model.observe(batch).features[~sampled], observed.features[~sampled])


@pytest.mark.parametrize(("share", "rows"), [(0.0, (0, 0)), (1.0, (300, 300)), (0.25, (50, 100))])
def test_the_share_of_sampled_rows_is_that_of_the_settings(monkeypatch, share, rows):
    model = small_model()
    learner, batch, seen = learner_of(model, sampled=share), random_batch(model), []
    observe = model.observe
    monkeypatch.setattr(model, "observe", lambda *args, sampled, **kw: seen.append(sampled) or observe(*args, **kw))
    learner.losses(batch)
    torch.manual_seed(0)
    drawn = [seen[0]] if share in (0, 1) else [learner._sampled_rows(batch) for _ in range(100)]
    assert rows[0] <= sum(0 if mask is None else int(mask.sum()) for mask in drawn) * 100 / len(drawn) <= rows[1]


def test_sampled_rows_of_a_latent_without_samples_are_refused():
    model = small_model(perception=PerceptionConfig(CategoricalConfig(stochastic=False), hidden=16))
    with pytest.raises(ConfigurationError, match=r"sampled is 0.5, expected 0, as the latent is deterministic"):
        learner_of(model, sampled=0.5)


def test_weights_of_rare_classes_need_classes():
    with pytest.raises(ConfigurationError, match=r"rare is 0.5, which weighs classes, and observation has none"):
        small_model(seen=spaces.Box(-1, 1, (2,)), perception=PerceptionConfig(hidden=16, rare=0.5))


def test_a_sampled_row_trains_perception_through_memory():
    """Straight-through: the KL of later steps reaches the encoder by the latent that memory saw."""
    model = small_model()
    batch = random_batch(model)
    observed = model.observe(batch, sampled=torch.ones(3, dtype=torch.bool))
    observed.features[:, -1].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.perception.encoder.parameters())
