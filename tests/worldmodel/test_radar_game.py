"""The game of channels: who is hit follows from a plain history, and rewards from theory or the sampled chain."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env

from worldmodel.environments.making import specs_of
from worldmodel.environments.radar.config import CFARConfig, RadarConfig
from worldmodel.environments.radar.game import SILENT, RadarGameConfig, RadarGames, detection_table
from worldmodel.environments.radar.policies import baselines, oracle, random, score
from worldmodel.environments.registry import make
from worldmodel.runs.fields import ConfigurationError

CONFIGS = {
    "plain": {},
    "waveforms": {"waveforms": 3, "channels": 4, "available": 1, "look_back": (2, 5)},
    "every channel": {"available": 0, "channels": 3, "sensed": False, "look_back": (1, 1)},
    "spot": {"jammer": "spot", "waveforms": 2},
    "sweep": {"jammer": "sweep", "channels": 5},
    "random": {"jammer": "random", "sensed": False},
}
EACH = pytest.mark.parametrize("options", CONFIGS.values(), ids=list(CONFIGS))


def games(batch=6, seed=0, **options):
    return RadarGames(batch, RadarGameConfig(**options), torch.Generator().manual_seed(seed))


def uniform(play):
    """Any action, also on channels that are not free."""
    return torch.randint(0, play.config.actions, (play.batch,), generator=play.generator)


@EACH
def test_gymnasium_accepts_it(options):
    check_env(gymnasium.make("worldmodel/RadarGame-v0", **options).unwrapped, skip_render_check=True)


@EACH
def test_hits_and_rewards_follow_from_a_plain_history(options):
    play = games(**options)
    config, table = play.config, detection_table(play.config)
    steps, previous = play.config.look_back[1] + 30, [[] for _ in range(play.batch)]
    begun = play.time
    for t in range(steps):
        actions, free, values = uniform(play), play.available.clone(), play.expected
        happened = play.step(actions)
        for game in range(play.batch):
            channel, waveform = divmod(int(actions[game]), config.waveforms)
            silent = not free[game, channel]
            assert int(free[game].sum()) == (config.available or config.channels)
            jammed = int(happened["jammed"][game])
            if config.jammer == "look_back" and t >= play.look_back[game]:
                before = previous[game][t - int(play.look_back[game])]
                assert jammed == (SILENT if before is None else before[0])
            elif config.jammer == "spot":
                assert jammed == play._spot[game]
            elif config.jammer == "sweep":
                assert jammed == (play._spot[game] + t) % config.channels
            assert bool(happened["silent"][game]) == silent
            assert bool(happened["hit"][game]) == (jammed == channel and not silent)
            if silent:
                expected = 0.0
            elif not happened["hit"][game]:
                expected = float(table[waveform, -1])
            elif config.jammer != "look_back":
                expected = float(table[waveform, config.waveforms])
            elif t >= play.look_back[game]:
                expected = float(table[waveform, before[1]])
            else:
                expected = float(happened["reward"][game])
            assert float(happened["reward"][game]) == pytest.approx(expected)
            assert float(values[game, actions[game]]) == pytest.approx(expected)
            previous[game].append(None if silent else (channel, waveform))
    assert play.time == begun + steps


def test_observations_show_the_interval_before_and_what_is_free():
    play = games(channels=4, waveforms=2, available=2)
    assert play.observations.shape == (6, play.config.features) and not play.observations[:, :-4].any()
    for _ in range(5):
        actions = random(play)
        happened, free = play.step(actions), play.available
        sent, waveform, told, sensed, now = play.observations.split([4, 2, 2, 4, 4], 1)
        assert torch.equal(sent.argmax(1) * 2 + waveform.argmax(1), actions) and torch.equal(now, free.float())
        assert torch.equal(told, torch.stack([happened["reward"], happened["hit"].float()], 1))
        assert torch.equal(sensed.argmax(1), happened["jammed"]) and torch.equal(play.last_sensed, happened["jammed"])
    blind = games(channels=4, sensed=False, available=0, look_back=(1, 1))
    blind.step(torch.zeros(6, dtype=torch.int64))
    hit = blind.step(torch.zeros(6, dtype=torch.int64))["hit"]
    assert hit.all() and torch.equal(blind.last_sensed, torch.zeros(6, dtype=torch.int64))
    assert blind.observations.shape == (6, 4 + 1 + 2 + 4)


@pytest.mark.parametrize("jammer", ["look_back", "spot"])
def test_sampled_rewards_have_the_mean_of_the_exact_ones(jammer):
    """Seed 0; 2,048 games of 8 intervals, in half of which the radar stays in one of two channels."""
    play = games(2048, jammer=jammer, sampled=True, waveforms=2, channels=2, available=0, look_back=(1, 2))
    expected, found, hits = [], [], []
    for _ in range(8):
        values, actions = play.expected, uniform(play)
        happened = play.step(actions)
        expected.append(values.gather(1, actions[:, None])[:, 0])
        found.append(happened["reward"])
        hits.append(happened["hit"])
    expected, found, hits = (torch.cat(parts).double() for parts in (expected, found, hits))
    assert set(found.unique().tolist()) == {0.0, 1.0}
    for chosen in (hits == 0, hits == 1):
        mean = expected[chosen]
        sigma = float((mean * (1 - mean)).sum().sqrt())
        assert chosen.sum() > 4000 and abs(float((found[chosen] - mean).sum())) < 3 * sigma


def test_tried_actions_have_the_mean_of_the_exact_ones_and_change_no_game():
    """Seed 0; 4,096 games of 4 intervals; a step of .02 nepers is nearly a detection."""
    play = games(4096, waveforms=2, channels=3, available=2, look_back=(1, 2))
    expected, tried, jammed = [], [], []
    for _ in range(4):
        before = play.observations.clone(), play.jammed.clone()
        found = play.tried(0.02)
        assert all(torch.equal(*pair) for pair in zip(before, (play.observations, play.jammed), strict=True))
        free = play.available.repeat_interleave(2, 1)
        assert not found[~free].any()
        expected.append(play.expected[free])
        tried.append(found[free])
        jammed.append((play.jammed[:, None] == torch.arange(3)).repeat_interleave(2, 1)[free])
        play.step(uniform(play))
    expected, tried, jammed = (torch.cat(parts).double() for parts in (expected, tried, jammed))
    assert tried.min() >= 0 and tried.max() <= 1 and tried.unique().numel() > 1000
    for chosen in (jammed == 0, jammed == 1):
        mean = expected[chosen]
        sigma = float((mean * (1 - mean)).sum().sqrt())
        assert chosen.sum() > 4000 and abs(float((tried[chosen] - mean).sum())) < 3 * sigma


def test_the_table_of_detections_is_computed_once_for_games_that_differ_in_channels_and_jammer():
    config = RadarGameConfig()
    same = RadarGameConfig(channels=4, look_back=(2, 9), jammer="sweep", sensed=False, available=1, sampled=True)
    assert detection_table(same) is detection_table(config)
    assert not torch.equal(detection_table(RadarGameConfig(jnr=9.0)), detection_table(config))
    assert torch.equal(detection_table(config, config.pulses()), detection_table(config))


def test_a_copy_of_another_waveform_does_less_harm_than_one_of_the_same():
    config = RadarGameConfig(waveforms=3, radar=RadarConfig(pulse=3.2e-6, repetition=12.8e-6, pulses=2))
    table = detection_table(config)
    copies, clear = table[:, :3], table[:, -1]
    assert (copies < clear[:, None]).all()
    assert (copies.diagonal() < (copies + torch.eye(3)).min(1).values).all()


def test_baselines_are_hit_as_often_as_they_must_be():
    """256 games of 48 intervals: 3σ of the random policy is .9%."""
    config = RadarGameConfig(look_back=(8, 8))
    scores = score(config, baselines(config), 48)
    assert list(scores) == ["fixed", "round robin", "random", "memoryless", "oracle"]
    assert abs(scores["random"]["hits"] - 1 / 8) < 0.009, "a free channel of two is another's choice with 1/8"
    assert scores["oracle"]["hits"] == 0
    assert scores["oracle"]["detections"] == pytest.approx(float(detection_table(config)[0, -1]))
    assert scores["fixed"]["hits"] > 0.16 and scores["round robin"]["hits"] > 0.16
    assert 0.08 < scores["memoryless"]["hits"] < scores["random"]["hits"] + 0.005


@pytest.mark.parametrize("options", [{"jammer": "spot"}, {"jammer": "sweep"}, {"look_back": (1, 1)}])
def test_one_interval_is_memory_enough_where_it_tells_all(options):
    config = RadarGameConfig(**options)
    scores = score(config, baselines(config), 32)
    assert scores["memoryless"]["hits"] == scores["oracle"]["hits"] == 0 < scores["random"]["hits"]


def test_the_oracle_takes_another_waveform_where_no_other_channel_is_free():
    options = {"channels": 2, "available": 1, "waveforms": 2, "look_back": (1, 1)}
    config = RadarGameConfig(**options)
    found = score(config, {"oracle": oracle, "random": random}, 64)
    assert found["oracle"]["hits"] > 0.3 and found["oracle"]["detections"] > found["random"]["detections"] + 0.01


def test_a_seed_and_actions_repeat_an_episode_and_an_environment_is_a_batch_of_one():
    options = {"sampled": True, "waveforms": 2, "length": 12}
    environment = make("worldmodel/RadarGame-v0", **options)
    first, info = environment.reset(seed=7)
    drawn = int(seeding.np_random(7)[0].integers(2**62))
    play = RadarGames(1, RadarGameConfig(sampled=True, waveforms=2), torch.Generator().manual_seed(drawn))
    assert np.array_equal(first, play.observations[0])
    for step in range(12):
        assert info["action_mask"].tolist() == play.available[0].repeat_interleave(2).int().tolist()
        action = int(info["action_mask"].argmax())
        observation, reward, terminated, truncated, info = environment.step(action)
        happened = play.step(torch.tensor([action]))
        assert reward == happened["reward"] and info["hit"] == happened["hit"] and info["jammed"] == happened["jammed"]
        assert np.array_equal(observation, play.observations[0]) and observation.dtype == np.float32
        assert not terminated and truncated == (step == 11)
    observations, actions = specs_of("worldmodel/RadarGame-v0", env_args={"waveforms": 2})
    assert observations.action_mask == "info" and actions.sizes == (16,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 1}, "channels is 1, expected a whole number, at least 2"),
        ({"available": 9}, r"available is 9 channels, expected at most channels \(8\)"),
        ({"look_back": (0, 8)}, r"look_back.0 \(intervals\) is 0, expected a whole number, at least 1"),
        ({"look_back": (9, 8)}, r"look_back is \(9, 8\) \(intervals\), expected the smallest first"),
        ({"snr": float("nan")}, r"snr \(dB\) is nan, expected a finite number"),
        ({"jnr": 301.0}, r"jnr \(dB\) is 301.0, expected a number, at least -300"),
        ({"jammer": "clever"}, "jammer is 'clever', expected 'look_back', 'spot', 'sweep' or 'random'"),
        ({"cfar": CFARConfig(references=62, guard=2)}, "take 67 cells, expected at most the map's 64 range cells"),
    ],
)
def test_bad_options_are_told_with_their_unit(options, message):
    with pytest.raises(ConfigurationError, match=message):
        RadarGameConfig(**options)


def test_bad_actions_are_told():
    play = games()
    for actions, message in (
        (torch.full((6,), 8), "actions from 8 to 8, expected 0 to 7"),
        (torch.zeros(5, dtype=torch.int64), r"shape \(5,\) and dtype torch.int64, expected \(6,\) and torch.int64"),
        (torch.zeros(6), r"dtype torch.float32, expected \(6,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            play.step(actions)
    environment = make("worldmodel/RadarGame-v0").unwrapped
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset first"):
        environment.step(0)
    environment.reset(seed=0)
    for action in (8, -1, 0.5):
        with pytest.raises(ConfigurationError, match=f"RadarGame: action is {action}, expected a whole number"):
            environment.step(action)
