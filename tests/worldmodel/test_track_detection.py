"""Detection over several intervals: where a moving target is, what a memory depends on, what sums gain."""

import dataclasses

import pytest
import torch

from worldmodel.environments.radar.config import CFARConfig, RadarConfig
from worldmodel.environments.radar.interval import sample_track
from worldmodel.environments.radar.receiver import follow, range_doppler_map
from worldmodel.learning import detection_networks
from worldmodel.learning.detection_game import DetectionTrainConfig, cfar_scores, detection_loss, known_jammers
from worldmodel.learning.detection_networks import NetworkConfig, TrackingConfig, TrackingNetwork, cells_away
from worldmodel.learning.track_detection import (
    TrackConfig,
    TrackTrainer,
    each_alone,
    measure_tracks,
    remembering,
    sample_tracks,
    summed,
    summed_cfar,
)
from worldmodel.runs.fields import ConfigurationError

TRACKS = TrackConfig()
RADAR = TRACKS.radar


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tracks(intervals, batch=2, jam=None, **options):
    return sample_tracks(dataclasses.replace(TRACKS, intervals=intervals, **options), batch, jam, seeded())


# Motion


def test_rows_follow_their_own_cells_and_go_round():
    maps = torch.arange(12).view(2, 6)
    assert follow(maps, torch.tensor([2, -1])).tolist() == [[2, 3, 4, 5, 0, 1], [11, 6, 7, 8, 9, 10]]
    several, away = torch.randn(5, 3, 2, 6), cells_away(torch.tensor([1.3, -2.6]), torch.arange(3))
    assert away.tolist() == [[0, 0], [1, -3], [3, -5]]
    assert cells_away(torch.tensor([1.3, -2.6]), torch.tensor([[2], [0]])).tolist() == [[[3, -5]], [[0, 0]]]
    assert torch.equal(follow(follow(several, away), -away), several)


def test_an_approaching_row_comes_nearer_by_its_velocity():
    radar = RadarConfig()
    row = torch.tensor([0, 1, radar.pulses - 1])
    velocity = radar.velocity_of_row(row)
    torch.testing.assert_close(radar.doppler(velocity), radar.doppler_of_row(row))
    torch.testing.assert_close(radar.cells_moved(0.2)[row], -velocity * 0.2 / radar.cell_length)
    assert velocity[1] > 0 > radar.cells_moved(0.2)[1]


@pytest.mark.parametrize("between", [0.0512, 0.0512 / 3], ids=["whole cells", "thirds of cells"])
def test_a_target_is_in_its_row_and_in_the_cell_that_is_told_in_every_interval(between):
    codes = tracks(5, batch=64).pulse
    echo, row, cell = sample_track(RADAR, codes, torch.full((64,), 1e4), between, 0, seeded(1))
    maps = range_doppler_map(RADAR, echo.flatten(0, 1), codes.flatten(0, 1)).reshape(64, 5, -1)
    assert torch.equal(maps.argmax(-1), row[:, None] * RADAR.cells + cell)
    away = cells_away(RADAR.cells_moved(between), torch.arange(5))
    assert torch.equal((cell - away.T[row]) % RADAR.cells, cell[:, :1].expand(-1, 5)), "stays in a frame that follows"


# Network


def test_scores_depend_on_the_intervals_so_far_alone_and_go_on_from_a_state():
    torch.manual_seed(0)
    network, scene = TrackingNetwork(TRACKS.moved), tracks(6)
    whole, last = network(scene.full, scene.pulse)
    assert last.intervals.tolist() == [6, 6] and last.h.shape == (1, 2, 8, RADAR.pulses, RADAR.cells)
    later = scene.full.clone()
    later[:, 3:] = torch.randn_like(later[:, 3:])
    changed = network(later, scene.pulse)[0]
    torch.testing.assert_close(changed[:, :3], whole[:, :3], rtol=0, atol=0)
    assert (changed[:, 3:] - whole[:, 3:]).abs().amax((0, 2, 3)).min() > 1e-3
    first, state = network(scene.full[:, :2], scene.pulse[:, :2])
    parts = [first]
    for part in (slice(2, 3), slice(3, 6)):
        scores, state = network(scene.full[:, part], scene.pulse[:, part], state)
        parts.append(scores)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close((state.h, state.c), (last.h, last.c))


def test_a_game_that_begins_knows_of_none_before():
    """Between intervals, targets move by fractions of cells, whose rounding begins anew as well."""
    torch.manual_seed(0)
    network, scene = TrackingNetwork(TRACKS.moved * 0.4), tracks(6)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 4] = reset[1, 1] = True
    scores, state = network(scene.full, scene.pulse, reset=reset)
    assert state.intervals.tolist() == [2, 5]
    for game, first in ((0, 4), (1, 1)):
        own = scene.full[game : game + 1], scene.pulse[game : game + 1]
        before, _ = network(*(x[:, :first] for x in own))
        alone, last = network(*(x[:, first:] for x in own))
        torch.testing.assert_close(scores[game : game + 1], torch.cat([before, alone], 1))
        torch.testing.assert_close(state.h[:, game : game + 1], last.h)
    _, state = network(scene.full[:, :4], scene.pulse[:, :4])
    later, again = network(scene.full[:, 4:], scene.pulse[:, 4:], state, reset[:, 4:])
    torch.testing.assert_close(later[0], scores[0, 4:])
    assert again.intervals.tolist() == [2, 6]

    received = scene.full.clone().requires_grad_()
    network(received, scene.pulse, reset=reset)[0][0, 4:].sum().backward()
    assert not received.grad[0, :4].any() and received.grad[0, 4:].any()


