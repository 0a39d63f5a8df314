"""The arm: contact, tasks, a scripted expert of two modes, pictures."""

import copy

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from worldmodel.environments.arm.body import FINGER, angles_for, fingers_of, hand_of
from worldmodel.environments.arm.expert import Expert
from worldmodel.environments.arm.pictures import pictures
from worldmodel.environments.arm.worlds import (
    HALF,
    HAND_RADIUS,
    NOTHING,
    RADIUS,
    TASKS,
    ArmConfig,
    ArmWorlds,
)
from worldmodel.environments.making import specs_of
from worldmodel.environments.registry import make
from worldmodel.runs.fields import ConfigurationError

STEPS = 100


def made(batch, seed=0, **options):
    random = np.random.default_rng(seed)
    worlds = ArmWorlds(batch, ArmConfig(**options), random)
    return worlds, Expert(worlds, random)


def succeeded(worlds, act, steps=STEPS):
    """Share of rows that were successful at some step."""
    done = np.zeros(worlds.batch, bool)
    for _ in range(steps):
        done |= worlds.step(act())
    return done.mean()


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_does_every_task_on_either_side_of_the_obstacle(task):
    worlds, expert = made(64, task=task)
    assert 20 < (expert.side > 0).sum() < 44
    assert succeeded(worlds, expert.act) >= 0.95
    assert worlds.success.all(), "what is done stays done"


def test_the_mean_of_both_modes_runs_into_the_obstacle():
    worlds, expert = made(32)
    expert._places = (expert._places + Expert(worlds, np.random.default_rng(9))._places) / 2
    other = expert.side != Expert(worlds, np.random.default_rng(9)).side  # rows that mean both sides
    done = np.zeros(32, bool)
    for _ in range(STEPS):
        done |= worlds.step(expert.act())
    assert 8 < other.sum() < 24 and not done[other].any() and done[~other].any()
    free, expert = made(32, obstacle=False)
    assert succeeded(free, expert.act) == 1, "without the obstacle, straight down"


def test_nothing_is_in_anything_else_whatever_the_actions_are():
    worlds, expert = made(32, seed=1)
    random, most = np.random.default_rng(2), 0.0
    for step in range(90):
        wild = random.uniform(-1, 1, (32, 4)).round(int(step % 3 == 0))
        worlds.step(np.where(random.random((32, 1)) < 0.4, wild, expert.act()))
        hands, blocks = worlds.hands, worlds.blocks
        assert (np.linalg.norm(hands - worlds.obstacle, axis=1) > RADIUS + HAND_RADIUS).all()
        assert (hands[:, 1] > FINGER[1]).all() and (blocks[..., 1] > HALF - 1e-6).all()
        assert (np.abs(blocks[:, 0] - blocks[:, 1]).max(1) > 2 * HALF - 1e-6).all()
        gaps = np.abs(blocks[:, :, None] - fingers_of(hands, worlds.opening)[:, None])
        inside = (gaps < FINGER + HALF - 1e-3).all(-1).any(-1) & (worlds.held[:, None] != np.arange(2))
        falls = blocks[..., 1] > HALF + 1e-6
        assert not (inside & ~falls).any(), "a finger in a block at rest"
        most = max(most, blocks[..., 1].max())
    assert most > 0.15, "some were lifted"


def test_rows_of_a_batch_are_independent():
    worlds, _ = made(4, seed=3)
    single = []
    for row in range(4):
        one = copy.copy(worlds)
        one.batch = 1
        for name, value in vars(worlds).items():
            if isinstance(value, np.ndarray):
                setattr(one, name, value[row : row + 1].copy())
        single.append(one)
    random = np.random.default_rng(0)
    for _ in range(20):
        actions = random.uniform(-1, 1, (4, 4))
        together = worlds.step(actions)
        assert together.tolist() == [bool(one.step(actions[i : i + 1])[0]) for i, one in enumerate(single)]
    for name in ("angles", "blocks", "held", "closed", "dirt"):
        assert np.array_equal(getattr(worlds, name), np.concatenate([getattr(one, name) for one in single])), name
    assert np.array_equal(pictures(worlds, 32), np.concatenate([pictures(one, 32) for one in single]))


def placed(x, y, closed=False, **options):
    """A table without an obstacle whose hand is at a place."""
    worlds, _ = made(1, obstacle=False, **options)
    worlds.blocks = np.array([[[0.3, HALF], [0.7, HALF]]])
    worlds.angles, worlds.closed[:] = angles_for(np.array([[x, y]])), closed
    assert np.allclose(hand_of(worlds.angles), [x, y])
    return worlds


def go(worlds, x, y, grip, steps=12):
    for _ in range(steps):
        way = [x, y] - worlds.hands
        ahead = worlds.hands + way * (0.05 / np.linalg.norm(way).clip(0.05))
        turns = (angles_for(ahead) - worlds.angles)[0] / 0.12
        worlds.step(np.array([[*(turns / max(1, np.abs(turns).max())), grip]]))


