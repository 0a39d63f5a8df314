"""A detection network against jammer networks that learn in turn, and how both compare with a CA-CFAR.

    min over D, max over G of E[softplus(−D at the target)] + weight · E[Σ over cells softplus(D without a target)]

For a given jammer the best D is a monotone function of the likelihood ratio of each cell. Jammers are kept as they were
in a pool, from which D meets half of its opponents.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.environments.radar.config import CFARConfig, Decibels, RadarConfig
from worldmodel.environments.radar.echoes import normal
from worldmodel.environments.radar.interval import sample_echo
from worldmodel.environments.radar.jamming import CopyConfig, barrage, repeat, spot, sweep
from worldmodel.environments.radar.receiver import adaptive_filter, cfar_threshold, doppler_filter, range_doppler_map
from worldmodel.environments.radar.theory import power
from worldmodel.learning.detection_networks import DetectionNetwork, JammerNetwork, NetworkConfig
from worldmodel.learning.timed import Timed, TimedConfig, falling, set_gradients
from worldmodel.runs.fields import Bounds, Checked, Limit, Positive, Share, Size, Weight

Jam = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
"""Pulse heard (batch, samples), jammer-to-noise ratio (batch,), generator → jamming (batch, pulses, cells)."""
Detector = Callable[[Tensor, Tensor], Tensor]
"""Received (batch, pulses, cells), pulse (batch, samples) → scores (batch, rows, cells)."""


@dataclasses.dataclass(frozen=True)
class SceneConfig(Checked):
    """What is sent and received: codes of random phases, by a jammer that does not know where the target is.

    Attributes:
        radar: its pulses.
        snr: mean signal-to-noise ratio of the target after both filters, without jamming, dB.
        jsr: power of a sample of jamming over one of the mean echo, dB.
        swerling: of the target.
        intercept: signal-to-noise ratio of a sample of what the jammer hears, dB.
        agile: whether the radar sends another pulse in each interval, so that the jammer has heard that of the interval
            before; otherwise it hears the present one, of which its copies are like echoes.
    """

    radar: RadarConfig = RadarConfig(pulse=1.6e-6, repetition=6.4e-6, pulses=8)  # noqa: RUF009
    snr: Decibels = 13.0
    jsr: Decibels = 10.0
    swerling: Annotated[int, Bounds(0, 4)] = 1
    intercept: Decibels = 20.0
    agile: bool = True

    @property
    def jnr(self) -> float:
        """Of a sample of jamming, linear."""
        return power(self.snr + self.jsr) / (self.radar.samples * self.radar.pulses)

    def sample_pulses(
        self, batch: int, pulses: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Pulses sent and pulses that the jammer heard, complex (batch, samples).

        They are the same where the radar is not agile; otherwise two of ``pulses``, complex (at least 2, samples), or
        without these, codes of random phases.
        """
        if pulses is None:
            phases = 2 * math.pi * torch.rand(2, batch, self.radar.samples, generator=generator)
            sent, heard = torch.polar(torch.ones_like(phases), phases)
        else:
            first = torch.randint(len(pulses), (batch,), generator=generator)
            further = torch.randint(1, len(pulses), (batch,), generator=generator)
            sent, heard = pulses[first], pulses[(first + further) % len(pulses)]
        return sent, heard if self.agile else sent


@dataclasses.dataclass(frozen=True)
class Scene:
    """Intervals received with and without a target, in the same noise and jamming; of ``batch``, or one after another.

    Attributes:
        pulse: sent, complex (batch, samples) or (batch, intervals, samples).
        empty: received without a target, complex (batch, pulses, cells) or (batch, intervals, pulses, cells).
        full: with one.
        row: of the target, int64 (batch,) or (batch, intervals).
        cell: of the target, as ``row``.
    """

    pulse: Tensor
    empty: Tensor
    full: Tensor
    row: Tensor
    cell: Tensor

    def at_target(self, scores: Tensor) -> Tensor:
        """Those of ``scores``, (batch, rows, cells) or (batch, intervals, rows, cells), where the target is."""
        flat = scores.flatten(0, -3)
        there = torch.arange(len(flat), device=flat.device)
        return flat[there, self.row.flatten(), self.cell.flatten()].view(self.row.shape)


def sample_scene(
    config: SceneConfig, batch: int, jam: Jam | None, generator: torch.Generator | None, pulses: Tensor | None = None
) -> Scene:
    """``batch`` intervals; ``jam`` is None for noise alone, ``pulses`` as for ``SceneConfig.sample_pulses``."""
    radar = config.radar
    pulse, heard = config.sample_pulses(batch, pulses, generator)
    echo, row, cell = sample_echo(radar, pulse, torch.full((batch,), power(config.snr)), config.swerling, generator)
    empty = interference(config, heard, jam, generator)
    return Scene(pulse, empty, empty + echo, row, cell)