def test_range_cells_go_round():
    torch.manual_seed(0)
    network, scene = TrackingNetwork(TRACKS.moved).double(), tracks(5)
    received, pulse = scene.full.cdouble(), scene.pulse.cdouble()
    rolled = network(received.roll(29, -1), pulse)[0]
    torch.testing.assert_close(rolled, network(received, pulse)[0].roll(29, -1))


def test_what_moves_with_its_row_is_to_a_memory_that_follows_as_what_rests_to_one_that_stays(monkeypatch):
    monkeypatch.setattr(
        detection_networks, "map_features", lambda received, waveform: received.real[:, None].expand(-1, 4, -1, -1)
    )
    torch.manual_seed(0)
    config = TrackingConfig(rows=1)
    follows, stays = TrackingNetwork(TRACKS.moved, config), TrackingNetwork(TRACKS.moved, config)
    stays.load_state_dict(follows.state_dict())
    stays.moved.zero_()
    rests = torch.randn(1, 1, RADAR.pulses, RADAR.cells).expand(2, 4, -1, -1)
    away = cells_away(TRACKS.moved, torch.arange(4))
    pulse = torch.zeros(2, 4, RADAR.samples)
    moving = follows(follow(rests, -away), pulse)[0]
    torch.testing.assert_close(follow(moving, away), stays(rests, pulse)[0])
    assert not TrackingNetwork(TRACKS.moved, TrackingConfig(following=False)).moved.any()


def test_the_gradient_of_a_score_reaches_the_pulse_of_the_first_interval():
    torch.manual_seed(0)
    network, scene = TrackingNetwork(TRACKS.moved), tracks(4)
    received = scene.full.clone().requires_grad_()
    scene.at_target(network(received, scene.pulse)[0])[:, -1].sum().backward()
    assert (received.grad.abs().amax((0, 2, 3)) > 1e-6).all()


# Training and measurement


def test_a_batch_of_tracks_is_jammed_with_the_pulse_of_the_interval_before():
    heard = []

    def jam(pulse, ratio, generator):
        heard.append(pulse)
        return torch.zeros(len(ratio), RADAR.pulses, RADAR.cells, dtype=torch.complex64)

    sent = tracks(3, jam=jam, intercept=300.0).pulse
    torch.testing.assert_close(heard[0].unflatten(0, (2, 3))[:, 1:], sent[:, :-1])
    sent = tracks(3, jam=jam, intercept=300.0, agile=False).pulse
    torch.testing.assert_close(heard[1].unflatten(0, (2, 3)), sent)


def test_detector_and_jammer_learn_in_turn_from_tracks():
    config = DetectionTrainConfig(TrackingConfig(width=4), batch_size=4, updates=60, turn=20, jammer_every=5)
    trainer = TrackTrainer(dataclasses.replace(TRACKS, intervals=2), config)
    scene = sample_tracks(trainer.scene, 16, known_jammers(RADAR)["barrage"], seeded(9))

    def loss():
        with torch.no_grad():
            return float(detection_loss(remembering(trainer.detector), scene, config.empty_weight))

    before = loss()
    while not trainer.finished:
        trainer.iterate()
    assert loss() < 0.5 * before and len(trainer.pool) == 4
    detector = [value.clone() for value in trainer.detector.parameters()]
    trainer.update_jammer()
    assert all(torch.equal(*pair) for pair in zip(detector, trainer.detector.parameters(), strict=True))


def test_sums_along_the_ways_find_more_from_interval_to_interval_and_sums_in_place_do_not():
    """Seed 3; shares of 128 tracks, at 1e-3 false alarms; σ of a share is at most .045."""
    cfar = cfar_scores(RADAR, CFARConfig())
    detectors = {
        "alone": each_alone(cfar),
        "ways": summed(lambda received, pulse: cfar(received, pulse).exp(), TRACKS.moved),
        "in place": summed(lambda received, pulse: cfar(received, pulse).exp(), torch.zeros(RADAR.pulses)),
        "before the CFAR": summed_cfar(RADAR, CFARConfig(), TRACKS.moved),
    }
    found = measure_tracks(detectors, TRACKS, known_jammers(RADAR)["barrage"], 128, 3, false_alarm=1e-3)
    alone, ways, in_place, before = found.values()
    assert alone[0] == ways[0] == in_place[0] == before[0] and max(alone) < 0.6
    assert sum(before) > sum(ways) + 0.1, "one level of all intervals is steadier than the level of each"
    assert ways[1] > alone[1] + 0.15 and ways[3] > alone[3] + 0.35
    assert in_place[3] < ways[3] - 0.3


def test_the_limit_of_an_interval_leaves_the_asked_share_of_false_alarms():
    scores = torch.arange(2 * RADAR.pulses * RADAR.cells).view(1, 2, RADAR.pulses, RADAR.cells).float()

    def as_ranked(received, pulse):
        return scores.expand(len(received), -1, -1, -1)

    config = dataclasses.replace(TRACKS, intervals=2)
    found = measure_tracks({"ranked": as_ranked}, config, None, 400, 0, false_alarm=0.25)["ranked"]
    assert found == pytest.approx([0.25, 0.25], abs=0.07), "targets in a quarter of the places"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TrackConfig(intervals=0), ConfigurationError, "intervals is 0, expected a whole number, at least 1"),
        (lambda: TrackConfig(between=0.0), ConfigurationError, r"between \(s\) is 0.0, expected a number, more than 0"),
        (
            lambda: TrackTrainer(TRACKS, DetectionTrainConfig(NetworkConfig())),
            TypeError,
            "detector is a NetworkConfig, expected a TrackingConfig",
        ),
    ],
)
def test_an_error_says_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()
