"""dm_control's tasks: frames, rewards, seeds."""

import gymnasium
import numpy as np
import pytest

from worldmodel.environments.dm_control import ActionRepeat, make
from worldmodel.environments.making import specs_of
from worldmodel.runs.fields import ConfigurationError

TASK = "worldmodel/DMControl-v0"


class Counting(gymnasium.Env):
    """Frame n gives a reward of n; the end comes after ``frames``, as ``ends`` says."""

    observation_space = gymnasium.spaces.Discrete(100)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, frames, ends="truncated"):
        self.frames, self.ends = frames, ends

    def reset(self, *, seed=None, options=None):
        self.frame = 0
        return 0, {}

    def step(self, action):
        self.frame += 1
        over = self.frame >= self.frames
        return self.frame, self.frame, over and self.ends == "terminated", over and self.ends == "truncated", {}


@pytest.mark.parametrize("ends", ["terminated", "truncated"])
def test_rewards_of_the_frames_are_added_and_an_end_in_between_is_kept(ends):
    env = ActionRepeat(Counting(5, ends), 2)
    env.reset()
    steps = [env.step(0)[:4] for _ in range(3)]
    last = (ends == "terminated", ends == "truncated")
    assert steps == [(2, 3.0, False, False), (4, 7.0, False, False), (5, 5.0, *last)]


def test_no_frame_per_action_is_refused():
    with pytest.raises(ConfigurationError, match="frames is 0, expected at least 1"):
        ActionRepeat(Counting(5), 0)


@pytest.fixture
def suite():
    pytest.importorskip("dm_control.suite", reason="dm_control is not installed")
    pytest.importorskip("shimmy", reason="shimmy is not installed")


@pytest.mark.usefixtures("suite")
def test_an_episode_has_a_thousand_frames_and_follows_from_its_seed():
    def episode(seed):
        env = make("cartpole-swingup")
        observation, _ = env.reset(seed=seed)
        numbers, over = [], False
        while not over:
            observation, reward, terminated, over, _ = env.step(np.ones(1))
            numbers.append([*observation["position"], *observation["velocity"], reward])
            assert not terminated
        return np.array(numbers)

    first = episode(3)
    assert len(first) == 500
    np.testing.assert_array_equal(first, episode(3))
    assert not np.array_equal(first, episode(4))


@pytest.mark.usefixtures("suite")
def test_a_step_is_as_many_frames_as_said():
    one, two = make("cartpole-swingup", 1), make("cartpole-swingup", 2)
    for env in (one, two):
        env.reset(seed=0)
    frames = [one.step(np.ones(1)) for _ in range(2)]
    observation, reward, *_ = two.step(np.ones(1))
    np.testing.assert_array_equal(observation["position"], frames[-1][0]["position"])
    assert reward == sum(frame[1] for frame in frames)


@pytest.mark.usefixtures("suite")
def test_training_sees_vectors_and_continuous_actions():
    seen, acted = specs_of(TASK, env_args={"task": "ball_in_cup-catch"})
    assert {modality.kind for modality in seen.modalities.values()} == {"vector"}
    assert acted.kind == "continuous" and acted.low == (-1.0, -1.0)


@pytest.mark.usefixtures("suite")
def test_a_task_that_does_not_exist_is_refused_with_those_of_like_names():
    with pytest.raises(ConfigurationError, match=r"'cartpole-swing', expected .*cartpole-swingup"):
        make("cartpole-swing")
    with pytest.raises(ConfigurationError, match=r"'xyzzy', expected .*walker-"):
        make("xyzzy")
