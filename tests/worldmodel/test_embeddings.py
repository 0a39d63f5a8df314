"""Latents that are learned by predicting them: what is compared, where gradients go, and what a collapse looks like."""

import copy
import dataclasses
import math

import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import CONFIG, MEMORIES, random_batch, small_model

from worldmodel.learning.latent_objective import collapse_notice, sigreg, spread, vicreg
from worldmodel.learning.learner import Learner, LearnerConfig
from worldmodel.learning.objectives import ObjectiveConfig, model_loss
from worldmodel.model.exploration import ExplorationConfig
from worldmodel.model.latents import EmbeddingConfig
from worldmodel.model.native_rollout import roll_out
from worldmodel.model.networks import FirstBatchNorm
from worldmodel.model.world_model import Batch, _memory_part
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.run import Run
from worldmodel.runs.warm_start import warm_start

BARE = EmbeddingConfig(size=5, sigreg=0.0, rollout=3)


def embedding_model(latent=BARE, done=None, dtype=torch.float64, **changed):
    torch.manual_seed(0)
    perception = dataclasses.replace(CONFIG.perception, latent=latent)
    return small_model(done=done or spaces.Box(-1, 1, (2,)), dtype=dtype, perception=perception, **changed)


def losses_of(model, batch, steps):
    observed = model.observe(batch, states_after=steps)
    return model_loss(model, batch, observed, ObjectiveConfig())


@pytest.mark.parametrize("memory", ["scan", "gru", "none"])
def test_errors_are_those_of_the_steps_that_follow_in_the_same_episode(memory):
    model = embedding_model(memory=MEMORIES[memory])
    batch, steps = random_batch(model), [1, 5, 11]
    batch.loss_mask = torch.rand(batch.shape) < 0.9
    _, metrics = losses_of(model, batch, steps)
    z = model.perception(batch.observations)
    single, rolled = [], []
    for row in range(3):
        for start in range(14):
            if not (batch.valid & batch.loss_mask & ~batch.is_last)[row, start]:
                continue
            whole = batch.map(lambda x, row=row: x[row : row + 1]).steps(0, start + 1)
            state = model.observe(whole).state
            for ahead in range(1, BARE.rollout + 1):
                at = start + ahead
                inside = at < 14 and not batch.is_last[row, at - 1] and batch.valid[row, at]
                if not inside or (ahead > 1 and not batch.loss_mask[row, at]):
                    break
                if ahead > 1 and start + 1 not in steps:
                    break
                actions = batch.actions[row : row + 1, start:at].double()
                error = (model.imagine_actions(state, actions).latent[0, -1] - z[row, at]).square().mean()
                if ahead == 1:
                    single.append(error)
                    if not batch.loss_mask[row, at]:
                        break
                if start + 1 in steps:
                    rolled.append(error)
    assert len(rolled) > len(steps) and len(single) > 20
    torch.testing.assert_close(metrics["loss/dynamics"], torch.stack(single).mean())
    torch.testing.assert_close(metrics["loss/rollout"], torch.stack(rolled).mean())


def test_the_gradient_into_the_targets_is_scaled():
    def gradient(scale):
        model = embedding_model(dataclasses.replace(BARE, target_gradient=scale))
        batch = random_batch(model)
        parameters = list(model.perception.encoder.parameters())
        grads = torch.autograd.grad(losses_of(model, batch, [2, 6])[0], parameters)
        return torch.cat([grad.flatten() for grad in grads])

    none, some, whole = gradient(0.0), gradient(0.1), gradient(1.0)
    torch.testing.assert_close(some, none + 0.1 * (whole - none))
    assert (whole - none).norm() > 0.1 * none.norm() > 0


