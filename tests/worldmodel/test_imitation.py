"""Imitation: losses, the memory of a policy that acts, demonstrations, resume, and data that does not fit."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldmodel.acting.arm_episodes import (
    PolicyActor,
    arm_specs,
    mean_command_actor,
    record_demonstrations,
    success_by_task,
)
from worldmodel.data.datasets import EpisodeFile, RecordedSource
from worldmodel.data.selection import SelectedEpisodes, open_episodes
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.arm.worlds import TASKS, ArmConfig, ArmWorlds
from worldmodel.learning.imitation_trainer import ImitationTrainConfig, ImitationTrainer
from worldmodel.model.blocks import LSTMBlock, ScanBlock
from worldmodel.model.imitation import ImitationConfig, ImitationPolicy
from worldmodel.model.latents import CategoricalConfig, GaussianConfig
from worldmodel.model.memory import MemoryConfig
from worldmodel.model.mixture_density import MeanConfig, MixtureDensityConfig
from worldmodel.model.perception import PerceptionConfig
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import RunError

ARM = ArmConfig(joints=True)
PICTURES = PerceptionConfig(
    GaussianConfig(size=6, min_std=0.01), hidden=16, image_channels=4, image_stride=4, upsampling="transposed"
)
MEMORIES = {"lstm": (LSTMBlock(),) * 3, "scan": (ScanBlock(d_state=4, groups=1),) * 3}
SMALL = ImitationConfig(
    PICTURES, 16, MemoryConfig(width=16, blocks=MEMORIES["lstm"]), MixtureDensityConfig(components=2, hidden=8)
)
TRAIN = ImitationTrainConfig(policy=SMALL, pictures=8, updates=4, warmup=1, lr=3e-3)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    path = tmp_path_factory.mktemp("arm") / "demonstrations.npz"
    record_demonstrations(path, 6, ARM, batch=6, seed=1)
    return path


def source(path, seed=0):
    return RecordedSource(SelectedEpisodes(open_episodes(path)), 3, 12, seed)


def seen(batch, time=None, seed=0):
    torch.manual_seed(seed)
    lead = (batch,) if time is None else (batch, time)
    return {
        "picture": torch.randint(256, (*lead, 32, 32, 3), dtype=torch.uint8),
        "task": torch.randint(4, (*lead, 1), dtype=torch.uint8),
        "joints": torch.rand(*lead, 4),
    }


def test_demonstrations_are_clean_commands_of_episodes_that_succeed(demonstrations):
    file = EpisodeFile(demonstrations)
    assert file.episodes == 6 and file.about["noise"] == 0.3
    ends = np.flatnonzero(file.arrays["is_last"])
    assert file.arrays["terminated"][ends - 1].all() and file.arrays["terminated"].sum() == 6
    observation_spec, action_spec = arm_specs(ARM)
    assert not file.observation_spec.differences(observation_spec) and file.action_spec == action_spec
    joints, turns = file.arrays["observations/joints"], file.arrays["actions"][:, :3] * 0.12
    within = ~file.arrays["is_last"][:-1]
    missed = (np.diff(joints[:, :3], axis=0) - turns[:-1])[within]
    assert np.median(np.abs(missed)) > 0.003, "what was executed deviates"
    assert np.abs(missed.mean()) < 0.004


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_policy_acts_step_by_step_as_it_learned_and_begins_anew_with_each_episode(kind):
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, memory=MemoryConfig(width=16, blocks=MEMORIES[kind]))
    policy = ImitationPolicy(*arm_specs(ARM), dataclasses.replace(config, head=MeanConfig(hidden=16)))
    observations, reset = seen(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    reset[1, 3] = True
    features, posterior, _ = policy(observations, reset=reset)
    assert features.shape == (2, 5, 16) and posterior.shape == (2, 5, 2, 6)
    expected = policy.head.sample(features).clamp(-1, 1)
    state = policy.init_state(2)
    for step in range(5):
        now = {name: array[:, step] for name, array in observations.items()}
        actions, state = policy.act(now, state, reset[:, step])
        torch.testing.assert_close(actions, expected[:, step], atol=1e-5, rtol=1e-4)
    fresh, _, _ = policy({name: array[1:, 3:] for name, array in observations.items()})
    torch.testing.assert_close(features[1:, 3:], fresh, atol=1e-5, rtol=1e-4)


def test_an_actor_begins_anew_with_new_worlds():
    torch.manual_seed(0)
    actor = PolicyActor(ImitationPolicy(*arm_specs(ARM), dataclasses.replace(SMALL, head=MeanConfig(hidden=16))))
    made = [ArmWorlds(3, ARM, np.random.default_rng(0)) for _ in range(2)]
    first = [actor(made[0]) for _ in range(3)]
    assert not np.array_equal(first[0], first[2]), "it remembers"
    assert np.array_equal(actor(made[1]), first[0])


@pytest.mark.parametrize("reconstruction", ["vae_gan", "vae", "none"])
def test_training_brings_the_loss_of_actions_down(demonstrations, reconstruction):
    config = dataclasses.replace(TRAIN, reconstruction=reconstruction, updates=12)
    trainer = ImitationTrainer(config, source(demonstrations))
    found = []
    while not trainer.finished:
        found.append(trainer.iterate())
    assert trainer.updates == 12
    assert np.mean([each["action"] for each in found[-3:]]) < found[0]["action"] - 0.1
    names = {"none": {"action"}, "vae": {"action", "kl", "pixels"}}
    names["vae_gan"] = names["vae"] | {"features", "adversarial", "discriminator"}
    assert names[reconstruction] == {name for name in found[0] if "grad" not in name}


def test_each_loss_trains_what_it_is_of(demonstrations):
    """The reconstruction reaches the encoder and no discriminator, the adversary the decoder and no encoder."""
    trainer = ImitationTrainer(TRAIN, source(demonstrations))
    batch, _ = trainer.source.sample()
    losses, own = trainer.losses(batch)
    perception, discriminator = trainer.policy.perception, trainer.vae_gan.discriminator

    def reaches(loss, module):
        gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

    assert reaches(losses["action"], perception.encoder) and reaches(losses["features"], perception.encoder)
    assert reaches(losses["features"], perception.decoder) and reaches(losses["kl"], perception.encoder)
    assert reaches(losses["adversarial"], perception.decoder)
    assert not reaches(losses["adversarial"], perception.encoder)
    assert reaches(own, discriminator)
    drawing = {id(parameter) for parameter in trainer.policy.decoder_parameters()}
    parameters = dict(trainer.policy.named_parameters())
    gradients = torch.autograd.grad(losses["action"], list(parameters.values()), allow_unused=True)
    unused = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}
    assert unused == {name for name, parameter in parameters.items() if id(parameter) in drawing}


def test_the_encoder_gets_its_share_of_the_reconstruction_and_the_decoder_all_of_it(demonstrations):
    def norms(weight):
        config = dataclasses.replace(TRAIN, reconstruction="vae", reconstruction_weight=weight, kl=0.0)
        trainer = ImitationTrainer(config, source(demonstrations))
        losses, _ = trainer.losses(trainer.source.sample()[0])
        perception = trainer.policy.perception
        parts = (perception.encoder[-1].weight, perception.decoder[0][0].weight)
        return [float(gradient.norm()) for gradient in torch.autograd.grad(losses["pixels"], parts)]

    (encoder, decoder), (less, same) = norms(1.0), norms(0.25)
    assert less == pytest.approx(0.25 * encoder, rel=1e-3) and same == pytest.approx(decoder, rel=1e-3)


def test_a_resumed_training_goes_on_as_if_nothing_had_been(demonstrations):
    whole, first = (ImitationTrainer(TRAIN, source(demonstrations)) for _ in range(2))
    expected = [whole.iterate() for _ in range(4)]
    torch.manual_seed(0)
    first = ImitationTrainer(TRAIN, source(demonstrations))
    for _ in range(2):
        first.iterate()
    saved = first.state_dict()
    torch.manual_seed(99)
    resumed = ImitationTrainer(dataclasses.replace(TRAIN, seed=7), source(demonstrations, seed=7))
    resumed.load_state_dict(saved)
    assert [resumed.iterate() for _ in range(2)] == expected[2:]
    assert resumed.updates == 4 and resumed.finished


def test_every_task_is_tried_and_counted():
    asked = []

    def make_actor(task, worlds):
        asked.append((task, worlds.batch, worlds.task.tolist()))
        return PolicyActor(ImitationPolicy(*arm_specs(ARM), SMALL))

    found = success_by_task(make_actor, ARM, 3, seed=2, steps=2)
    assert asked == [(task, 3, [index] * 3) for index, task in enumerate(TASKS)]
    assert list(found) == list(TASKS) and all(each.first.tolist() == [3, 3, 3] for each in found.values())
    assert not any(each.success.any() for each in found.values())


def test_the_mean_command_is_that_of_the_demonstrations_of_a_task(demonstrations):
    file = EpisodeFile(demonstrations)
    starts, tasks = file.episode_starts, file.arrays["observations/task"][:, 0]
    task = int(tasks[starts[0]])
    chosen = [start for start in starts if tasks[start] == task]
    actor, worlds = mean_command_actor(file, TASKS[task]), ArmWorlds(2, ARM, np.random.default_rng(0))
    for step in range(3):
        expected = np.mean([file.arrays["actions"][start + step] for start in chosen], 0)
        np.testing.assert_allclose(actor(worlds), np.tile(expected, (2, 1)), atol=1e-6)
    left = [other for index, other in enumerate(TASKS) if index not in tasks]
    for other in left:
        with pytest.raises(ConfigurationError, match=f"has no demonstration of '{other}'"):
            mean_command_actor(file, other)


def test_data_that_does_not_fit_is_refused(demonstrations, tmp_path):
    numbers = ObservationSpec.from_space(spaces.Box(-1, 1, (3,)))
    observation_spec, action_spec = arm_specs(ARM)
    assert ImitationPolicy(numbers, action_spec, SMALL).perception is None
    with pytest.raises(ConfigurationError, match="actions are discrete, expected numbers, of a Box"):
        ImitationPolicy(observation_spec, ActionSpec.from_space(spaces.Discrete(3)), SMALL)
    latent = dataclasses.replace(SMALL, pictures=dataclasses.replace(PICTURES, latent=CategoricalConfig()))
    with pytest.raises(ConfigurationError, match="latents are categorical, expected gaussian"):
        ImitationPolicy(observation_spec, action_spec, latent)
    policy = ImitationPolicy(observation_spec, action_spec, SMALL)
    with pytest.raises(ConfigurationError, match=r"the policy learned from other episodes than the arm's: .*joints"):
        PolicyActor(policy)(ArmWorlds(1, ArmConfig(), np.random.default_rng(0)))
    with pytest.raises(ConfigurationError, match="task is 'juggle', expected"):
        ArmConfig(task="juggle")
    arrays = {name: np.array(array) for name, array in np.load(demonstrations).items()}
    for name, value, said in (
        ("actions", np.nan, r"episode 0, step 2: .*actions has values from nan to nan"),
        ("observations/joints", np.nan, r"episode 0, step 2: .*joints.* NaN"),
    ):
        wrong = {**arrays, name: arrays[name].copy()}
        wrong[name][2] = value
        path = tmp_path / "wrong.npz"
        np.savez(path, **wrong)
        with pytest.raises(RunError, match=said):
            source(path).file.rows(np.array([0]), 12)
    del arrays["actions"]
    np.savez(path, **arrays)
    with pytest.raises(RunError, match="it has no actions"):
        source(path)