def interference(config: SceneConfig, heard: Tensor, jam: Jam | None, generator: torch.Generator | None) -> Tensor:
    """Noise, and jamming by a jammer that heard ``heard`` (batch, samples): complex (batch, pulses, cells)."""
    batch = len(heard)
    empty = barrage(config.radar, torch.ones(batch), generator)
    if jam is None:
        return empty
    noise = normal(tuple(heard.shape), generator, heard) * math.sqrt(power(-config.intercept))
    return empty + jam(heard + noise, torch.full((batch,), config.jnr), generator)


def known_jammers(radar: RadarConfig) -> dict[str, Jam]:
    """Jammers that no network made, by name: noise of all, a quarter and a sweeping line of the band; and copies."""

    def copies(config: CopyConfig) -> Jam:
        return lambda pulse, ratio, generator: repeat(radar, pulse, ratio, config, generator)

    width = radar.samples // 4
    return {
        "barrage": lambda pulse, ratio, generator: barrage(radar, ratio, generator),
        "spot": lambda pulse, ratio, generator: spot(radar, ratio, 0.1, 0.25, generator),
        "sweep": lambda pulse, ratio, generator: sweep(radar, ratio, 2.5 * radar.cells, 1.0, generator),
        "copies": copies(CopyConfig(copies=4, spacing=width + 1)),
        "interrupted copies": copies(CopyConfig(copies=2, spacing=2 * width + 1, slices=4, duty=0.5)),
    }


def learned(jammer: JammerNetwork, radar: RadarConfig) -> Jam:
    """Jamming of a network."""
    return lambda pulse, ratio, generator: jammer(pulse, ratio, radar.pulses, radar.cells, generator)


def cfar_scores(radar: RadarConfig, config: CFARConfig, adaptive: bool = False) -> Detector:
    """Power over the mean of the references, in nepers: what a CA-CFAR compares with its factor.

    Args:
        radar: its parameters.
        config: of the CFAR.
        adaptive: whether behind ``adaptive_filter`` instead of the matched filter.
    """

    def scores(received: Tensor, pulse: Tensor) -> Tensor:
        if adaptive:
            powers = doppler_filter(adaptive_filter(received, pulse[:, None])).abs().square()
        else:
            powers = range_doppler_map(radar, received, pulse)
        return over_references(powers, config)

    return scores


def over_references(powers: Tensor, config: CFARConfig) -> Tensor:
    """``powers`` (..., cells) over the mean of their reference cells, in nepers."""
    return powers.log() - (cfar_threshold(powers, config) / config.factor).log()


@dataclasses.dataclass(frozen=True)
class DetectionTrainConfig(TimedConfig):
    """How detector and jammer learn.

    Attributes:
        detector: network.
        jammer: network.
        batch_size: intervals with and without a target per update.
        empty_weight: of the loss of cells without a target.
        lr: of Adam, both, until it falls to 2% in the last half.
        jammer_every: updates of the detector before one of the jammer.
        turn: updates of the detector after which the jammer as it is then joins the pool.
        past: share of the detector's updates against any of the pool; the others are against the newest.

    The others are of ``TimedConfig``; updates are the detector's.
    """

    detector: NetworkConfig = NetworkConfig()  # noqa: RUF009
    jammer: NetworkConfig = NetworkConfig()  # noqa: RUF009
    batch_size: Size = 32
    empty_weight: Weight = 0.1
    lr: Annotated[float, Bounds(0, 1, above=True)] = 5e-3
    jammer_every: Limit = 3
    turn: Limit = 100
    past: Share = 0.5
    minutes: Positive = dataclasses.field(default=2.0, kw_only=True)


def detection_loss(detector: Detector, scene: Scene, empty_weight: float) -> Tensor:
    """What the detector lowers and the jammer raises: of missed targets, and of false alarms per interval."""
    logits = detector(torch.cat([scene.full, scene.empty]), torch.cat([scene.pulse, scene.pulse]))
    full, empty = logits.chunk(2)
    return F.softplus(-scene.at_target(full)).mean() + empty_weight * F.softplus(empty).sum((-2, -1)).mean()


