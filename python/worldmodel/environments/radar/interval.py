"""One coherent processing interval of many radars at once: the sampled chain from waveform to range-Doppler map."""

import dataclasses

import torch
from torch import Tensor

from worldmodel.environments.radar.config import CFARConfig, RadarConfig, Targets
from worldmodel.environments.radar.echoes import echoes
from worldmodel.environments.radar.jamming import barrage, smear
from worldmodel.environments.radar.receiver import detect, range_doppler_map, soft_detect


@dataclasses.dataclass(frozen=True)
class Jamming:
    """What a jammer does in an interval.

    Attributes:
        noise: jammer-to-noise ratio of barrage jamming, linear, (batch,).
        copied: complex (batch, samples) or (samples,), or None for no copies.
        ratio: jammer-to-noise ratio of the copies, linear, (batch,).
        width: cells around the target that copies are smeared over.
    """

    noise: Tensor
    copied: Tensor | None = None
    ratio: Tensor | None = None
    width: int = 1


@dataclasses.dataclass(frozen=True)
class Interval:
    """Range-Doppler maps with a target in a known place.

    Attributes:
        powers: (batch, pulses, cells); the noise's mean is 1.
        row: Doppler row of the target, int64 (batch,).
        cell: range cell of the target, int64 (batch,).
    """

    powers: Tensor
    row: Tensor
    cell: Tensor

    def at_target(self, values: Tensor) -> Tensor:
        """Entries of ``values`` (batch, pulses, cells) where the targets are: (batch,)."""
        return values[torch.arange(len(values), device=values.device), self.row, self.cell]

    def _rows(self) -> Tensor:
        return self.powers[torch.arange(len(self.powers), device=self.powers.device), self.row]

    def detected(self, config: CFARConfig) -> Tensor:
        """Whether the CFAR finds the target: bool (batch,)."""
        return detect(self._rows(), config).gather(1, self.cell[:, None])[:, 0]

    def score(self, config: CFARConfig, temperature: float = 0.1) -> Tensor:
        """``detected`` with a gradient, 0 to 1, (batch,): ``receiver.soft_detect``."""
        return soft_detect(self._rows(), config, temperature).gather(1, self.cell[:, None])[:, 0]


def sample_echo(
    radar: RadarConfig, waveform: Tensor, snr: Tensor, swerling: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The echo of a target in a random cell and Doppler row: complex (batch, pulses, cells), and the row and the cell.

    Args:
        radar: its parameters.
        waveform: transmitted, complex (samples,) or (batch, samples).
        snr: mean signal-to-noise ratio of the whole interval, after both filters, linear, (batch,).
        swerling: of the target, 0 to 4.
        generator: of place and fluctuation.
    """
    cell, row = _sample_places(radar, len(snr), generator)
    cell, row = cell.to(snr.device), row.to(snr.device)
    return _echo(radar, waveform, snr, swerling, generator, row, cell.to(snr.dtype)), row, cell


def sample_track(
    radar: RadarConfig,
    waveforms: Tensor,
    snr: Tensor,
    between: float,
    swerling: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Echoes of a target that moves from interval to interval, with the velocity at the middle of its Doppler row.

    The fluctuation of each interval is its own, and its mean power the same at every distance.

    Args:
        radar: its parameters.
        waveforms: transmitted, complex (batch, intervals, samples).
        snr: as for ``sample_echo``, (batch,).
        between: s from an interval to the next one.
        swerling: of the target, 0 to 4.
        generator: of first place and fluctuation.

    Returns:
        Complex (batch, intervals, pulses, cells); the row, int64 (batch,); and the nearest cell in each interval, int64
        (batch, intervals). Range cells go round.
    """
    batch, intervals = waveforms.shape[:2]
    first, row = _sample_places(radar, batch, generator)
    moved = radar.cells_moved(between)[row][:, None] * torch.arange(intervals)
    place = (first[:, None] + moved).remainder(radar.cells).clamp(1e-3, radar.cells - 1e-3).to(snr)
    cell = (first[:, None] + moved.round().long()) % radar.cells
    each = (snr[:, None].expand(-1, intervals).flatten(), swerling, generator, row.repeat_interleave(intervals))
    echo = _echo(radar, waveforms.flatten(0, 1), *each, place.flatten())
    return echo.unflatten(0, (batch, intervals)), row, cell


def _sample_places(radar: RadarConfig, batch: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Random range cells and Doppler rows, int64 (batch,)."""
    cell = torch.randint(1, radar.cells, (batch,), generator=generator)
    return cell, torch.randint(0, radar.pulses, (batch,), generator=generator)


def _echo(
    radar: RadarConfig,
    waveform: Tensor,
    snr: Tensor,
    swerling: int,
    generator: torch.Generator | None,
    row: Tensor,
    cell: Tensor,
) -> Tensor:
    """Echoes from places in cells, of any real value, with the velocity at the middle of a row."""
    velocity = radar.velocity_of_row(row.to(snr.device)).to(snr.dtype)
    distance = cell * radar.cell_length
    target = Targets(distance[:, None], velocity[:, None], radar.cross_section(distance, snr)[:, None], swerling)
    return echoes(radar, waveform, target, generator)


def sample_interval(
    radar: RadarConfig,
    waveform: Tensor,
    snr: Tensor,
    jamming: Jamming | None = None,
    swerling: int = 1,
    generator: torch.Generator | None = None,
) -> Interval:
    """A target in a random cell and Doppler row, in noise and jamming; differentiable in waveform and powers.

    Args:
        radar: its parameters.
        waveform: transmitted, complex (samples,) or (batch, samples).
        snr: mean signal-to-noise ratio of the whole interval, after both filters, linear, (batch,).
        jamming: of the interval; None for noise alone.
        swerling: of the target, 0 to 4.
        generator: of place, fluctuation and noise.

    Raises:
        ConfigurationError: negative powers, a waveform longer than the pulse.

    Example:
        >>> from worldmodel.environments.radar.waveforms import LFM
        >>> radar = RadarConfig()
        >>> interval = sample_interval(radar, LFM(radar.samples)(), torch.full((1,), 1000.0), swerling=0)
        >>> interval.powers.shape, interval.detected(CFARConfig()).tolist()
        (torch.Size([1, 64, 256]), [True])
    """
    echo, row, cell = sample_echo(radar, waveform, snr, swerling, generator)
    noise = torch.ones_like(snr) if jamming is None else 1 + jamming.noise
    received = echo + barrage(radar, noise, generator)
    if jamming is not None and jamming.copied is not None:
        ratio = torch.ones_like(snr) if jamming.ratio is None else jamming.ratio
        first = cell - jamming.width // 2
        received = received + smear(radar, jamming.copied, ratio, first, jamming.width, generator)
    return Interval(range_doppler_map(radar, received, waveform), row, cell)
