"""Exploration: what the networks know, what they do not, and what of it reaches the returns."""

import math

import pytest
import torch
from worldmodel_examples import random_batch, small_model

from worldmodel.learning.learner import Learner, LearnerConfig
from worldmodel.learning.objectives import ObjectiveConfig, imagine_returns, model_loss
from worldmodel.model.decision import DecisionConfig
from worldmodel.model.exploration import Exploration, ExplorationConfig
from worldmodel.model.latents import CategoricalConfig, GaussianConfig

LATENTS = [CategoricalConfig(variables=1, classes=2, unimix_ratio=0), GaussianConfig(size=1)]
SHORT = ObjectiveConfig(horizon=2, imagination_starts=2)


def exploring(latent=LATENTS[0], **settings):
    torch.manual_seed(0)
    return Exploration(3, 2, latent.build(), ExplorationConfig(**{"bonus": 1.0, "networks": 2, **settings}))


def saying(exploration, *outputs):
    """Each network gives its ``outputs``, whatever it sees."""
    last = exploration.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(outputs).unsqueeze(1))
    return exploration


@pytest.mark.parametrize("latent", LATENTS)
def test_what_the_networks_agree_on_tells_nothing(latent):
    exploration = saying(exploring(latent), [0.3, -0.2], [0.3, -0.2])
    torch.testing.assert_close(exploration.information(torch.randn(4, 3), torch.zeros(4, 2)), torch.zeros(4))


def test_two_certain_networks_that_differ_tell_one_bit():
    exploration = saying(exploring(), [30.0, 0.0], [0.0, 30.0])
    told = exploration.information(torch.randn(2, 5, 3), torch.zeros(2, 5, 2))
    torch.testing.assert_close(told, torch.full((2, 5), math.log(2)))


def test_of_several_variables_the_information_is_the_sum_of_theirs():
    """Networks that differ in both of two variables tell one bit in all, and two by the sum."""
    latent = CategoricalConfig(variables=2, classes=2, unimix_ratio=0.0)
    exploration = saying(exploring(latent), [30.0, 0.0, 30.0, 0.0], [0.0, 30.0, 0.0, 30.0])
    told = exploration.information(torch.randn(4, 3), torch.zeros(4, 2))
    torch.testing.assert_close(told, torch.full((4,), 2 * math.log(2)))


def test_of_normal_latents_the_information_is_that_of_their_moments():
    spread, mean, config = 0.4, 2.0, GaussianConfig(size=1)
    std = config.min_std + math.log1p(math.exp(spread))
    exploration = saying(exploring(config), [mean, spread], [-mean, spread])
    told = exploration.information(torch.randn(4, 3), torch.zeros(4, 2))
    torch.testing.assert_close(told, torch.full((4,), 0.5 * math.log1p((mean / std) ** 2)))


def test_each_network_is_one_of_its_own():
    """The rows of ParallelLinear do not mix: the gradient of one network's output is zero in the others."""
    exploration = exploring(networks=3, layers=2)
    exploration(torch.randn(5, 3), torch.randn(5, 2))[1].square().sum().backward()
    for name, parameter in exploration.named_parameters():
        sizes = parameter.grad.flatten(1).abs().sum(1)
        assert sizes[1] > 0 and not sizes[0] and not sizes[2], name


@pytest.mark.parametrize("latent", [CategoricalConfig(variables=2, classes=4), GaussianConfig(size=4)])
def test_what_was_learned_tells_less_than_what_was_never_seen(latent):
    exploration = exploring(latent, networks=5)
    optimizer = torch.optim.Adam(exploration.parameters(), lr=3e-3)
    features, seen, unseen = torch.randn(64, 3), torch.eye(2)[[0] * 64], torch.eye(2)[[1] * 64]
    posterior = latent.build().distribution(torch.randn(64, latent.build().outputs))
    for _ in range(300):
        optimizer.zero_grad()
        exploration.loss(features, seen, posterior).mean().backward()
        optimizer.step()
    known, unknown = (exploration.information(features, action).mean() for action in (seen, unseen))
    assert known < 0.2 * unknown, (known, unknown)


def test_nothing_but_the_networks_learns_from_their_loss():
    model = small_model(exploration=ExplorationConfig(bonus=1.0))
    batch = random_batch(model)
    observed = model.observe(batch)
    actions = model.action_spec.encode(batch.actions)[:, :-1]
    loss = model.exploration.loss(observed.features[:, :-1], actions, observed.posterior[:, 1:])
    loss.mean().backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"exploration"}


@pytest.mark.parametrize("gradient", ["all_action", "reinforce", "pathwise"])
def test_the_bonus_is_in_the_returns(gradient):
    model = small_model(exploration=ExplorationConfig(bonus=2.0), decision=DecisionConfig(16, gradient=gradient))
    observed = model.observe(random_batch(model), states_after=[4])
    mask = torch.ones(3, dtype=torch.bool)
    found = imagine_returns(model, observed.states_after, mask, SHORT)
    first = model.exploration.information(found.imagined.features[:, :1], found.imagined.actions[:, :1])
    torch.testing.assert_close(found.bonus[:, :1], 2 * first)
    assert first.min() > 0
    model.exploration.config = ExplorationConfig(bonus=0.0)
    torch.manual_seed(1)
    without = imagine_returns(model, observed.states_after, mask, SHORT)
    model.exploration.config = ExplorationConfig(bonus=2.0)
    torch.manual_seed(1)
    again = imagine_returns(model, observed.states_after, mask, SHORT)
    assert (again.returns > without.returns).all()


def test_an_update_learns_it_and_says_so():
    model = small_model(exploration=ExplorationConfig(bonus=1.0))
    batch = random_batch(model)
    learner = Learner(model, LearnerConfig(objective=SHORT, warm_up=1))
    told = [learner.update(batch) for _ in range(8)]
    assert told[-1]["loss/exploration"] < told[0]["loss/exploration"]
    assert {"policy/bonus", "gradient/exploration"} <= told[0].keys()


def test_without_a_bonus_there_is_nothing_of_it():
    model = small_model()
    _, metrics = model_loss(model, batch := random_batch(model), model.observe(batch), SHORT)
    assert model.exploration is None and "loss/exploration" not in metrics
    assert not any("exploration" in name for name in model.state_dict())
