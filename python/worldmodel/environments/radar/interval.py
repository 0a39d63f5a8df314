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
    batch = len(snr)
    cell = torch.randint(1, radar.cells, (batch,), generator=generator).to(snr.device)
    row = torch.randint(0, radar.pulses, (batch,), generator=generator).to(snr.device)
    velocity = radar.doppler_of_row(row).to(snr.dtype) / radar.doppler(
        torch.ones((), dtype=snr.dtype, device=snr.device)
    )
    distance = cell.to(snr.dtype) * radar.cell_length
    target = Targets(distance[:, None], velocity[:, None], radar.cross_section(distance, snr)[:, None], swerling)
    return echoes(radar, waveform, target, generator), row, cell


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
