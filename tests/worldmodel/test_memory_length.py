"""MemoryLength: bsuite's protocol, and that only the shown bits tell the answer."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from worldmodel.environments.memory_length import MemoryLength
from worldmodel.runs.fields import ConfigurationError


def episode(chain, seed, act):
    seen = [chain.reset(seed=seed)[0]]
    rewards, ended = [], False
    while not ended:
        observation, reward, ended, truncated, _ = chain.step(act(seen))
        seen.append(observation)
        rewards.append(reward)
        assert not truncated
    return np.array(seen), np.array(rewards)


def recalling(seen):
    """The bit that was asked for, by the observations alone."""
    bits = seen[0][2:]
    return int(bits[int(seen[-1][1] if seen[-1][0] else seen[-2][1])] > 0)


def test_it_is_an_environment():
    check_env(gymnasium.make("worldmodel/MemoryLength-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize(("length", "bits"), [(1, 1), (2, 1), (10, 1), (10, 4)])
def test_an_episode_is_that_of_bsuite(length, bits):
    chain = MemoryLength(length, bits)
    for seed in range(20):
        seen, rewards = episode(chain, seed, lambda seen: 0)
        assert len(rewards) == length + 1 and not rewards[:-1].any() and abs(rewards[-1]) == 1
        times = [1.0, *(1 - step / length for step in range(length + 1))]
        np.testing.assert_allclose(seen[:, 0], times, atol=1e-6)
        assert (np.abs(seen[:2, 2:]) == 1).all() and (seen[0, 2:] == seen[1, 2:]).all() and not seen[2:, 2:].any()
        asked = np.flatnonzero(seen[:, 1])
        assert set(asked) <= {length, *([0] if length == 1 else [])}, asked
        assert all(chain.observation_space.contains(observation) for observation in seen)


@pytest.mark.parametrize("bits", [1, 3])
def test_who_remembers_is_always_right_and_who_guesses_half_of_the_time(bits):
    chain = MemoryLength(10, bits)
    right = {
        name: [episode(chain, seed, act)[1][-1] > 0 for seed in range(300)]
        for name, act in (("memory", lambda seen: recalling(seen) if len(seen) > 9 else 0), ("guess", lambda seen: 1))
    }
    assert all(right["memory"]) and 0.4 < np.mean(right["guess"]) < 0.6


@pytest.mark.parametrize("arguments", [{"length": 0}, {"bits": 0}])
def test_nothing_to_remember_is_refused(arguments):
    with pytest.raises(ConfigurationError, match="expected an integer of at least 1"):
        MemoryLength(**arguments)