class DetectionTrainer(Timed):
    """A detector and a jammer that learn in turn.

    The pool begins with noise alone, None. The radar sends fresh random codes, or those of ``phases``, which learn with
    the detector: waveforms against detector and jammer.

    Args:
        scene: what is sent and received.
        config: of the training.
        phases: of codes, radians, (codes, samples), at least 2 codes.

    Attributes:
        detector: that learns.
        jammer: that learns.
        pool: past jammers, frozen, and None for noise alone.
        seconds: of training, by ``config.clock``.

    Example:
        >>> config = DetectionTrainConfig(batch_size=2, jammer_every=1, updates=2, turn=1)
        >>> trainer = DetectionTrainer(SceneConfig(), config)
        >>> while not trainer.finished:
        ...     metrics = trainer.iterate()
        >>> sorted(metrics), len(trainer.pool)
        (['detector_loss', 'jammer_loss'], 3)
    """

    def __init__(self, scene: SceneConfig, config: DetectionTrainConfig, phases: nn.Parameter | None = None) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.scene, self.config = scene, config
        self.phases = phases
        self.generator = torch.Generator().manual_seed(config.seed)
        self.detector, self.jammer = self._build_detector(), JammerNetwork(config.jammer)
        self.pool: list[JammerNetwork | None] = [None]
        sides = [list(self.detector.parameters()), list(self.jammer.parameters()), [] if phases is None else [phases]]
        self._optimizers = [torch.optim.Adam(side, config.lr) for side in sides if side]

    def iterate(self) -> dict[str, float]:
        """``jammer_every`` updates of the detector, and one of the jammer; returns metrics."""
        config = self.config
        with self.timing():
            for optimizer in self._optimizers:
                optimizer.param_groups[0]["lr"] = config.lr * falling(self.progress)
            for _ in range(config.jammer_every):
                detector_loss = self._loss(self._opponent())
                self._step(detector_loss, *self._optimizers[::2])
                self.updates += 1
                if self.updates % config.turn == 0:
                    self.pool.append(copy.deepcopy(self.jammer).requires_grad_(False))
            jammer_loss = self.update_jammer()
        return {"detector_loss": float(detector_loss.detach()), "jammer_loss": jammer_loss}

    def update_jammer(self) -> float:
        """One update of the jammer alone; returns the loss, which it raises."""
        loss = self._loss(self.jammer)
        self._step(-loss, self._optimizers[1])
        return float(loss.detach())

    @property
    def pulses(self) -> Tensor | None:
        """Complex (pulses, samples), or None."""
        return None if self.phases is None else torch.polar(torch.ones_like(self.phases), self.phases)

    def _build_detector(self) -> nn.Module:
        return DetectionNetwork(self.config.detector)

    def _sample(self, jam: Jam | None) -> Scene:
        return sample_scene(self.scene, self.config.batch_size, jam, self.generator, self.pulses)

    def _scores(self, received: Tensor, pulse: Tensor) -> Tensor:
        scores: Tensor = self.detector(received, pulse)
        return scores

    def _loss(self, jammer: JammerNetwork | None) -> Tensor:
        scene = self._sample(None if jammer is None else learned(jammer, self.scene.radar))
        return detection_loss(self._scores, scene, self.config.empty_weight)

    def _opponent(self) -> JammerNetwork | None:
        past, which = torch.rand(2, generator=self.generator).tolist()
        return self.pool[int(which * len(self.pool))] if past < self.config.past else self.jammer

    def _step(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Lowers ``loss`` by the parameters of ``optimizers`` alone."""
        groups = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
        parameters = [parameter for group in groups for parameter in group]
        set_gradients(parameters, loss)
        for optimizer, group in zip(optimizers, groups, strict=True):
            torch.nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()


def best_response(
    detector: DetectionNetwork, scene: SceneConfig, config: DetectionTrainConfig, updates: int
) -> JammerNetwork:
    """A jammer trained from nothing, by ``config.seed``, against ``detector`` alone, which stays as it is."""
    trainer = DetectionTrainer(scene, config)
    trainer.detector = detector
    for _ in range(updates):
        trainer.update_jammer()
    return trainer.jammer


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a detector under a jammer.

    Attributes:
        detection: share of targets found at ``limit``.
        limit: score above which ``false_alarm`` of the cells without a target are.
        alarms: share of these cells above the limit that was given, or ``false_alarm``.
    """

    detection: float
    limit: float
    alarms: float


@torch.no_grad()
def measure(
    detectors: Mapping[str, Detector],
    config: SceneConfig,
    jam: Jam | None,
    maps: int,
    seed: int,
    false_alarm: float = 1e-4,
    limits: Mapping[str, float] | None = None,
    batch: int = 256,
    pulses: Tensor | None = None,
) -> dict[str, Measured]:
    """Detection at equal false alarms: the limit comes from some intervals without a target, targets are in others.

    Args:
        detectors: by name.
        config: of the intervals.
        jam: the jammer, None for noise alone.
        maps: intervals without, and as many with, a target.
        seed: of the intervals.
        false_alarm: share of cells.
        limits: by name, for ``Measured.alarms``.
        batch: intervals at once.
        pulses: as for ``SceneConfig.sample_pulses``.
    """
    generator = torch.Generator().manual_seed(seed)
    cells = maps * config.radar.pulses * config.radar.cells
    kept = round(false_alarm * cells)
    highest = {name: torch.empty(0) for name in detectors}
    above = dict.fromkeys(detectors, 0)
    for first in range(0, maps, batch):
        scene = sample_scene(config, min(batch, maps - first), jam, generator, pulses)
        for name, detector in detectors.items():
            scores = detector(scene.empty, scene.pulse).flatten()
            highest[name] = torch.cat([highest[name], scores]).topk(min(kept, first + len(scores))).values
            if limits is not None:
                above[name] += int((scores > limits[name]).sum())
    found = dict.fromkeys(detectors, 0)
    for first in range(0, maps, batch):
        scene = sample_scene(config, min(batch, maps - first), jam, generator, pulses)
        for name, detector in detectors.items():
            scores = scene.at_target(detector(scene.full, scene.pulse))
            found[name] += int((scores > highest[name][-1]).sum())
    return {
        name: Measured(
            found[name] / maps, float(highest[name][-1]), above[name] / cells if limits is not None else false_alarm
        )
        for name in detectors
    }
