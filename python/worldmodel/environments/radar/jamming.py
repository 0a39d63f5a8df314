"""Jamming: noise over the band, a spot or a sweep; and copies of what the radar sent.

All signals are complex (batch, pulses, cells), with a mean power per sample of ``ratio``, linear, in units of the
receiver's noise, while they last.

Sources: Adamy, EW 101 (2001), chapters 9 (barrage, spot, sweep) and 10 (false targets); Roome, "Digital radio frequency
memory", Electronics & Communication Engineering Journal 2 (1990); Wang et al., "Mathematic principles of interrupted-
sampling repeater jamming", Science in China F 50 (2007).
"""

import dataclasses
import math
from typing import Annotated

import torch
from torch import Tensor

from worldmodel.environments.radar.config import RadarConfig
from worldmodel.environments.radar.echoes import normal, response
from worldmodel.environments.radar.theory import checked_power
from worldmodel.environments.radar.waveforms import fitted
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Unit

Turns = Annotated[float, Bounds(-0.5, 0.5)]
Delay = Annotated[float, Bounds(-(2**20), 2**20), Unit("samples")]


def barrage(radar: RadarConfig, ratio: Tensor, generator: torch.Generator | None) -> Tensor:
    """White noise over the whole sampled band.

    Args:
        radar: its parameters.
        ratio: jammer-to-noise ratio, linear: (batch,); differentiable.
        generator: of the noise.

    Raises:
        ConfigurationError: a negative or NaN ratio.
    """
    noise = normal((len(ratio), radar.pulses, radar.cells), generator, ratio)
    return _scaled(noise, ratio)


def spot(radar: RadarConfig, ratio: Tensor, centre: float, band: float, generator: torch.Generator | None) -> Tensor:
    """Noise in ``band`` around ``centre``, with all of the power in it.

    Args:
        radar: its parameters.
        ratio: as for ``barrage``.
        centre: turns per sample, −0.5 to 0.5.
        band: share of the sample rate, more than 0.
        generator: of the noise.

    Raises:
        ConfigurationError: values outside these, or a band so narrow that no frequency of the interval lies in it.
    """
    _within("spot: centre", centre, -0.5, 0.5, "turns per sample")
    _within("spot: band", band, 0, 1, "of the sample rate")
    white = normal((len(ratio), radar.pulses, radar.cells), generator, ratio)
    frequency = torch.fft.fftfreq(radar.cells, device=ratio.device)
    inside = ((frequency - centre + 0.5) % 1 - 0.5).abs() <= band / 2
    if not inside.any():
        raise ConfigurationError(
            f"spot: band is {band} of the sample rate, expected at least {1 / radar.cells:g} around a multiple of it"
        )
    share = inside.to(ratio.dtype).mean()
    return _scaled(torch.fft.ifft(torch.fft.fft(white) * inside) / share.sqrt(), ratio)


def sweep(radar: RadarConfig, ratio: Tensor, period: float, band: float, generator: torch.Generator | None) -> Tensor:
    """A tone that sweeps ``band`` once per ``period``, again and again, from a random moment of the sweep.

    Args:
        radar: its parameters.
        ratio: as for ``barrage``.
        period: samples, more than 1.
        band: share of the sample rate, more than 0.
        generator: of the beginning and the phase.
    """
    _within("sweep: period", period, 1, 2**40, "samples")
    _within("sweep: band", band, 0, 1, "of the sample rate")
    start, phase = torch.rand(2, len(ratio), generator=generator, device=ratio.device, dtype=torch.float64)
    time = torch.arange(radar.pulses * radar.cells, device=ratio.device, dtype=torch.float64)
    moment = (time / period + start[:, None]) % 1 - 0.5  # of the sweep
    turns = period * band * moment**2 / 2 + phase[:, None]
    tone = torch.polar(torch.ones_like(turns), 2 * math.pi * turns).to(normal((), generator, ratio).dtype)
    return _scaled(tone.view(-1, radar.pulses, radar.cells), ratio)


