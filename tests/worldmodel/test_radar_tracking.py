"""Tracks: a target is followed through missed detections and false alarms, and its velocity found."""

import math

import pytest
import torch

from worldmodel.environments.radar.config import CFARConfig, RadarConfig, Targets
from worldmodel.environments.radar.echoes import echoes
from worldmodel.environments.radar.jamming import barrage
from worldmodel.environments.radar.receiver import range_doppler_map
from worldmodel.environments.radar.tracking import TrackConfig, Tracker, peaks
from worldmodel.environments.radar.waveforms import LFM
from worldmodel.runs.fields import ConfigurationError


def test_a_target_is_tracked_from_the_chain_through_misses_and_false_alarms():
    """Seed 0: 40 intervals of .1 s, Swerling 1 at 17 dB, false alarms at 1e-4 of 512 cells."""
    radar = RadarConfig(pulse=1.6e-6, repetition=6.4e-6, pulses=8)
    config, waveform, generator = CFARConfig(), LFM(16)().detach(), torch.Generator().manual_seed(0)
    tracker = Tracker(TrackConfig(range_error=radar.cell_length / math.sqrt(12), acceleration=1.0, lose=8))
    found, seen = [], []
    for step in range(40):
        distance, velocity = 700.0 - 6.0 * step, 60.0
        at = torch.tensor([[distance]])
        target = Targets(at, torch.tensor([[velocity]]), radar.cross_section(at, torch.tensor(50.0)), swerling=1)
        received = echoes(radar, waveform, target, generator) + barrage(radar, torch.ones(1), generator)
        powers = range_doppler_map(radar, received, waveform)[0]
        _, cells = peaks(powers, config)
        seen.append(len(cells))
        found.append((distance, tracker.update(cells * radar.cell_length)))
    distance, confirmed = found[-1]
    assert 0 in seen, "targets are missed"
    assert len(confirmed) == 1
    assert abs(float(confirmed[0].mean[0]) - distance) < radar.cell_length
    assert abs(float(confirmed[0].mean[1]) + velocity) < 5
    assert confirmed[0].covariance[1, 1].sqrt() < 5


def test_the_gain_of_a_long_track_is_that_of_the_steady_filter():
    """Of α in Bar-Shalom et al. 2001, section 6.5, from the manoeuvring index λ = σ_a T² / σ_r."""
    config = TrackConfig(interval=2.0, range_error=3.0, acceleration=0.6)
    tracker = Tracker(config)
    for _ in range(200):
        tracker.update(torch.tensor([100.0]))
    (track,) = tracker.tracks
    index = 0.6 * 2.0**2 / 3.0
    alpha = -(index**2 + 8 * index - (index + 4) * math.sqrt(index**2 + 8 * index)) / 8
    assert float(track.covariance[0, 0]) / 3.0**2 == pytest.approx(alpha, rel=1e-6)


def test_tracks_cross_keep_their_numbers_and_end():
    tracker = Tracker(TrackConfig(interval=1.0, range_error=1.0, velocity_error=50.0, acceleration=0.1, lose=3))
    for step in range(12):
        confirmed = tracker.update(torch.tensor([100.0 + 10 * step, 215.0 - 10 * step]))
    means = {track.number: track.mean.tolist() for track in confirmed}
    assert means[0] == pytest.approx([210, 10], abs=0.5) and means[1] == pytest.approx([105, -10], abs=0.5)
    for left in (2, 2, 0):
        assert len(tracker.update(torch.empty(0))) == left
    tracker.update(torch.tensor([50.0]))
    assert [track.number for track in tracker.tracks] == [2]


@pytest.mark.parametrize("distances", [torch.zeros(1, 1), torch.tensor([math.nan])])
def test_bad_detections_are_told(distances):
    with pytest.raises(ConfigurationError, match=r"Tracker: distances have shape .*, expected \(detections,\)"):
        Tracker(TrackConfig()).update(distances)
