"""Parallel equals stepwise; the time convention; gradients through time."""

import doctest
import io
import pathlib

import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import MEMORIES, SEEN, random_batch, small_model, step_by_step

from worldmodel.data.batch import Batch
from worldmodel.learning.objectives import ObjectiveConfig
from worldmodel.model.blocks import ConvLSTMBlock, DeltaBlock, TokenAttentionBlock
from worldmodel.model.deciders import action_values, greedy_decider, one_step_planning, policy_mode, policy_sample
from worldmodel.model.decision import DecisionConfig
from worldmodel.model.evaluation import EvaluationConfig
from worldmodel.model.latents import CategoricalConfig, GaussianConfig
from worldmodel.model.memory import MemoryConfig
from worldmodel.model.networks import ScalarConfig

EVERY_MEMORY = pytest.mark.parametrize("memory", list(MEMORIES))
EXACT = 1e-9  # float64, a few hundred operations deep


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


def weighed(features):
    """Random weights: a layer norm's plain sum is constant."""
    return (features * torch.randn_like(features)).sum()


def random_state(model, batch):
    state = model.init_state(batch)
    return {name: torch.rand_like(value) for name, value in state.items()}


@EVERY_MEMORY
def test_all_steps_at_once_are_the_steps_one_by_one(memory):
    model = small_model(memory=MEMORIES[memory])
    batch = random_batch(model)
    batch.is_first[1, 0] = False  # continues from a state
    state = random_state(model, 3)
    observed = model.observe(batch, state)
    features, last = step_by_step(model, batch, state)
    assert_same(observed.features, features)
    assert_same(observed.state, last)


@EVERY_MEMORY
def test_gradients_of_all_steps_at_once_are_those_of_the_steps_one_by_one(memory):
    model = small_model(memory=MEMORIES[memory])
    batch = random_batch(model)
    weights = torch.randn(3, 14, model.features, dtype=torch.float64)

    def gradients(features):
        parameters = [*model.memory.parameters(), *model.entry.parameters(), *model.perception.encoder.parameters()]
        return torch.autograd.grad((features * weights).sum(), parameters)

    assert_same(gradients(model.observe(batch).features), gradients(step_by_step(model, batch)[0]))


@EVERY_MEMORY
def test_a_batch_cut_anywhere_is_the_whole_batch(memory):
    model = small_model(memory=MEMORIES[memory])
    batch = random_batch(model)
    whole = model.observe(batch)
    observed = model.observe(batch, states_after=[1, 5, 6, 14])
    assert_same(observed.features, whole.features)
    assert_same(observed.state, whole.state)
    for index, stop in enumerate([1, 5, 6, 14]):
        piece = model.observe(batch.steps(0, stop))
        assert_same(
            {name: value[3 * index : 3 * index + 3] for name, value in observed.states_after.items()}, piece.state
        )
        if stop < 14:
            rest = model.observe(batch.steps(stop, 14), piece.state)
            assert_same(rest.features, whole.features[:, stop:])
            assert_same(rest.state, whole.state)


@pytest.mark.parametrize("memory", ["none", "gated_conv", "scan"])
def test_states_on_the_way_are_those_after_fewer_steps(memory):
    model = small_model(memory=MEMORIES[memory])
    batch, stops = random_batch(model), [3, 4, 9]
    states = model.observe(batch, states_after=stops).states_after
    for index, stop in enumerate(stops):
        expected = model.observe(batch.steps(0, stop)).state
        assert_same({name: value.unflatten(0, (len(stops), -1))[index] for name, value in states.items()}, expected)


@EVERY_MEMORY
def test_nothing_from_before_a_reset_reaches_what_comes_after(memory):
    model = small_model(memory=MEMORIES[memory])
    batch = random_batch(model)
    ends = [5, 6, 7]
    other = random_batch(model)
    mixed = batch.map(torch.clone)
    for row, end in enumerate(ends):
        mixed.observations["place"][row, :end] = other.observations["place"][row, :end]
        mixed.actions[row, :end] = other.actions[row, :end]
    one, two = model.observe(batch), model.observe(mixed, random_state(model, 3))
    for row, end in enumerate(ends):
        assert batch.is_first[row, end]
        assert torch.equal(one.features[row, end:], two.features[row, end:])
        assert not torch.equal(one.features[row, :end], two.features[row, :end])


