"""Agents of the game of channels: players and agents agree, both sides learn from what happened, and past ones stay."""

import dataclasses

import pytest
import torch

from worldmodel.environments.making import specs_of
from worldmodel.environments.radar.game import SILENT, RadarGameConfig, RadarGames, detection_table
from worldmodel.environments.radar.policies import fixed, random, score
from worldmodel.learning.channel_agent import (
    ChannelAgentConfig,
    JammerPlayer,
    RadarPlayer,
    jammer_agent,
    radar_agent,
)
from worldmodel.learning.channel_league import League, LeagueConfig, best_response, hits
from worldmodel.learning.channel_trainer import ChannelLearner, ChannelTrainConfig, RadarTrainer, play
from worldmodel.learning.presets import choose_preset
from worldmodel.model.blocks import GatedConvBlock, GRUBlock
from worldmodel.model.memory import MemoryConfig

GAME = RadarGameConfig(channels=4, look_back=(2, 2))
CONV = ChannelAgentConfig(MemoryConfig(width=32, blocks=(GatedConvBlock(),)), hidden=32)
TRAIN = ChannelTrainConfig(agent=CONV, batch_size=32, steps=10, lr=1e-2, warmup=10, minutes=1, updates=80)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_player_chooses_step_by_step_what_the_agent_chooses_at_once_and_starts_anew_with_each_game():
    torch.manual_seed(0)
    game = dataclasses.replace(GAME, waveforms=2)
    agent = radar_agent(game, ChannelAgentConfig(MemoryConfig(width=16, blocks=(GRUBlock(),)), hidden=16))
    player = RadarPlayer(agent)
    for seed in (0, 1):
        games, actions = RadarGames(5, game, seeded(seed)), []

        def noted(games, actions=actions):
            actions.append(player(games))
            return actions[-1]

        played, _ = play(games, 7, noted)
        (choices, _), _ = agent(played.inputs)
        assert torch.equal(choices.masked_fill(~played.legal, -torch.inf).argmax(-1), torch.stack(actions, 1))


def test_both_sides_learn_from_what_happened():
    games = RadarGames(6, GAME, seeded())
    actions = []
    radar, jammer = play(games, 6, lambda games: actions.append(random(games)) or actions[-1])
    sent = torch.stack(actions, 1)
    assert torch.equal(jammer.other, sent), "one waveform: an action is a channel"
    assert torch.equal(jammer.gain, torch.nn.functional.one_hot(sent, 4).float()) and jammer.legal.all()
    assert torch.equal(radar.other[:, 2:], sent[:, :-2]), "L is 2"
    worth = radar.gain.gather(2, sent[..., None])[..., 0]
    clear, copied = detection_table(GAME)[0, [-1, 0]].float()
    assert torch.equal(worth, torch.where(sent == radar.other, copied, clear))
    assert (radar.gain == 0).equal(~radar.legal)
    told_by_observation = radar.inputs[:, 1:, 7:11].argmax(-1)
    assert torch.equal(told_by_observation, radar.other[:, :-1])
    blind, _ = play(RadarGames(2, dataclasses.replace(GAME, sensed=False), seeded()), 1, random)
    assert (blind.other == SILENT).all()


def test_the_gain_is_the_expectation_over_the_policy_and_its_gradient_climbs():
    torch.manual_seed(1)
    config = dataclasses.replace(TRAIN, entropy=0.0, prediction=0.0, warmup=1, lr=1e-3, weight_decay=0.0)
    learner = ChannelLearner(radar_agent(GAME, CONV), config)
    played, _ = play(RadarGames(32, GAME, seeded()), 10, random)
    (choices, _), _ = learner.agent(played.inputs)
    policy = choices.masked_fill(~played.legal, -torch.inf).softmax(-1)[:, 2:]
    expected = (policy * played.gain[:, 2:]).sum(-1).mean().item()
    first = learner.update(played)["gain"]
    assert first == pytest.approx(expected, rel=1e-5)
    for _ in range(20):
        last = learner.update(played)["gain"]
    assert last > first + 0.01


def test_a_radar_learns_to_stay_away_from_a_look_back_jammer():
    """Two of four channels are free: a random radar is hit in a quarter of the intervals."""
    trainer = RadarTrainer(GAME, TRAIN)
    while not trainer.finished:
        metrics = trainer.iterate()
    assert trainer.learner.updates == 80 and metrics["prediction_accuracy"] > 0.9
    found = score(GAME, {"radar": RadarPlayer(trainer.agent), "random": random}, 24, games=64)
    assert found["radar"]["hits"] < 0.02 and found["random"]["hits"] > 0.2