def test_a_slow_encoder_gives_the_targets_and_follows():
    model = embedding_model(dataclasses.replace(BARE, tau=0.25, target_gradient=0.0))
    batch = random_batch(model)
    with torch.no_grad():
        for parameter in model.slow_perception.parameters():
            parameter += 0.1
    total, metrics = losses_of(model, batch, [1])
    total.backward()
    assert all(parameter.grad is None for parameter in model.slow_perception.parameters())
    observed = model.observe(batch)
    z, targets = observed.latent, model.slow_perception(batch.observations)
    followed = (batch.valid & ~batch.is_last)[:, :-1]
    errors = (model.predict(observed, batch).prior[:, :-1] - targets[:, 1:]).square().mean(-1)[followed]
    torch.testing.assert_close(metrics["loss/dynamics"], errors.mean())
    assert not torch.allclose(z, targets)
    before = [parameter.clone() for parameter in model.slow_perception.parameters()]
    model.update_targets()
    ahead = model.perception.parameters()
    for old, new, fast in zip(before, model.slow_perception.parameters(), ahead, strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * fast)


def test_the_first_batch_standardises_and_no_later_one():
    model = embedding_model(dataclasses.replace(BARE, tau=0.1))
    for _ in range(2):
        batch = random_batch(model)
        model.begin(batch)
        z = model.perception(batch.observations)[batch.valid]
        begun = bool(z.mean(0).abs().max() < 1e-9) and bool((z.var(0, correction=0) - 1).abs().max() < 1e-9)
        assert begun == (_ == 0)
        torch.testing.assert_close(model.slow_perception(batch.observations)[batch.valid], z)


def test_pictures_are_seen_by_what_differs_from_the_mean_of_the_first_batch():
    model = embedding_model(seen=spaces.Box(0, 255, (20, 21, 2), "uint8"))
    (codec,), batch = model.perception.codecs, random_batch(model)
    batch.observations["observation"] //= 8
    model.begin(batch)
    pixels = batch.observations["observation"].double()
    first = pixels[batch.valid]
    spread = first.var(0, correction=0).mean((0, 1)).sqrt()  # of a channel
    for seen in (pixels[0], 255 - pixels[0]):
        expected = codec.encode_planes(((seen - first.mean(0)) / spread).movedim(-1, 1))
        torch.testing.assert_close(codec.encode(seen.to(torch.uint8)), expected)
        model.begin(random_batch(model))


def test_the_first_batches_of_all_processes_standardise_together():
    model = embedding_model()
    batch, sums = random_batch(model, batch=4), []
    whole, other = copy.deepcopy(model), copy.deepcopy(model)
    whole.begin(batch)
    other.begin(batch.map(lambda x: x[2:]), lambda values: sums.append(values) or values)
    hidden = sums[0].shape

    def gather(values):  # the latents' moments are of the first process alone
        return torch.cat([values, sums[0]]) if values.shape == hidden else values

    model.begin(batch.map(lambda x: x[:2]), gather)
    torch.testing.assert_close(model.perception.norms[0].state_dict(), whole.perception.norms[0].state_dict())
    assert not torch.allclose(other.perception.norms[0].mean, whole.perception.norms[0].mean)


def test_latents_are_standardised_for_standardised_observations_and_a_slow_encoder_sees_the_same():
    model = embedding_model(dataclasses.replace(BARE, tau=0.1))
    learner, steps = Learner(model, LearnerConfig(model_lr=0.0)), 0
    for update in range(2):
        batch = random_batch(model)
        batch.observations["place"] = 5 + 20**update * batch.observations["place"]
        learner.update(batch)
        steps += int(batch.valid.sum())
        assert model.perception.codecs[-1].count == steps
        assert model.perception.codecs[model.perception.names.index("place")].count > 30
        if not update:
            z = model.perception(batch.observations)[batch.valid]
            torch.testing.assert_close(z.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-9)
            torch.testing.assert_close(z.var(0, correction=0), torch.ones(5).double())
        torch.testing.assert_close(model.slow_perception.state_dict(), model.perception.state_dict())


def test_a_slow_encoder_that_earlier_weights_lack_begins_as_the_encoder():
    earlier, model = embedding_model(), embedding_model(dataclasses.replace(BARE, tau=0.1))
    earlier.begin(random_batch(earlier))
    with torch.no_grad():
        earlier.perception.encoder[0].weight += 1
    model.load_state_dict(earlier.state_dict(), strict=False)
    model.begin(random_batch(model))
    for name, value in model.perception.state_dict().items():
        torch.testing.assert_close(value, earlier.perception.state_dict()[name], rtol=0, atol=0)
        torch.testing.assert_close(model.slow_perception.state_dict()[name], value, rtol=0, atol=0)