@EVERY_MEMORY
def test_a_saved_state_goes_on_as_if_nothing_had_happened(memory):
    model = small_model(memory=MEMORIES[memory])
    batch = random_batch(model, resets=False)
    _, state = step_by_step(model, batch.steps(0, 7))
    file = io.BytesIO()
    torch.save({name: value.detach() for name, value in state.items()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(type(value) is torch.Tensor for value in loaded.values())
    assert_same(step_by_step(model, batch.steps(7, 14), loaded)[0], model.observe(batch).features[:, 7:])


def test_forgetting_is_what_tells_the_memories_apart():
    """Four steps of convolution forget 8 steps; the others do not."""
    reached = {}
    for name, memory in MEMORIES.items():
        model = small_model(memory=memory)
        batch = random_batch(model, resets=False)
        modality = batch.observations["place"].requires_grad_()
        (gradient,) = torch.autograd.grad(weighed(model.observe(batch).features[:, 10]), modality)
        reached[name] = [bool(gradient[:, 10 - lag].abs().sum() > 1e-6) for lag in (0, 2, 8)]
    remembers = [True, True, True]
    assert reached == {
        "rotary_scan": remembers,
        "scan": remembers,
        "mamba2": remembers,
        "mamba3": remembers,
        "delta": remembers,
        "conv_lstm": remembers,
        "gru": remembers,
        "lstm": remembers,
        "hybrid": remembers,
        "gated_conv": [True, True, False],
        "none": [True, False, False],
        "block_scan": remembers,
        "local_attention": remembers,
        "memory_attention": remembers,
        "place": remembers,
        "tokens": remembers,
    }


def changed(batch, t, name):
    other = batch.map(torch.clone)
    if name == "action":
        other.actions[:, t] = (other.actions[:, t] + 1) % 3
    else:
        other.observations["place"][:, t] += 1
    return other


def test_memory_reads_the_action_before_and_the_observation_now():
    model = small_model()
    batch = random_batch(model, resets=False)
    plain = model.observe(batch).features
    seen, done = (model.observe(changed(batch, 5, name)).features for name in ("observation", "action"))
    differs = [(plain != other).any(-1).any(0).nonzero().squeeze(-1).min().item() for other in (seen, done)]
    assert differs == [5, 6]


def test_perception_sees_its_own_step_alone():
    model = small_model()
    batch = random_batch(model, resets=False)
    plain = model.observe(batch).posterior
    for name, reach in (("observation", [5]), ("action", [])):
        other = model.observe(changed(batch, 5, name)).posterior
        assert (plain != other).flatten(2).any(-1).any(0).nonzero().flatten().tolist() == reach


def test_reward_is_read_from_the_action_of_the_same_step():
    model = small_model()
    batch = random_batch(model, resets=False)
    plain = model.predict(model.observe(batch), batch)
    other_batch = changed(batch, 5, "action")
    other = model.predict(model.observe(other_batch), other_batch)
    for one, two in ((plain.reward, other.reward), (plain.prior.flatten(2), other.prior.flatten(2))):
        assert (one != two).any(-1).any(0).nonzero().flatten().tolist()[0] == 5


def test_the_action_before_a_reset_counts_as_zero():
    model = small_model()
    batch = random_batch(model)
    row, start = 0, 5
    assert batch.is_first[row, start]
    fresh = batch.steps(start, 14)
    assert_same(model.observe(batch).features[row, start:], model.observe(fresh).features[row])


@pytest.mark.parametrize("memory", [name for name in MEMORIES if name not in ("gated_conv", "none")])
def test_a_value_at_the_end_of_imagination_knows_the_first_observation_and_the_first_action(memory):
    model = small_model(memory=MEMORIES[memory])
    steps = 5 if memory == "local_attention" else 14  # a window holds what it reaches
    batch = random_batch(model, resets=False).steps(0, steps)
    modality = batch.observations["place"].requires_grad_()
    state = model.observe(batch).state
    action = model.action_spec.encode(batch.actions[:, -1]).double().requires_grad_()
    imagined = model.imagine(state, model.decision, 6, first_action=action)
    value = model.evaluation.value(imagined.features[:, -1]).sum()
    by_observation, by_action = torch.autograd.grad(value, [modality, action])
    assert (by_observation[:, 0].abs().sum(-1) > 1e-9).all()
    assert (by_action.abs().sum(-1) > 1e-9).all()


def test_a_discrete_observation_given_as_one_hot_is_the_same_and_has_a_gradient():
    model = small_model()
    batch = random_batch(model, resets=False)
    expected = model.observe(batch).features
    hot = torch.nn.functional.one_hot(batch.observations["card"].long().squeeze(-1), 4).double().requires_grad_()
    features = model.observe(Batch(**{**vars(batch), "observations": {**batch.observations, "card": hot}})).features
    assert_same(features, expected)
    assert (torch.autograd.grad(weighed(features[:, -1]), hot)[0][:, 0].abs().sum(-1) > 1e-9).all()


@EVERY_MEMORY
def test_imagining_what_was_seen_is_observing_it(memory):
    model = small_model(memory=MEMORIES[memory])
    batch = random_batch(model, resets=False)
    observed = model.observe(batch, states_after=[4])
    encoded = model.action_spec.encode(batch.actions).double()
    taken = iter(encoded[:, 4:].unbind(1))
    seen = iter(observed.posterior[:, 4:].unbind(1))

    class Recorded:
        def sample(self):
            return next(taken)

    latent_space = model.perception.latent
    latent_space.unimix = lambda latent: latent  # already applied
    imagined = model.imagine(observed.states_after, lambda _: Recorded(), 10, encoded[:, 3], lambda _: next(seen))
    del latent_space.unimix
    assert_same(imagined.features, observed.features[:, 3:])
    assert_same(imagined.rewards, model.prediction.mean_reward(model.predict(observed, batch))[:, 3:13])


def test_acting_is_observing_with_the_actions_that_were_taken():
    model = small_model()
    batch = random_batch(model)
    state, taken = model.init_state(3), []
    for t in range(14):
        modalities = {name: modality[:, t] for name, modality in batch.observations.items()}
        actions, state = model.act(modalities, state, batch.is_first[:, t], policy_mode if t % 2 else policy_sample)
        taken.append(actions)
    batch.actions, batch.is_last = torch.stack(taken, 1), torch.zeros_like(batch.is_first)
    assert_same(state, model.observe(batch).state)


def test_one_step_planning_takes_the_action_of_the_largest_q():
    model = small_model()
    batch = random_batch(model)
    modalities = {name: modality[:, 3] for name, modality in batch.observations.items()}
    reset = torch.ones(3, dtype=torch.bool)
    actions, state = model.act(modalities, model.init_state(3), reset, one_step_planning)
    _, seen = model.observe_step(modalities, state["action"], model.init_state(3), reset)
    q, encoded = action_values(model, seen)
    assert torch.equal(actions, model.action_spec.decode(encoded)[q.argmax(-1)])
    for index, action in enumerate(encoded):
        tried = action.expand(3, -1)
        predicted = model.prediction(seen["features"], tried)
        expected = model.perception.latent.embed_mean(predicted.prior)
        inputs = model.entry(torch.cat([expected, tried], -1))
        memory = {name.removeprefix("memory."): value for name, value in seen.items() if name.startswith("memory.")}
        value = model.evaluation.value(model.memory.pool(model.memory.step(inputs, memory)[0]))
        later = model.config.evaluation.discount * predicted.continues.sigmoid() * value
        assert_same(q[:, index], model.prediction.mean_reward(predicted) + later)


@pytest.mark.parametrize(
    "done", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.Box(-2, 2, (2,))], ids=["one", "many", "box"]
)
def test_actions_are_of_the_space(done):
    for choice in ("one_step_planning", "policy"):
        model = small_model(done=done, decision=DecisionConfig(hidden=16, greedy=choice))
        batch = random_batch(model)
        modalities = {name: modality[:, 0] for name, modality in batch.observations.items()}
        for decider in (greedy_decider(model), policy_sample):
            actions, _ = model.act(modalities, model.init_state(3), batch.is_first[:, 0], decider)
            for action in model.action_spec.to_env(actions.numpy()):
                assert done.contains(done.dtype.type(action) if done.shape == () else action)


def test_every_kind_of_observation_is_read_and_said_again():
    seen = spaces.Dict(
        image=spaces.Box(0, 255, (20, 24, 3), "uint8"),
        grid=spaces.Box(0, 255, (7, 5, 3), "uint8"),
        both=spaces.Tuple([spaces.MultiDiscrete([3, 5]), spaces.MultiBinary(4)]),
        **SEEN.spaces,
    )
    model = small_model(seen=seen, dtype=torch.float32)
    batch = random_batch(model)
    observed = model.observe(batch)
    said = model.perception.reconstruct(observed.latent)
    for name, modality in model.observation_spec.modalities.items():
        assert said[name].shape == (3, 14, *modality.shape)
    loss = model.perception.reconstruction_loss(observed.latent, batch.observations)
    assert loss.shape == (3, 14)
    loss.sum().backward()
    for name, parameter in model.perception.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryConfig(blocks=()), "blocks has 0 entries, expected at least 1"),
        (lambda: MemoryConfig(20, (ConvLSTMBlock(),)), r"map_size is \(4, 4\) and width 20"),
        (lambda: MemoryConfig(tokens=0), "tokens is 0, expected a whole number, at least 1"),
        (
            lambda: MemoryConfig(20, (DeltaBlock(d_head=2, expand_v=0.4),)),
            "expand_v is 0.4 and d_head 2, expected a product",
        ),
        (lambda: MemoryConfig(20, (TokenAttentionBlock(heads=3),)), "heads is 3 and width 20, expected a divisor"),
        (lambda: CategoricalConfig(classes=1), "classes is 1, expected a whole number, at least 2"),
        (lambda: GaussianConfig(min_std=0.0), "min_std is 0.0, expected a number, more than 0"),
        (lambda: EvaluationConfig(discount=1.5), "discount is 1.5"),
        (lambda: DecisionConfig(gradient="search"), "gradient is 'search'"),
        (lambda: DecisionConfig(greedy="best"), "greedy is 'best'"),
        (lambda: DecisionConfig(min_std=2.0), "min_std is 2.0 and max_std 1.0"),
        (lambda: ScalarConfig(bins=1), "bins is 1, expected a whole number, at least 2"),
        (lambda: ObjectiveConfig(horizon=0), "horizon is 0"),
        (
            lambda: small_model(done=spaces.Box(-1, 1, (2,)), decision=DecisionConfig(gradient="all_action")),
            "gradient is 'all_action' for continuous actions, expected at most max_enumerated_actions=16",
        ),
        (
            lambda: small_model(done=spaces.Discrete(99), decision=DecisionConfig(gradient="all_action")),
            "gradient is 'all_action' for 99 actions",
        ),
        (lambda: (model := small_model()).imagine(model.init_state(1), model.decision, 0), "horizon is 0"),
        (
            lambda: (model := small_model()).observe(random_batch(model), states_after=[3, 3]),
            r"states_after is \[3, 3\], expected",
        ),
        (lambda: (model := small_model()).observe(random_batch(model), states_after=[15]), "to rise from 1 to 14"),
    ],
)
def test_an_error_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_whose_parts_do_not_fit_is_refused():
    batch = random_batch(small_model())
    with pytest.raises(ValueError, match=r"rewards has shape \(3, 13\), expected \(batch=3, time=14, ...\)"):
        Batch(**{**vars(batch), "rewards": batch.rewards[:, 1:]})
    with pytest.raises(TypeError, match=r"is_first has dtype torch.float32, expected torch.bool"):
        Batch(**{**vars(batch), "is_first": batch.is_first.float()})
    with pytest.raises(ValueError, match=r"loss_mask has shape \(3, 9\), expected \(batch=3, time=14, ...\)"):
        Batch(**{**vars(batch), "loss_mask": batch.loss_mask[:, 5:]})


@pytest.mark.parametrize("page", ["world_model.md", "from_python.md"])
@pytest.mark.usefixtures("same_threads")
def test_the_guide_runs(page):
    guide = pathlib.Path(__file__).parents[2] / "docs" / page
    assert doctest.testfile(str(guide), module_relative=False, raise_on_error=True).attempted > 10
