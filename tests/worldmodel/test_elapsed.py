"""The time between observations, from the environment to the memory."""

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from worldmodel_examples import MEMORIES, random_batch, small_model

from worldmodel.data.replay import Replay, ReplayConfig
from worldmodel.environments import dial
from worldmodel.environments.batched import GymnasiumVectorEnvironment
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.learning.collector import Collector
from worldmodel.model.block import mixes_tokens
from worldmodel.model.blocks import RotaryScanBlock
from worldmodel.model.deciders import policy_sample
from worldmodel.model.memory import MemoryConfig, build_memory


def irregular(model, resets=True):
    batch = random_batch(model, resets=resets)
    batch.elapsed = torch.rand(batch.shape) * 5
    batch.irregular = True
    return batch


@pytest.mark.parametrize("memory", ["rotary_scan", "scan", "block_scan", "tokens"])
def test_steps_of_unequal_times_are_observed_as_they_are_stepped(memory):
    model = small_model(memory=MEMORIES[memory])
    batch = irregular(model)
    observed = model.observe(batch)
    state, actions = model.init_state(3), model.action_spec.encode(batch.actions).double()
    previous = torch.zeros_like(actions[:, 0])
    for t in range(batch.shape[1]):
        seen = {name: value[:, t] for name, value in batch.observations.items()}
        features, state = model.observe_step(seen, previous, state, batch.is_first[:, t], batch.elapsed[:, t])
        torch.testing.assert_close(features, observed.features[:, t])
        previous = torch.where(batch.is_last[:, t, None], 0, actions[:, t])
    batch.elapsed = torch.where(batch.is_first, 1000.0, batch.elapsed)  # before an episode there is no time
    assert torch.equal(model.observe(batch).features, observed.features)
    batch.irregular = False
    assert not torch.allclose(model.observe(batch).features, observed.features, atol=1e-6)


def test_a_batch_finds_out_whether_its_times_differ():
    model = small_model()
    batch = random_batch(model)
    assert batch.irregular is False and irregular(model).map(torch.clone).irregular is True
    fields = {**vars(batch), "irregular": None}
    assert type(batch)(**{**fields, "elapsed": torch.ones(batch.shape)}).irregular is False
    assert type(batch)(**{**fields, "elapsed": torch.full(batch.shape, 2.0)}).irregular is True


def test_blocks_without_time_are_not_asked():
    stack = build_memory(MEMORIES["tokens"])
    assert [mixes_tokens(block) for block in stack.blocks] == [False, True, False]
    inputs = torch.randn(2, 5, 3 * 16)
    assert stack(inputs, elapsed=torch.full((2, 5), 3.0))[0].shape == (2, 5, 3, 16)


def test_the_dial_is_a_gymnasium_environment():
    check_env(gymnasium.make("worldmodel/Dial-v0").unwrapped, skip_render_check=True)


def environments(kind):
    make = [dial.Dial] * 3
    if kind == "single":
        return VectorEnvironment([new() for new in make], lambda episode: episode)
    return GymnasiumVectorEnvironment(SyncVectorEnv(make, autoreset_mode=kind), 0)


@pytest.mark.parametrize("kind", ["single", *AutoresetMode])
def test_the_time_an_environment_tells_reaches_the_batch_and_the_state(kind):
    episodes = environments(kind)
    space = gymnasium.spaces.Discrete(dial.POSITIONS + 1), gymnasium.spaces.Discrete(dial.POSITIONS)
    model = small_model(*space, dtype=torch.float32)
    config = ReplayConfig(window=dial.LENGTH + 1, batch_size=2, burn_in=0, max_steps=400)
    replay = Replay(episodes.observation_spec, episodes.action_spec, 3, config)
    collector = Collector(episodes, replay, model, 0, policy_sample)
    told, real = [], episodes.step

    def step(actions):
        happened = real(actions)
        told.extend(happened.elapsed.tolist())
        return happened

    episodes.step = step
    for _ in range(dial.LENGTH + 2):
        before, first, elapsed = collector.state, episodes.is_first.copy(), episodes.elapsed.copy()
        seen = episodes.observation_spec.to_tensors(episodes.observations)
        collector.collect()
        assert (elapsed[first] == 1).all()
        _, after = model.observe_step(
            seen, before["action"], before, torch.from_numpy(first), torch.from_numpy(elapsed)
        )
        torch.testing.assert_close(collector.state["memory.0.scan"], after["memory.0.scan"])
    assert set(told) == {1, 2, 3, 4}
    batch, _ = replay.sample()
    assert batch.irregular and (batch.elapsed[batch.is_first] == 1).all()
    hand = batch.observations["observation"][:, :1, 0] + batch.elapsed.cumsum(1) - batch.elapsed[:, :1]
    right = batch.actions == hand.long() % dial.POSITIONS
    assert torch.equal(batch.rewards[~batch.is_last] == 1, right[~batch.is_last])


def test_a_saved_environment_knows_how_long_ago_it_was_seen():
    episodes = environments("single")
    episodes.step(np.zeros((3,), np.int64))
    saved = episodes.state_dict()
    other = environments("single")
    other.load_state_dict(saved)
    assert np.array_equal(other.elapsed, episodes.elapsed) and (episodes.elapsed != 1).any()
    del saved["elapsed"]  # of the release before
    other.load_state_dict(saved)
    assert (other.elapsed == 1).all()


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), "soon"])
def test_a_time_that_is_none_is_refused(wrong):
    class Wrong(dial.Dial):
        def step(self, action):
            return *super().step(action)[:4], {"elapsed": wrong}

    episodes = VectorEnvironment([Wrong()], lambda episode: episode)
    with pytest.raises(EnvironmentFailed, match=r"info\['elapsed'\] is "):
        episodes.step(np.zeros((1,), np.int64))


def test_what_the_time_is_worth():
    """The hand is right in all steps with the time, and by chance, 1 of 4, without."""

    def trained(with_time):
        torch.manual_seed(0)
        memory = build_memory(MemoryConfig(32, (RotaryScanBlock(),)))
        embed, head = torch.nn.Embedding(dial.POSITIONS + 1, 32), torch.nn.Linear(32, dial.POSITIONS)
        optimizer = torch.optim.Adam([*memory.parameters(), *embed.parameters(), *head.parameters()], 1e-2)
        for _ in range(50):
            elapsed = torch.randint(1, dial.LONGEST + 1, (40, dial.LENGTH)).float()
            shown = torch.full((40, dial.LENGTH), dial.HIDDEN)
            shown[:, 0] = torch.randint(dial.POSITIONS, (40,))
            hand = (shown[:, :1] + elapsed.cumsum(1) - elapsed[:, :1]).long() % dial.POSITIONS
            logits = head(memory(embed(shown), elapsed=elapsed if with_time else None)[0])
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), hand.flatten()).backward()
            optimizer.step()
        return (logits.argmax(-1) == hand)[:, 1:].float().mean().item()

    assert trained(with_time=True) > 0.95
    assert trained(with_time=False) < 0.35
