"""Tracks: detections of successive intervals are joined by a Kalman filter of constant velocity.

A detection belongs to the track whose predicted range is nearest, within a gate; what belongs to none begins one. A
track is confirmed after some detections, and ends after some intervals without one.

Sources: Kalman, "A new approach to linear filtering and prediction problems", J. Basic Eng. 82 (1960); Bar-Shalom, Li &
Kirubarajan, Estimation with Applications to Tracking and Navigation (2001), sections 6.2 (white-noise acceleration) and
3.5 (gates).
"""

import dataclasses
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.environments.radar.config import CFARConfig, Seconds
from worldmodel.environments.radar.receiver import detect
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Limit, Unit


def peaks(powers: Tensor, config: CFARConfig) -> tuple[Tensor, Tensor]:
    """Doppler rows and range cells, int64 (detections,), where a CFAR detects and no neighbouring cell has more power.

    Args:
        powers: a range-Doppler map, (rows, cells), whose rows and cells go round.
        config: of the CFAR.
    """
    around = F.max_pool2d(F.pad(powers[None, None], (1, 1, 1, 1), mode="circular"), 3, 1)[0, 0]
    row, cell = (detect(powers, config) & (powers >= around)).nonzero().unbind(1)
    return row, cell


@dataclasses.dataclass(frozen=True)
class TrackConfig(Checked):
    """Of a tracker.

    Attributes:
        interval: between two sets of detections, s.
        range_error: standard deviation of a measured range, m.
        velocity_error: standard deviation of a first, unknown velocity, m/s.
        acceleration: standard deviation of a target's acceleration, constant within an interval, m/s².
        gate: standard deviations of the innovation within which a detection belongs to a track.
        confirm: detections after which a track is confirmed.
        lose: intervals without a detection after which it ends.
    """

    interval: Seconds = 0.1
    range_error: Annotated[float, Bounds(0, 1e6, above=True), Unit("m")] = 5.0
    velocity_error: Annotated[float, Bounds(0, 1e5, above=True), Unit("m/s")] = 100.0
    acceleration: Annotated[float, Bounds(0, 1e5), Unit("m/s²")] = 5.0
    gate: Annotated[float, Bounds(0, 100, above=True)] = 4.0
    confirm: Limit = 3
    lose: Limit = 5


@dataclasses.dataclass
class Track:
    """A target's state.

    Attributes:
        number: that stays with the track.
        mean: range in m and range rate in m/s, float64 (2,).
        covariance: float64 (2, 2).
        detections: that belonged to it.
        missed: intervals since the last of them.
    """

    number: int
    mean: Tensor
    covariance: Tensor
    detections: int = 1
    missed: int = 0


class Tracker:
    """Joins detections to tracks.

    Attributes:
        tracks: that have not ended.

    Example:
        >>> tracker = Tracker(TrackConfig(interval=1.0, velocity_error=20.0))
        >>> for distance in (1000.0, 990.0, 980.0):
        ...     confirmed = tracker.update(torch.tensor([distance]))
        >>> [(track.number, [round(x) for x in track.mean.tolist()]) for track in confirmed]
        [(0, [980, -10])]
    """

    def __init__(self, config: TrackConfig) -> None:
        self.config, self.tracks, self._next = config, list[Track](), 0
        step = config.interval
        self._motion = torch.tensor([[1.0, step], [0.0, 1.0]], dtype=torch.float64)
        push = torch.tensor([step**2 / 2, step], dtype=torch.float64)
        self._process = config.acceleration**2 * torch.outer(push, push)

    def update(self, distances: Tensor) -> list[Track]:
        """Takes the detections of the next interval; returns the confirmed tracks.

        Args:
            distances: measured ranges, m, (detections,).

        Raises:
            ConfigurationError: another shape, or a range that is not finite.
        """
        if distances.ndim != 1 or not distances.isfinite().all():
            raise ConfigurationError(
                f"Tracker: distances have shape {tuple(distances.shape)}, expected (detections,) of finite values (m)"
            )
        config = self.config
        for track in self.tracks:
            track.mean = self._motion @ track.mean
            track.covariance = self._motion @ track.covariance @ self._motion.T + self._process
            track.missed += 1
        free = set(range(len(distances)))
        for _, track, number in sorted(self._gated(distances), key=lambda pair: pair[0]):
            if track.missed and number in free:
                self._correct(track, float(distances[number]))
                free.remove(number)
        self.tracks = [track for track in self.tracks if track.missed < config.lose]
        for number in sorted(free):
            variances = torch.tensor([config.range_error**2, config.velocity_error**2], dtype=torch.float64)
            mean = torch.tensor([float(distances[number]), 0.0], dtype=torch.float64)
            self.tracks.append(Track(self._next, mean, variances.diag()))
            self._next += 1
        return [track for track in self.tracks if track.detections >= config.confirm]

    def _gated(self, distances: Tensor) -> list[tuple[float, Track, int]]:
        """Pairs of track and detection within the gate, with the innovation in standard deviations."""
        pairs = []
        for track in self.tracks:
            spread = float(track.covariance[0, 0] + self.config.range_error**2) ** 0.5
            away = ((distances - track.mean[0]).abs() / spread).tolist()
            pairs += [(value, track, number) for number, value in enumerate(away) if value <= self.config.gate]
        return pairs

    def _correct(self, track: Track, distance: float) -> None:
        gain = track.covariance[:, 0] / (track.covariance[0, 0] + self.config.range_error**2)
        track.mean = track.mean + gain * (distance - track.mean[0])
        track.covariance = track.covariance - torch.outer(gain, track.covariance[0])
        track.detections, track.missed = track.detections + 1, 0
