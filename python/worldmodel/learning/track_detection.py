"""Detection over several intervals: a network with a memory of maps against jammers, and sums without one.

A target keeps its Doppler row and moves by its velocity. In each interval it fluctuates anew, the radar sends another
code, and the jammer has heard that of the interval before. Detector and jammer learn in turn, as in
``detection_game.py``.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor, nn

from worldmodel.environments.radar.config import CFARConfig, RadarConfig, Seconds
from worldmodel.environments.radar.interval import sample_track
from worldmodel.environments.radar.receiver import follow, range_doppler_map
from worldmodel.environments.radar.theory import power
from worldmodel.learning.detection_game import (
    DetectionTrainConfig,
    DetectionTrainer,
    Detector,
    Jam,
    Scene,
    SceneConfig,
    interference,
    over_references,
)
from worldmodel.learning.detection_networks import TrackingConfig, TrackingNetwork, cells_away
from worldmodel.runs.fields import Bounds


@dataclasses.dataclass(frozen=True)
class TrackConfig(SceneConfig):
    """What is sent and received in intervals one after another; other fields as of ``SceneConfig``.

    Attributes:
        intervals: of a target's track.
        between: from an interval to the next one, s; by default, targets of Doppler row 1 move one cell.
    """

    intervals: Annotated[int, Bounds(1, 4096)] = 4
    between: Seconds = 0.0512

    @property
    def moved(self) -> Tensor:
        """Cells that targets of each Doppler row move away from interval to interval: float32 (rows,)."""
        return self.radar.cells_moved(self.between)


def sample_tracks(config: TrackConfig, batch: int, jam: Jam | None, generator: torch.Generator | None) -> Scene:
    """``batch`` tracks of ``config.intervals``; ``jam`` is None for noise alone."""
    radar, intervals = config.radar, config.intervals
    phases = 2 * math.pi * torch.rand(batch, intervals + 1, radar.samples, generator=generator)
    codes = torch.polar(torch.ones_like(phases), phases)
    sent = codes[:, 1:]
    heard = (codes[:, :-1] if config.agile else sent).flatten(0, 1)
    snr = torch.full((batch,), power(config.snr))
    echo, row, cell = sample_track(radar, sent, snr, config.between, config.swerling, generator)
    empty = interference(config, heard, jam, generator).unflatten(0, (batch, intervals))
    return Scene(sent, empty, empty + echo, row[:, None].expand(-1, intervals), cell)


class TrackTrainer(DetectionTrainer):
    """A detector with a memory and a jammer that learn in turn.

    Args:
        scene: what is sent and received.
        config: of the training; ``detector`` is a ``TrackingConfig``, and a batch one of tracks.

    Example:
        >>> config = DetectionTrainConfig(TrackingConfig(), batch_size=2, jammer_every=1, updates=1)
        >>> trainer = TrackTrainer(TrackConfig(intervals=2), config)
        >>> sorted(trainer.iterate())
        ['detector_loss', 'jammer_loss']

    Raises:
        TypeError: a configuration of a detector without a memory.
    """

    scene: TrackConfig

    def __init__(self, scene: TrackConfig, config: DetectionTrainConfig) -> None:
        super().__init__(scene, config)

    def _build_detector(self) -> nn.Module:
        config = self.config.detector
        if not isinstance(config, TrackingConfig):
            raise TypeError(f"TrackTrainer: detector is a {type(config).__name__}, expected a TrackingConfig")
        return TrackingNetwork(self.scene.moved, config)

    def _sample(self, jam: Jam | None) -> Scene:
        return sample_tracks(self.scene, self.config.batch_size, jam, self.generator)

    def _scores(self, received: Tensor, pulse: Tensor) -> Tensor:
        scores: Tensor = self.detector(received, pulse)[0]
        return scores


def remembering(network: TrackingNetwork) -> Detector:
    """Scores of a network with a memory, of tracks from their first interval."""
    return lambda received, pulse: network(received, pulse)[0]


def each_alone(detector: Detector) -> Detector:
    """``detector`` in every interval of tracks, without what was before."""

    def scores(received: Tensor, pulse: Tensor) -> Tensor:
        return detector(received.flatten(0, 1), pulse.flatten(0, 1)).unflatten(0, received.shape[:2])

    return scores


def summed(detector: Detector, moved: Tensor) -> Detector:
    """Sums of a detector's scores over the intervals so far, along the ways of each Doppler row's targets.

    Args:
        detector: of single intervals.
        moved: cells from interval to interval, (rows,).
    """
    return lambda received, pulse: sum_along(each_alone(detector)(received, pulse), moved)


def summed_cfar(radar: RadarConfig, config: CFARConfig, moved: Tensor) -> Detector:
    """A CA-CFAR of the powers' sums along the ways of each Doppler row's targets, references included.

    It is noncoherent integration (Richards 2014, chapter 6). The references of all intervals estimate one level,
    which is steadier than the level of each interval, by which ``summed`` divides.

    Args:
        radar: its parameters.
        config: of the CFAR.
        moved: cells from interval to interval, (rows,).
    """

    def powers(received: Tensor, pulse: Tensor) -> Tensor:
        return range_doppler_map(radar, received, pulse)

    return lambda received, pulse: over_references(sum_along(each_alone(powers)(received, pulse), moved), config)


def sum_along(maps: Tensor, moved: Tensor) -> Tensor:
    """Sums of maps (batch, intervals, rows, cells) over the intervals so far, along the ways of each row's targets."""
    away = cells_away(moved, torch.arange(maps.shape[1], device=maps.device))
    return follow(follow(maps, away).cumsum(1), -away)


@torch.no_grad()
def measure_tracks(
    detectors: Mapping[str, Detector],
    config: TrackConfig,
    jam: Jam | None,
    tracks: int,
    seed: int,
    false_alarm: float = 1e-4,
    batch: int = 64,
) -> dict[str, list[float]]:
    """Share of targets found in each interval at equal false alarms; limits come from tracks without a target.

    Args:
        detectors: of tracks, by name.
        config: of the tracks.
        jam: the jammer, None for noise alone.
        tracks: without, and as many with, a target.
        seed: of the tracks.
        false_alarm: share of cells above an interval's limit.
        batch: tracks at once.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = round(false_alarm * tracks * config.radar.pulses * config.radar.cells)
    highest = {name: torch.empty(config.intervals, 0) for name in detectors}
    sizes = [min(batch, tracks - first) for first in range(0, tracks, batch)]
    for size in sizes:
        scene = sample_tracks(config, size, jam, generator)
        for name, detector in detectors.items():
            scores = detector(scene.empty, scene.pulse).transpose(0, 1).flatten(1)
            both = torch.cat([highest[name], scores], 1)
            highest[name] = both.topk(min(kept, both.shape[1]), 1).values
    found = {name: torch.zeros(config.intervals) for name in detectors}
    for size in sizes:
        scene = sample_tracks(config, size, jam, generator)
        for name, detector in detectors.items():
            scores = scene.at_target(detector(scene.full, scene.pulse))
            found[name] += (scores > highest[name][:, -1]).sum(0)
    return {name: (count / tracks).tolist() for name, count in found.items()}