def test_latents_of_other_observations_are_standardised_by_their_own_first_batch(tmp_path):
    seen = spaces.Dict(card=spaces.Discrete(4), place=spaces.Box(-1, 1, (3,)))
    saved = embedding_model(seen=seen)
    saved.begin(random_batch(saved))
    run = Run.create(tmp_path / "run", {})
    run.save(0, {"world_model": saved.state_dict()})
    run.close()
    for changed in (seen, spaces.Dict(card=spaces.Discrete(5), place=seen["place"])):
        model = embedding_model(seen=changed)
        warm_start(model, Run(run.folder), "world_model")
        assert model.perception.begun == (changed is seen)


def test_chunks_bound_the_slow_encoder_as_well():
    model, sizes = embedding_model(dataclasses.replace(BARE, tau=0.1)), []
    model.chunk_steps = 5
    model.slow_perception.encoder.register_forward_hook(lambda _, inputs, outputs: sizes.append(len(outputs)))
    losses_of(model, random_batch(model), [1])
    assert sizes == [5] * 8 + [2]


def test_weights_of_classes_without_a_decoder_are_refused():
    for reconstruction in (1.0, 0.0):
        latent = dataclasses.replace(BARE, reconstruction=reconstruction)
        perception = dataclasses.replace(CONFIG.perception, latent=latent, rare=0.5)
        if reconstruction:
            small_model(perception=perception)
            continue
        with pytest.raises(ConfigurationError, match=r"rare is 0\.5, which weighs classes in reconstruction, and lat"):
            small_model(perception=perception)


def test_regularisers_are_what_their_papers_say():
    point = torch.zeros(40, 3, dtype=torch.float64)
    of_a_point = math.sqrt(2 * math.pi) - 2 * math.sqrt(math.pi) + math.sqrt(2 * math.pi / 3)  # over all arguments
    assert sigreg(point).item() == pytest.approx(of_a_point, abs=0.01)
    normal = torch.randn(4000, 6, dtype=torch.float64)
    line = normal[:, :1].repeat(1, 6)
    assert sigreg(normal) < 0.01 < 0.1 < min(sigreg(line), sigreg(0.2 * normal), sigreg(normal + 2))
    z = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([2.0, 0.5, 0.1, 1.5])
    covariance = torch.cov(z.T, correction=0)
    variance, others = vicreg(z)
    deviations = (covariance.diagonal() + 1e-4).sqrt()
    assert variance.item() == pytest.approx((1 - deviations).clamp(min=0).mean().item())
    assert others.item() == pytest.approx((covariance - covariance.diag().diag()).square().sum().item() / 12)
    found = spread(0.01 * normal)
    assert found["latent/rank"] > 5.9 and found["latent/deviation"] < 0.011, "the rank is free of scale"
    assert spread(line)["latent/rank"] < 1.1


KEPT = {
    "sigreg": dataclasses.replace(BARE, sigreg=10.0),
    "vicreg": dataclasses.replace(BARE, variance=16.0, covariance=8.0),
    "slow encoder": dataclasses.replace(BARE, tau=0.02, target_gradient=0.0),
    "nothing": BARE,
}


@pytest.mark.parametrize("kept_by", KEPT)
def test_latents_collapse_without_a_regulariser_and_this_is_said(kept_by):
    model = embedding_model(KEPT[kept_by], dtype=torch.float32, memory=MEMORIES["none"])
    learner = Learner(model, LearnerConfig(model_lr=0.01, warm_up=1, objective=ObjectiveConfig(horizon=1)))
    for _ in range(80):
        batch = random_batch(model, batch=8, resets=False)  # nothing of it can be predicted
        if kept_by == "slow encoder":  # which keeps what can be
            batch.observations["place"][:, 1:, :2] = batch.actions.cumsum(1)[:, :-1]
        metrics = learner.update(batch)
    notice = collapse_notice(metrics)
    if kept_by == "nothing":
        assert metrics["latent/deviation"] < 0.1 and notice.startswith("the latents have collapsed: their entries")
    else:
        assert notice is None and metrics["latent/deviation"] > 0.3