def test_games_take_a_jammer_that_chooses_from_what_it_heard():
    class Follower:
        """Jams where the radar was before."""

        def __init__(self):
            self.heard = []

        def __call__(self, games):
            self.heard.append(games.heard)
            return games.last_sent.clamp_min(0)

    follower = Follower()
    game = dataclasses.replace(GAME, waveforms=2, available=0)
    games = RadarGames(3, game, seeded(), follower)
    assert torch.equal(games.heard, torch.zeros(3, 9)) and torch.equal(games.jammed, torch.zeros(3, dtype=torch.int64))
    stay = torch.tensor([0, 2, 5])
    assert games.step(stay)["hit"].tolist() == [True, False, False]
    happened = games.step(stay)
    assert happened["hit"].all() and happened["jammed"].tolist() == [0, 1, 2]
    assert torch.allclose(happened["reward"], detection_table(game)[stay % 2, 2].float()), "noise, not a copy"
    sent, jammed, hit = games.heard.split([4, 4, 1], 1)
    assert sent.argmax(1).tolist() == jammed.argmax(1).tolist() == [0, 1, 2] and hit.all()
    with pytest.raises(ValueError, match="RadarGames: jammed channels from 4 to 4, expected 0 to 3"):
        RadarGames(3, game, seeded(), lambda games: torch.full((3,), 4))


def test_a_fresh_jammer_exploits_a_radar_that_prefers_a_channel_and_not_one_that_does_not():
    torch.manual_seed(0)
    radar = radar_agent(GAME, CONV)
    for parameter in radar.decision[-1].parameters():
        torch.nn.init.zeros_(parameter)
    train = dataclasses.replace(TRAIN, batch_size=16)
    found = []
    for preference in (0.0, 9.0):
        with torch.no_grad():
            radar.decision[-1].bias[0] = preference
        jammer = best_response(radar, GAME, train, updates=20)
        found += hits(radar, [jammer], GAME, 16, games=128)
    assert 0.18 < found[0] < 0.32 and found[1] > 0.4, "random: a quarter; channel 0 is free in half of the intervals"


def test_a_league_keeps_past_jammers_as_they_were():
    league = League(GAME, LeagueConfig(dataclasses.replace(TRAIN, batch_size=4, steps=6), turn=2))
    league.round()
    assert league.pool[0] is None and len(league.pool) == 2
    first = {name: value.clone() for name, value in league.pool[1].state_dict().items()}
    radar = [value.clone() for value in league.radar.parameters()]
    league.round()
    assert all(torch.equal(value, first[name]) for name, value in league.pool[1].state_dict().items())
    assert any(not torch.equal(value, first[name]) for name, value in league.pool[2].state_dict().items())
    assert any(not torch.equal(new, old) for new, old in zip(league.radar.parameters(), radar, strict=True))
    assert not any(value.requires_grad for value in league.pool[1].parameters())
    newest = League(GAME, LeagueConfig(TRAIN, past=0.0))
    newest.pool.append(jammer_agent(GAME, CONV))
    assert all(newest._opponent() is newest.pool[-1] for _ in range(8))
    assert {id(league._opponent()) for _ in range(64)} == {id(one) for one in league.pool}


def test_a_sampling_player_samples_its_policy():
    torch.manual_seed(0)
    agent = jammer_agent(GAME, CONV)
    for parameter in agent.decision[-1].parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        agent.decision[-1].bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    games = RadarGames(4000, GAME, seeded(), JammerPlayer(agent, greedy=False))
    share = torch.bincount(games.jammed, minlength=4) / 4000
    assert (share - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 0.024, "3σ"
    assert score(GAME, {"fixed": fixed}, 8, 16, jammer=JammerPlayer(agent))["fixed"]["hits"] < 0.25


def test_the_look_back_grows_and_what_it_covers_carries_no_loss():
    game = dataclasses.replace(GAME, look_back=(1, 32))
    trainer = RadarTrainer(game, dataclasses.replace(TRAIN, updates=40, curriculum=0.5))
    seen = []
    for trainer.learner.updates in (0, 10, 20, 30):
        seen.append(trainer.stage.look_back)
    assert seen == [(1, 8), (1, 16), (1, 32), (1, 32)]
    assert RadarTrainer(GAME, TRAIN).stage == GAME, "as long as the easy one, or shorter"
    radar, _ = play(RadarGames(2, game, seeded()), 5, random)
    assert radar.inputs.shape[1] == 37 and radar.burn_in == 32
    learner = ChannelLearner(radar_agent(game, CONV), TRAIN)
    spoiled = dataclasses.replace(radar, gain=radar.gain.index_fill(1, torch.arange(32), torch.nan))
    assert learner.update(spoiled)["gain"] > 0


def test_train_chooses_a_preset_with_a_memory():
    assert choose_preset("worldmodel/RadarGame-v0", *specs_of("worldmodel/RadarGame-v0"))[0] == "popgym"