def test_a_held_block_follows_the_hand_and_falls_when_it_opens():
    worlds = placed(0.3, 0.05, task="pick")
    go(worlds, 0.4, 0.3, 1)
    assert worlds.held[0] == 0 and np.allclose(worlds.blocks[0, 0], worlds.hands[0], atol=0.01) and worlds.success[0]
    go(worlds, 0.4, 0.3, -1, steps=3)
    assert worlds.held[0] == NOTHING and np.allclose(worlds.blocks[0, 0], [worlds.hands[0, 0], HALF], atol=0.01)
    tilted = placed(0.3, 0.05)
    tilted.angles[:, 2] += 0.7
    tilted.angles[:, 0] -= 0.05
    tilted.step(np.array([[0, 0, 0, 1.0]]))
    assert tilted.held[0] == NOTHING, "only a hand that points down grasps"


def test_a_closed_gripper_pushes_an_open_one_does_not_pass_and_neither_pushes_two():
    worlds = placed(0.2, 0.05, closed=True, task="push")
    go(worlds, 0.5, 0.05, 1)
    assert np.isclose(worlds.blocks[0, 0, 0], 0.5 + 0.026 + HALF, atol=1e-3) and worlds.blocks[0, 1, 0] == 0.7
    go(worlds, 0.65, 0.05, 1)
    assert worlds.hands[0, 0] < 0.7 - 3 * HALF - 0.026 + 1e-6 and worlds.blocks[0, 1, 0] == 0.7, "two blocks stop it"
    above = placed(0.3, 0.3, closed=True)
    go(above, 0.3, 0.05, 1)
    assert above.blocks[0, 0].tolist() == [0.3, HALF] and above.hands[0, 1] > 2 * HALF + FINGER[1] - 1e-6


def test_a_block_slides_off_what_is_not_under_its_middle():
    for aside, rest in ((0.04, 3 * HALF), (0.07, HALF)):
        worlds = placed(0.5, 0.5)
        worlds.blocks[0, 0] = [0.7 - aside, 4 * HALF]
        for _ in range(8):
            worlds.step(np.zeros((1, 4)))
        assert np.isclose(worlds.blocks[0, 0, 1], rest) and worlds.blocks[0, 1].tolist() == [0.7, HALF]


def test_pictures_show_places_at_any_size():
    worlds, _ = made(4, task="wipe", seed=5)
    large, small = pictures(worlds, 256), pictures(worlds, 32)
    pooled = large.reshape(4, 32, 8, 32, 8, 3).mean((2, 4))
    assert small.shape == (4, 32, 32, 3) and small.dtype == np.uint8 and np.abs(pooled - small).mean() < 3
    for row in range(4):
        red = (large[row].astype(int) - [214, 58, 50]).__abs__().sum(-1) < 10
        rows, columns = np.nonzero(red)
        x, y = columns.mean() / 256, 1 - 0.06 - rows.mean() / 256
        assert np.allclose([x, y], worlds.blocks[row, 0], atol=0.006)
    worlds.dirt[:] = False
    changed = np.abs(pictures(worlds, 32).astype(int) - small).sum((1, 2, 3))
    assert (changed > 1000).all(), "dirt is seen in 32 pixels"


@pytest.mark.filterwarnings("ignore:.*render_mode.*:UserWarning")
def test_gymnasium_accepts_it_and_a_seed_repeats_an_episode():
    environment = gymnasium.make("worldmodel/Arm-v0", render_mode="rgb_array", joints=True, length=6).unwrapped
    check_env(environment, skip_render_check=True)

    def episode(seed):
        observation, _ = environment.reset(seed=seed)
        seen = [*observation.values()]
        for step in range(6):
            observation, reward, terminated, truncated, info = environment.step(environment.expert())
            assert truncated == (step == 5) and not terminated and not info["success"]
            seen += [*observation.values(), reward]
        return seen

    first, again, other = episode(5), episode(5), episode(6)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert environment.render().shape == (256, 256, 3)
    observations, actions = specs_of("worldmodel/Arm-v0")
    kinds = {name: modality.kind for name, modality in observations.modalities.items()}
    assert kinds == {"picture": "image", "task": "categorical"} and actions.kind == "continuous"


def test_an_episode_ends_with_success():
    environment = make("worldmodel/Arm-v0", task="push")
    environment.reset(seed=0)
    terminated = False
    while not terminated:
        _, reward, terminated, truncated, info = environment.step(environment.unwrapped.expert())
        assert reward == terminated == info["success"] and not truncated


def test_bad_input_is_told():
    environment = make("worldmodel/Arm-v0").unwrapped
    for call in (lambda: environment.step(np.zeros(4)), environment.expert, environment.render):
        with pytest.raises(gymnasium.error.ResetNeeded, match="Arm: there is no table yet: call reset first"):
            call()
    environment.reset(seed=0)
    for action in (np.zeros(3), [0, 0, 0, 1.01], [np.nan, 0, 0, 0]):
        with pytest.raises(
            ConfigurationError, match=r"Arm: action is .*, expected three turns and the gripper, -1 to 1"
        ):
            environment.step(action)
    with pytest.raises(ConfigurationError, match="task is 'fold', expected 'any', 'pick', 'push', 'stack' or 'wipe'"):
        ArmConfig(task="fold")
    worlds, _ = made(2)
    for actions in (np.zeros((2, 3)), np.full((2, 4), np.nan)):
        with pytest.raises(ValueError, match=r"ArmWorlds: actions have shape .*, expected \(2, 4\) from -1 to 1"):
            worlds.step(actions)