def test_latents_that_tell_only_episodes_apart_are_a_collapse_too():
    metrics = {"latent/deviation": 1.0, "latent/rank": 9.0}
    assert collapse_notice(metrics | {"latent/persistence": 0.1}) is None
    notice = collapse_notice(metrics | {"latent/persistence": 1e-4})
    assert notice.startswith("the latents have collapsed to what is constant in an episode: from one step to the next")
    assert "they change by 0.01, and deviate by 1 over all" in notice


def test_a_small_thing_in_one_channel_is_seen_beside_a_large_one_in_another():
    pictures = torch.zeros(32, 16, 16, 2, dtype=torch.uint8)
    pictures[16:, :, 3:6, 1] = 255
    pictures[torch.arange(32), torch.arange(32) % 16, 5, 0] = 40
    norm = FirstBatchNorm(16 * 16 * 2, 2)
    flat = pictures.flatten(1).double()
    norm.double().begin(flat.mean(0), flat.var(0, correction=0))
    centred = norm(pictures.flatten(1)).unflatten(1, (16, 16, 2))
    assert torch.allclose(centred.mean(0), torch.zeros(16, 16, 2).double(), atol=1e-9)
    assert torch.allclose(centred.square().mean((0, 1, 2)), torch.ones(2).double())


@pytest.mark.parametrize("memory", ["scan", "delta", "gru"])
def test_a_value_after_imagination_knows_the_first_observation(memory):
    model = embedding_model(memory=MEMORIES[memory])
    batch = random_batch(model, resets=False)
    place = batch.observations["place"].requires_grad_()
    imagined = model.imagine(model.observe(batch).state, model.decision, 6)
    value = model.evaluation.value(imagined.features[:, -1]).sum()
    (gradient,) = torch.autograd.grad(value, place)
    assert (gradient[:, 0].abs().sum(-1) > 1e-9).all()


@pytest.mark.parametrize("memory", ["scan", "gru", "none"])
def test_imagination_predicts_each_step_from_the_latent_before_and_goes_on_where_it_stopped(memory):
    model = embedding_model(memory=MEMORIES[memory])
    batch = random_batch(model, resets=False)
    state, actions = model.observe(batch).state, batch.actions[:, :6].double()
    whole = model.imagine_actions(state, actions)
    before = torch.cat([state["latent"][:, None], whole.latent[:, :-1]], 1)
    predicted = model.prediction(whole.features[:, :-1], actions, before)
    torch.testing.assert_close(whole.latent, predicted.prior)
    torch.testing.assert_close(whole.rewards, model.prediction.mean_reward(predicted))
    torch.testing.assert_close(whole.continues, predicted.continues.sigmoid())
    assert not torch.allclose(predicted.reward, model.prediction(whole.features[:, :-1], actions, 0 * before).reward)
    first = model.imagine_actions(state, actions[:, :2])
    later = model.imagine_actions(first.state, actions[:, 2:])
    assert first.state.keys() == state.keys()
    for name in ("latent", "rewards", "continues"):
        joined = torch.cat([getattr(first, name), getattr(later, name)], 1)
        torch.testing.assert_close(joined, getattr(whole, name))
    torch.testing.assert_close(later.state, whole.state)


def test_latents_that_layers_in_one_call_do_not_know_are_imagined_by_operators():
    model = embedding_model(done=spaces.Discrete(3), dtype=torch.float32, memory=MEMORIES["none"])
    with torch.no_grad():
        state = model.observe(random_batch(model)).state
        assert roll_out(model, state["features"], _memory_part(state), 4, None) is None
        imagined = model.imagine(state, model.decision, 4)
    torch.testing.assert_close(imagined.state["latent"], imagined.latent[:, -1])


