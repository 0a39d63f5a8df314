"""The autoregressive mixture density: it is a density, its order is that of the entries, and it learns two modes."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from worldmodel.model.mixture_density import MeanConfig, MixtureDensity, MixtureDensityConfig
from worldmodel.runs.fields import ConfigurationError


def density(entries=3, components=4, seed=0, **changed):
    torch.manual_seed(seed)
    return MixtureDensity(5, entries, MixtureDensityConfig(components=components, hidden=8, **changed)).double()


def test_it_is_the_product_of_the_entries_mixtures():
    model, features = density(), torch.randn(6, 5).double()
    actions = torch.randn(6, 3).double()
    mixture = model(features, actions)
    normals = MixtureSameFamily(Categorical(logits=mixture.log_weight), Normal(mixture.mean, mixture.std))
    expected = normals.log_prob(actions).sum(-1)
    torch.testing.assert_close(model.log_prob(features, actions), expected)
    torch.testing.assert_close(model.loss(features, actions), -expected)
    assert mixture.mean.shape == (6, 3, 4) and (mixture.std >= 0.05).all()


def test_it_integrates_to_one():
    model, features = density(entries=2), torch.randn(1, 5).double()
    axis = torch.linspace(-12, 12, 201).double()
    grid = torch.cartesian_prod(axis, axis)
    mass = model.log_prob(features.expand(len(grid), 5), grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_an_entry_depends_on_those_before_it_and_on_no_other():
    model, features = density(), torch.randn(1, 5).double()
    actions = torch.randn(1, 3).double()
    before = model(features, actions).mean[0]  # (entries, components)
    for entry in range(3):
        changed = actions.clone()
        changed[0, entry] += 1
        moved = (model(features, changed).mean[0] != before).any(-1)
        assert moved.tolist() == [other > entry for other in range(3)]


def test_samples_have_the_moments_of_the_density():
    model = density(entries=2, components=2)
    features = torch.randn(1, 5).double().expand(20_000, 5)
    samples = model.sample(features)
    mixture = model(features, samples)
    mean = (mixture.log_weight.exp() * mixture.mean).sum(-1)  # of each entry, given those drawn before
    square = (mixture.log_weight.exp() * (mixture.mean.square() + mixture.std.square())).sum(-1)
    torch.testing.assert_close(samples.mean(0), mean.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(samples.square().mean(0), square.mean(0), atol=0.06, rtol=0)


def test_at_temperature_zero_an_entry_is_the_mean_of_a_component():
    model, features = density(), torch.randn(50, 5).double()
    samples = model.sample(features, temperature=0.0)
    distance = (model(features, samples).mean - samples[..., None]).abs().min(-1).values
    assert distance.max() < 1e-12


def test_two_modes_are_learned_and_not_their_mean():
    """Left or right with equal probability, and the second entry goes with the first."""
    torch.manual_seed(0)
    mixture = MixtureDensityConfig(components=3, hidden=16).build(2, 2)
    mean = MeanConfig(hidden=16).build(2, 2)
    optimizer = torch.optim.Adam([*mixture.parameters(), *mean.parameters()], lr=0.02)
    features = torch.ones(128, 2)
    for _ in range(150):
        side = torch.randint(2, (128, 1)) * 2.0 - 1
        actions = torch.cat([0.7 * side, -0.5 * side], 1)
        optimizer.zero_grad()
        (mixture.loss(features, actions) + mean.loss(features, actions)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        drawn = mixture.sample(features, temperature=0.0)
        assert (drawn[:, 0].abs() - 0.7).abs().max() < 0.1 and 30 < (drawn[:, 0] > 0).sum() < 98
        torch.testing.assert_close(drawn[:, 1], -drawn[:, 0] * 5 / 7, atol=0.1, rtol=0)
        assert mean.sample(features).abs().max() < 0.2, "straight on, which nobody did"


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(ConfigurationError, match=r"min_std is 0\.0, expected a number, more than 0"):
        MixtureDensityConfig(min_std=0.0)
