import dataclasses
import math

import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import CONFIG, random_batch, small_model, step_by_step

from worldmodel.learning.learner import Learner, LearnerConfig
from worldmodel.model.latents import CategoricalConfig, EmbeddingConfig, GaussianConfig
from worldmodel.model.networks import ScalarConfig, ScalarHead
from worldmodel.model.perception import PerceptionConfig
from worldmodel.model.policies import DiscretePolicy

LATENTS = {
    "categorical": CategoricalConfig(variables=3, classes=4),
    "probabilities": CategoricalConfig(variables=3, classes=4, stochastic=False),
    "gaussian": GaussianConfig(size=5),
    "mean": GaussianConfig(size=5, stochastic=False),
    "embedding": EmbeddingConfig(size=5, reconstruction=1.0, inverse=0.5),
}
EVERY_LATENT = pytest.mark.parametrize("config", LATENTS.values(), ids=LATENTS)


def distributions(config, count=2, rows=6):
    """Distributions and their parameters."""
    latent = config.build()
    outputs = [torch.randn(rows, 2, latent.outputs, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    return latent, outputs, [latent.distribution(each) for each in outputs]


@EVERY_LATENT
def test_a_sample_a_mode_and_a_mean_have_the_shape_of_the_latent_and_a_gradient(config):
    latent, (outputs,), (p,) = distributions(config, 1)
    for choose in (latent.sample, latent.mode, latent.as_observed):
        z = choose(p)
        assert z.shape == (6, 2, *latent.shape) and latent.lead(z) == (6, 2)
        assert latent.embed(z).shape == (6, 2, latent.width)
        (gradient,) = torch.autograd.grad(
            (latent.embed(z) * torch.randn(6, 2, latent.width)).sum(), outputs, retain_graph=True
        )
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert latent.embed_mean(p).shape == (6, 2, latent.width)
    assert torch.equal(latent.mode(p), latent.mode(p))
    assert torch.equal(latent.sample(p), latent.sample(p)) != config.stochastic


@EVERY_LATENT
def test_the_kl_is_zero_of_a_distribution_from_itself_and_positive_from_another(config):
    latent, outputs, (p, q) = distributions(config)
    zero = torch.zeros(6, 2, dtype=torch.float64)
    torch.testing.assert_close(latent.kl(p, p), zero, rtol=0, atol=1e-12)
    assert (latent.kl(p, q) > 0).all() and latent.kl(p, q).shape == (6, 2)
    for gradient in torch.autograd.grad(latent.kl(p, q).sum(), outputs):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_the_kl_and_the_entropy_are_those_of_torch_distributions(name):
    latent, _, (p, q) = distributions(LATENTS[name])

    def torch_distribution(x):
        if name == "categorical":
            return torch.distributions.Independent(torch.distributions.Categorical(probs=x), 1)
        return torch.distributions.Independent(torch.distributions.Normal(*x.unbind(-2)), 1)

    one, two = torch_distribution(p), torch_distribution(q)
    torch.testing.assert_close(latent.kl(p, q), torch.distributions.kl_divergence(one, two))
    torch.testing.assert_close(latent.entropy(p), one.entropy())


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_the_mean_of_many_samples_is_the_mean(name):
    latent, _, (p,) = distributions(LATENTS[name], 1)
    with torch.no_grad():
        samples = torch.stack([latent.sample(p) for _ in range(4000)])
    torch.testing.assert_close(latent.embed(samples).mean(0), latent.embed_mean(p), rtol=0, atol=0.1)


@EVERY_LATENT
def test_memory_sees_a_prior_taken_as_observed_as_it_sees_a_posterior(config):
    latent, _, (p,) = distributions(config, 1)
    torch.testing.assert_close(latent.embed(latent.as_observed(p)), latent.embed_mean(p), rtol=0, atol=1e-12)


def test_unimix_keeps_every_class_and_is_a_distribution():
    config = CategoricalConfig(variables=2, classes=4, unimix_ratio=0.2)
    latent = config.build()
    p = latent.distribution(1e3 * torch.randn(7, latent.outputs))
    torch.testing.assert_close(p.sum(-1), torch.ones(7, 2))
    torch.testing.assert_close(p.min(), torch.tensor(0.05))


@EVERY_LATENT
def test_every_latent_goes_through_the_whole_world_model(config):
    model = small_model(perception=dataclasses.replace(CONFIG.perception, latent=config))
    batch = random_batch(model)
    observed = model.observe(batch)
    torch.testing.assert_close(observed.features, step_by_step(model, batch)[0], rtol=1e-9, atol=1e-9)
    imagined = model.imagine(observed.state, model.decision, 4)
    assert imagined.latent.shape == (3, 4, *model.perception.latent.shape)
    model = model.float()
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    Learner(model, LearnerConfig(warm_up=1)).update(random_batch(model))
    still = {name for name, value in model.named_parameters() if name in before and torch.equal(value, before[name])}
    assert not still


@EVERY_LATENT
def test_every_latent_learns_to_keep_what_it_observes(config):
    torch.manual_seed(0)
    model = small_model(
        seen=spaces.Box(-1, 1, (2,)), dtype=torch.float32, perception=PerceptionConfig(config, hidden=32)
    )
    learner = Learner(model, LearnerConfig(model_lr=0.01, warm_up=1))
    losses = [learner.update(random_batch(model, batch=8, resets=False))["loss/reconstruction"] for _ in range(60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_without_unimix_a_probability_of_zero_adds_nothing():
    latent = CategoricalConfig(variables=1, classes=3, unimix_ratio=0.0).build()
    outputs = torch.tensor([[0.0, 300.0, -300.0]], requires_grad=True)  # the softmax underflows
    other = torch.zeros(1, 3)
    policy = DiscretePolicy(outputs, (3,), 0.0)
    p, q = latent.distribution(outputs), latent.distribution(other)
    chosen = policy.log_probability(torch.tensor([[0.0, 1.0, 0.0]]))
    for value, expected in (
        (latent.kl(p, q), math.log(3)),
        (latent.entropy(p), 0.0),
        (policy.entropy(), 0.0),
        (chosen, 0.0),
    ):
        assert value.item() == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(value.sum(), outputs, retain_graph=True)
        assert gradient.isfinite().all()
    assert latent.kl(q, p).isfinite().all()


def test_one_far_target_moves_no_other_prediction_of_a_two_hot_head():
    torch.manual_seed(0)
    head = ScalarHead(2, ScalarConfig("two_hot"))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    which = torch.eye(2).repeat(64, 1)

    def fit(targets, updates):
        for _ in range(updates):
            optimizer.zero_grad()
            head.loss(head(which), targets.repeat(64)).mean().backward()
            optimizer.step()

    fit(torch.tensor([5.0, -1.0]), 500)
    before = head.mean(head(torch.eye(2))).detach()
    torch.testing.assert_close(before, torch.tensor([5.0, -1.0]), rtol=0.02, atol=0)
    state = {name: value.clone() for name, value in head.named_buffers()}
    head.loss(head(which[:1]), torch.tensor([100.0])).mean().backward()
    torch.testing.assert_close(dict(head.named_buffers()), state, rtol=0, atol=0)
    assert torch.equal(head.mean(head(torch.eye(2))), before)
    fit(torch.tensor([100.0, -1.0]), 500)
    torch.testing.assert_close(head.mean(head(torch.eye(2))), torch.tensor([100.0, -1.0]), rtol=0.02, atol=0)


def test_the_bins_of_a_two_hot_head_are_exact_in_between_and_ends_beyond():
    head = ScalarHead(2, ScalarConfig("two_hot", bins=9))
    assert head.centers[4] == 0 and head.centers[-1] == -head.centers[0] > 22_000
    assert head.mean(head(torch.randn(5, 2))).abs().max() < 1e-5  # untrained
    targets = torch.tensor([-1e9, -300.0, -0.5, 0.0, 7.25, 22_026.0, 1e9, torch.inf])
    logits = torch.zeros(len(targets), 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(head.loss(logits, targets).sum(), logits)
    said = head.mean((1 / 9 - gradient).clamp(min=0).log())  # of the distribution whose loss is smallest
    torch.testing.assert_close(said, targets.clamp(head.centers[0], head.centers[-1]), rtol=1e-4, atol=1e-2)


def test_an_unknown_target_of_a_two_hot_head_shows_in_its_loss_alone():
    head = ScalarHead(4, ScalarConfig("two_hot"))
    loss = head.loss(head(torch.randn(3, 4)), torch.tensor([0.5, math.nan, -1.0]))
    assert loss.isfinite().tolist() == [True, False, True]