def test_an_update_rolls_out_from_the_starts_of_imagination_and_carries_the_latent():
    model = embedding_model()
    batch = random_batch(model, resets=False)
    batch.carry = 3
    learner = Learner(model, LearnerConfig(objective=ObjectiveConfig(horizon=1, imagination_starts=2)))
    model.begin(batch)
    z, seen, inner = model.perception(batch.observations).detach(), [], model.imagine_latents
    model.imagine_latents = lambda state, *rest: seen.append(state["latent"]) or inner(state, *rest)
    learner.update(batch)
    torch.testing.assert_close(learner.carried["latent"], z[:, 2])
    (starts,) = seen
    steps = [int((z[0] - start).abs().sum(-1).argmin()) for start in starts[::3]]
    assert len(starts) == 6 and steps[0] < 5 <= steps[1] < 14 - BARE.rollout, "as many steps follow"
    torch.testing.assert_close(starts, torch.cat([z[:, step] for step in steps]))


def test_exploration_by_embeddings_is_refused():
    with pytest.raises(ConfigurationError, match=r"exploration\.bonus is 0\.5, and an embedding has the same entropy"):
        embedding_model(exploration=ExplorationConfig(bonus=0.5))


def test_rows_of_sampled_embeddings_are_refused():
    with pytest.raises(ConfigurationError, match=r"sampled is 0\.5, expected 0, as the latent is deterministic"):
        Learner(embedding_model(), LearnerConfig(objective=ObjectiveConfig(sampled=0.5)))


def test_weights_of_a_kl_are_refused():
    for name in ("representation", "free_nats"):
        with pytest.raises(ConfigurationError, match=rf"objective\.{name} is 0\.5, which is of a KL"):
            Learner(embedding_model(), LearnerConfig(objective=ObjectiveConfig(**{name: 0.5})))


def test_inverse_dynamics_trains_the_encoder_for_classes_and_numbers():
    for done in (spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,))):
        model = embedding_model(dataclasses.replace(BARE, inverse=1.0), done)
        batch = random_batch(model)
        _, metrics = losses_of(model, batch, [1])
        z = model.perception(batch.observations)
        actions = model.action_spec.encode(batch.actions)[:, :-1].double()
        followed = (batch.valid & ~batch.is_last)[:, :-1]
        loss = model.inverse.loss(z[:, :-1], z[:, 1:], actions)[followed].mean()
        assert metrics["loss/inverse"].item() == pytest.approx(loss.item())
        grads = torch.autograd.grad(loss, list(model.perception.encoder.parameters()))
        assert all(grad.abs().sum() > 0 for grad in grads)
    classes = embedding_model(dataclasses.replace(BARE, inverse=1.0), spaces.Discrete(3)).inverse
    before, after, hot = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.eye(3)[[0, 2, 1, 0]].double()
    scores = classes.network(torch.cat([before, after], -1))
    expected = torch.nn.functional.cross_entropy(scores, hot.argmax(-1), reduction="none")
    torch.testing.assert_close(classes.loss(before, after, hot), expected)


def test_without_a_decoder_there_is_none():
    seen = spaces.Dict(
        picture=spaces.Box(0, 255, (16, 16, 3), "uint8"), place=spaces.Box(-1, 1, (3,)), card=spaces.Discrete(4)
    )
    counts = []
    for reconstruction in (0.0, 1.0):
        model = embedding_model(dataclasses.replace(BARE, reconstruction=reconstruction), seen=seen)
        batch = random_batch(model)
        total, metrics = losses_of(model, batch, [1])
        total.backward()
        assert ("loss/reconstruction" in metrics) == bool(reconstruction)
        assert all(parameter.grad is not None for parameter in model.perception.parameters())
        counts.append(sum(parameter.numel() for parameter in model.perception.parameters()))
    assert counts[0] < 0.6 * counts[1]
    bare = embedding_model(seen=seen)
    with pytest.raises(ConfigurationError, match="this world model has no decoder"):
        bare.perception.reconstruct(bare.observe(random_batch(bare)).latent)


def test_steps_without_a_target_have_no_error():
    model = embedding_model()
    batch: Batch = random_batch(model).steps(0, 1)
    total, metrics = losses_of(model, batch, [1])
    assert metrics["loss/dynamics"] == metrics["loss/rollout"] == 0 and total.isfinite()