@dataclasses.dataclass(frozen=True)
class CopyConfig(Checked):
    """What a digital radio frequency memory makes of a recorded pulse.

    Attributes:
        delay: of the copy's beginning, samples after the pulse's.
        doppler: frequency shift, turns per sample.
        copies: one after the other, each ``spacing`` later.
        spacing: between copies, samples.
        slices: of the pulse that are recorded, interrupted sampling; 1 for the whole pulse.
        duty: share of each slice's period that is recorded, the first part of it.

    Example:
        >>> CopyConfig(slices=4, duty=0.5).sampled(8).int().tolist()
        [1, 0, 1, 0, 1, 0, 1, 0]
    """

    delay: Delay = 0.0
    doppler: Turns = 0.0
    copies: Annotated[int, Bounds(1, 256)] = 1
    spacing: Delay = 1.0
    slices: Annotated[int, Bounds(1, 4096)] = 1
    duty: Annotated[float, Bounds(0, 1, above=True)] = 1.0

    def sampled(self, samples: int) -> Tensor:
        """Which samples of a pulse are recorded: bool (samples,)."""
        if self.slices > samples:
            raise ConfigurationError(f"CopyConfig: slices is {self.slices}, expected at most the pulse's {samples}")
        return torch.arange(samples) * self.slices / samples % 1 < self.duty


def repeat(
    radar: RadarConfig, recorded: Tensor, ratio: Tensor, config: CopyConfig, generator: torch.Generator | None
) -> Tensor:
    """Copies of ``recorded`` with one random phase per interval, coherent from pulse to pulse.

    Args:
        radar: its parameters.
        recorded: a pulse, complex (samples,) or (batch, samples).
        ratio: jammer-to-noise ratio of a recorded sample of one copy, linear, (batch,).
        config: of the copies.
        generator: of the phases.

    Raises:
        ConfigurationError: a negative ratio, a recording longer than the pulse, more slices than samples.
    """
    recorded = fitted(recorded, radar)
    kept = recorded * config.sampled(recorded.shape[-1]).to(recorded.device)
    count = torch.arange(config.copies, device=ratio.device, dtype=ratio.dtype)
    delay = (config.delay + config.spacing * count).expand(len(ratio), -1)
    doppler = torch.full_like(delay, config.doppler)
    copies = response(kept[..., None, :], delay, doppler, radar.cells).sum(-2)  # (batch, cells)
    pulse = torch.arange(radar.pulses, device=ratio.device, dtype=ratio.dtype)
    turns = config.doppler * radar.cells * pulse + torch.rand(len(ratio), 1, generator=generator).to(ratio)
    return _scaled(torch.exp(2j * math.pi * turns)[..., None] * copies[:, None], ratio)


def smear(
    radar: RadarConfig,
    recorded: Tensor,
    ratio: Tensor,
    first: Tensor,
    width: int,
    generator: torch.Generator | None,
) -> Tensor:
    """``recorded`` convolved with noise: ``width`` copies, one sample apart, of independent complex normal amplitudes.

    What the radar's matched filter compresses is concentrated in ``width`` cells; a copy of another pulse is not.

    Args:
        radar: its parameters.
        recorded: a pulse, complex (samples,) or (batch, samples).
        ratio: jammer-to-noise ratio, linear, of the sum of the copies where all of them overlap, (batch,).
        first: delay of the first copy, samples, (batch,).
        width: copies.
        generator: of the amplitudes, which are independent from pulse to pulse.
    """
    recorded = fitted(recorded, radar)
    if not 1 <= width <= radar.cells:
        raise ConfigurationError(f"smear: width is {width} samples, expected 1 to {radar.cells} samples")
    echo = response(recorded, first.to(ratio), torch.zeros_like(ratio), radar.cells)
    noise = normal((len(ratio), radar.pulses, width), generator, ratio) / math.sqrt(width)
    spectrum = torch.fft.fft(noise, radar.cells) * torch.fft.fft(echo)[:, None]
    return _scaled(torch.fft.ifft(spectrum), ratio)


def _scaled(signal: Tensor, ratio: Tensor) -> Tensor:
    return signal * checked_power("jammer-to-noise ratio", ratio, "linear").sqrt()[:, None, None]


def _within(name: str, value: float, low: float, high: float, unit: str) -> None:
    if not (low <= value <= high) or (value == low and low >= 0):
        above = "more than" if low >= 0 else "at least"
        raise ConfigurationError(f"{name} is {value} {unit}, expected {above} {low} and at most {high} {unit}")
