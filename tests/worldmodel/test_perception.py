import dataclasses

import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import CONFIG, MEMORIES, random_batch, small_model

from worldmodel.data.spaces import Modality
from worldmodel.learning.learner import Learner, LearnerConfig
from worldmodel.model.codecs import CategoricalCodec, GridCodec, ImageCodec, VectorCodec
from worldmodel.model.latents import CategoricalConfig
from worldmodel.model.networks import symlog
from worldmodel.model.perception import PerceptionConfig

EVERY_LATENT = pytest.mark.parametrize("stochastic", [True, False], ids=["sampled", "mean"])


def codec_of(*parts):
    codec = VectorCodec(Modality("vector", (parts[0].shape[1],), "float32"), hidden=8)
    for part in parts:
        codec.update(codec.moments(part)[None])
    return codec


def test_numbers_are_standardised_by_all_that_was_seen_however_it_came():
    torch.manual_seed(0)
    numbers = torch.randn(500, 3) * torch.tensor([0.01, 1.0, 1000.0]) + torch.tensor([0.3, -2.0, 0.0])
    logs = symlog(numbers)
    for parts in ([numbers], numbers.split([1, 99, 300, 100])):
        codec = codec_of(*parts)
        torch.testing.assert_close(codec.mean, logs.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(codec.deviation, logs.std(0, correction=0), rtol=1e-4, atol=0)
        read = codec.standardised(numbers)
        torch.testing.assert_close(read.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
        torch.testing.assert_close(read.std(0), torch.ones(3), rtol=0.01, atol=0)
        torch.testing.assert_close(codec.decode(read), numbers, rtol=1e-4, atol=1e-6)


def test_a_number_that_never_changes_is_not_blown_up():
    codec = codec_of(torch.full((100, 1), 0.7))
    distance = symlog(torch.tensor(0.8)) - symlog(torch.tensor(0.7))
    torch.testing.assert_close(codec.standardised(torch.tensor([[0.7], [0.8]])), torch.tensor([[0.0], [distance]]))
    assert codec_of(torch.zeros(0, 1)).standardised(torch.ones(1, 1)) == symlog(torch.ones(1, 1))


def test_what_an_almost_constant_number_jumps_to_is_bounded():
    codec = codec_of(torch.full((100, 1), 0.7) + 3e-5 * torch.randn(100, 1))
    numbers = torch.tensor([[0.7], [1.7], [-1e30]])
    read = codec.standardised(numbers)
    assert read[0].abs() < 1 and 15 < read[1] < 25 and -30 < read[2] < -15
    torch.testing.assert_close(codec.restored(read)[:2], numbers[:2], rtol=1e-3, atol=0)
    assert codec.loss(torch.zeros(3, 1), numbers).max() < 400
    steps = torch.linspace(-30, 30, 601, requires_grad=True)
    spread = codec_of(torch.randn(4000, 1).sinh())  # which symlog keeps wide
    (slope,) = torch.autograd.grad(spread.standardised(steps.sinh()[:, None]).sum(), steps)
    assert slope.min() > 0 and slope.isfinite().all()  # nothing is lost


CLASSES = Modality("categorical", (2,), "int64", sizes=(4, 3))
GRID = Modality("grid", (3, 3, 2), "uint8", sizes=(4, 4))


@pytest.mark.parametrize(("codec", "modality"), [(CategoricalCodec, CLASSES), (GridCodec, GRID)])
def test_a_class_weighs_what_it_tells_and_the_mean_weight_is_one(codec, modality):
    torch.manual_seed(0)
    codec = codec(modality, 8, rare=1.0)
    seen = torch.multinomial(torch.tensor([0.9, 0.09, 0.01]), 4000 * modality.shape[0] ** 2 * 2, replacement=True)
    seen = seen.view(-1, *modality.shape)
    for part in seen.split([1, 99, len(seen) - 100]):
        codec.update(codec.moments(part)[None])
    share = torch.bincount(seen[..., 1].flatten(), minlength=3) / seen[..., 1].numel()
    told = -share.log()
    torch.testing.assert_close(codec.weights()[1, :3].float(), told / (share * told).sum(), rtol=2e-2, atol=0)
    dim = 1 if modality is GRID else -1
    prediction = codec.reconstruct(torch.randn(50, 8))
    loss = -prediction.log_softmax(dim).gather(dim, seen[:50].unsqueeze(dim)).squeeze(dim)
    weights = codec.weights()[torch.arange(2), seen[:50]].float()
    torch.testing.assert_close(codec.loss(prediction, seen[:50]), (weights * loss).flatten(1).sum(1))


def test_a_class_that_was_never_seen_has_a_bounded_weight():
    codec = CategoricalCodec(CLASSES, 8, rare=1.0)
    many = codec.moments(torch.zeros(100_000, 2, dtype=torch.int64))[None]
    for _ in range(10_000):  # old counts fade to nothing by then
        codec.update(many)
    assert codec.weights()[0, 3] == 100 and codec.weights().isfinite().all()
    torch.testing.assert_close(codec.weights()[0, 0].item(), 0.0, rtol=0, atol=1)


def test_an_entry_of_one_class_weighs_one():
    modality = Modality("categorical", (2,), "int64", sizes=(1, 4))
    codec = CategoricalCodec(modality, 8, rare=1.0)
    codec.update(codec.moments(torch.tensor([[0, 3], [0, 1], [0, 3]]))[None])
    share = torch.tensor([1, 2, 1, 3]).double() / 7
    told = -share.log() / (share * -share.log()).sum()
    torch.testing.assert_close(codec.weights(), torch.stack([torch.ones(4).double(), told]))
    alone = Modality("categorical", (1,), "int64", sizes=(1,))
    assert CategoricalCodec(alone, 8, rare=1.0).weights().tolist() == [[1.0]]


def test_half_of_the_information_is_half_of_the_weight_and_nothing_is_counted_without():
    seen = torch.randint(3, (500, 2))
    codecs = [CategoricalCodec(CLASSES, 8, rare) for rare in (0.5, 1.0)]
    for codec in codecs:
        codec.update(codec.moments(seen)[None])
    torch.testing.assert_close(codecs[0].weights(), 0.5 + 0.5 * codecs[1].weights())
    assert not any("counts" in name for name in CategoricalCodec(CLASSES, 8).state_dict())


def test_training_counts_the_classes_of_valid_steps():
    model = small_model(spaces.MultiDiscrete([4, 3]), perception=PerceptionConfig(hidden=16, rare=1.0))
    batch = random_batch(model)
    Learner(model, LearnerConfig()).update(batch)
    (codec,), (seen,) = model.perception.codecs, batch.observations.values()
    expected = torch.stack([1 + torch.bincount(entry, minlength=4) for entry in seen[batch.valid].long().unbind(-1)])
    expected[1, 3] = 0  # it has three classes
    torch.testing.assert_close(codec.counts, expected.double())


def test_the_size_of_a_number_is_seen():
    """A layer norm of one number keeps only its sign."""
    model = small_model(seen=spaces.Box(-9, 9, (1,)))
    posterior = model.perception({"observation": torch.tensor([[0.1], [1.0], [5.0]])})
    assert (posterior[:-1] - posterior[1:]).abs().amax((1, 2)).min() > 0.01


def test_a_small_number_is_kept_as_well_as_a_large_one():
    torch.manual_seed(0)
    model = small_model(
        seen=spaces.Box(-100, 100, (2,)),
        dtype=torch.float32,
        memory=dataclasses.replace(MEMORIES["none"], width=16),
        perception=PerceptionConfig(CategoricalConfig(stochastic=False), hidden=32),
    )
    learner = Learner(model, LearnerConfig(model_lr=0.01))
    sizes = torch.tensor([0.02, 20.0])

    def batch():
        given = random_batch(model, batch=8, time=16, resets=False)
        given.observations["observation"].uniform_(-1, 1).mul_(sizes)
        return given

    for _ in range(150):
        learner.update(batch())
    with torch.no_grad():
        seen = batch()
        said = model.perception.reconstruct(model.observe(seen).latent)["observation"]
    (codec,) = model.perception.codecs
    lost = [codec.standardised(numbers.flatten(0, 1)) for numbers in (said, seen.observations["observation"])]
    assert (lost[0] - lost[1]).square().mean(0).max() < 0.05  # the variance is one


def test_padding_changes_no_running_scale():
    model = small_model(dtype=torch.float32)
    batch = random_batch(model)
    batch.observations["place"][~batch.valid] = 1e6
    Learner(model, LearnerConfig()).update(batch)
    (codec,) = [codec for codec in model.perception.codecs if isinstance(codec, VectorCodec)]
    torch.testing.assert_close(codec.mean, symlog(batch.observations["place"][batch.valid]).mean(0))


def test_a_latent_that_is_not_sampled_is_its_probabilities_and_its_future_is_one():
    perception = dataclasses.replace(CONFIG.perception, latent=CategoricalConfig(stochastic=False))
    model = small_model(perception=perception)
    batch = random_batch(model)
    observed = model.observe(batch)
    torch.testing.assert_close(observed.latent, observed.posterior, rtol=0, atol=0)
    assert model.perception.latent.mode(observed.posterior) is observed.posterior
    action = model.action_spec.encode(batch.actions[:, 0])
    futures = [model.imagine(observed.state, model.decision, 1, action) for _ in range(2)]
    torch.testing.assert_close(futures[0].features, futures[1].features, rtol=0, atol=0)
    sampled = small_model()
    state = sampled.observe(batch).state
    futures = [sampled.imagine(state, sampled.decision, 1, action) for _ in range(2)]
    assert (futures[0].latent != futures[1].latent).any()


@EVERY_LATENT
def test_memory_reads_an_imagined_latent_as_it_reads_an_observed_one(stochastic):
    latent = CategoricalConfig(variables=3, classes=4, stochastic=stochastic).build()
    logits = torch.randn(5, 3, 4, dtype=torch.float64)
    sample = certain = torch.nn.functional.one_hot(logits.argmax(-1), 4).double()
    posterior = latent.distribution((1e3 * certain if stochastic else logits).flatten(-2))
    if not stochastic:
        sample = latent.sample(posterior)
    torch.testing.assert_close(latent.embed(sample), latent.embed_mean(posterior), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [(64, 64), (30, 33), (9, 5)])
@pytest.mark.parametrize("upsampling", ["nearest", "transposed"])
@pytest.mark.parametrize("stride", [2, 4])
def test_a_decoder_draws_every_pixel_of_a_picture_of_any_size(upsampling, stride, side):
    torch.manual_seed(0)
    codec = ImageCodec(Modality("image", (*side, 3), "uint8"), 16, 4, stride, upsampling)
    one, other = codec.reconstruct(torch.randn(2, 16))
    assert one.shape == (3, *side)
    assert ((one - other).abs() > 1e-6).all()


@pytest.mark.parametrize("side", [(16, 16), (65, 65), (64, 48), (100, 67), (7, 5)])
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_every_pixel_is_seen_with_any_stride_of_the_first_convolution(side, stride):
    torch.manual_seed(0)
    codec = ImageCodec(Modality("image", (*side, 2), "uint8"), hidden=6, channels=3, stride=stride)
    assert min(codec.small[1:]) <= 4
    pictures = torch.randint(256, (2, *side, 2), dtype=torch.uint8)
    code = codec.encode(pictures)
    assert code.shape == (2, 6) and codec.reconstruct(code).shape == (2, 2, *side)
    planes = torch.rand(1, 2, *side, requires_grad=True)
    (gradient,) = torch.autograd.grad(codec.encode_planes(planes).square().sum(), planes)
    assert (gradient != 0).all()
