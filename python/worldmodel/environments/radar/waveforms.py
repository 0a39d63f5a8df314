"""Pulses in complex baseband with a constant envelope and parameters that learn.

A waveform is a module without inputs that returns complex samples of magnitude 1: (samples,). Frequencies are in turns
per sample: a bandwidth of 1 is the sample rate.

Sources: Levanon & Mozeson, Radar Signals (2004), chapters 4 (LFM), 5 (frequency modulation) and 6 (phase codes);
Barker, "Group synchronizing of binary digital systems" (1953).
"""

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from worldmodel.environments.radar.config import RadarConfig
from worldmodel.runs.fields import Bounds, ConfigurationError, checked_value

BARKER_13 = (1, 1, 1, 1, 1, -1, -1, 1, 1, -1, 1, -1, 1)
"""The longest Barker code: sidelobes of 1/13 of its peak."""

Samples = Annotated[int, Bounds(2, 2**20)]
Band = Annotated[float, Bounds(0, 1, above=True)]


class LFM(nn.Module):
    """Linear frequency modulation: s(t) = exp(iπ B t² / N), with t from the middle of the pulse.

    Args:
        samples: N.
        band: B, swept frequencies over the sample rate, at most 1; a parameter.
        falling: whether the frequency falls.

    Example:
        >>> LFM(64)().shape
        torch.Size([64])
    """

    def __init__(self, samples: int, band: float = 1.0, falling: bool = False) -> None:
        super().__init__()
        self.samples = checked_value(Samples, samples, "LFM: samples")
        sweep = checked_value(Band, band, "LFM: band")
        self.sweep = nn.Parameter(torch.tensor(-sweep if falling else sweep))

    def forward(self) -> Tensor:
        time = torch.arange(self.samples, dtype=self.sweep.dtype, device=self.sweep.device) - (self.samples - 1) / 2
        return _unit(math.pi * self.sweep * time**2 / self.samples)


class PhaseCode(nn.Module):
    """Chips of one phase each, all phases parameters.

    Args:
        phases: of the chips, radians: (chips,).
        samples_per_chip: at least 1.

    Example:
        >>> PhaseCode.binary(BARKER_13)().real.round().int().tolist() == list(BARKER_13)
        True
    """

    def __init__(self, phases: Tensor, samples_per_chip: int = 1) -> None:
        super().__init__()
        if phases.ndim != 1 or len(phases) < 2 or not phases.isfinite().all():
            raise ConfigurationError(
                f"PhaseCode: phases have shape {tuple(phases.shape)}, expected (chips,) of at least 2 finite values in "
                "radians"
            )
        self.samples_per_chip = checked_value(
            Annotated[int, Bounds(1, 2**20)], samples_per_chip, "PhaseCode: samples_per_chip"
        )
        self.phases = nn.Parameter(phases.detach().clone())

    @classmethod
    def binary(cls, code: tuple[int, ...], samples_per_chip: int = 1) -> "PhaseCode":
        """Of signs, 1 and -1."""
        return cls(torch.where(torch.tensor(code) > 0, 0.0, math.pi), samples_per_chip)

    @classmethod
    def sampled(cls, chips: int, generator: torch.Generator, samples_per_chip: int = 1) -> "PhaseCode":
        """Of ``chips`` uniform phases from ``generator``."""
        return cls(2 * math.pi * torch.rand(chips, generator=generator), samples_per_chip)

    def forward(self) -> Tensor:
        return _unit(self.phases.repeat_interleave(self.samples_per_chip))


class FreeFM(nn.Module):
    """Free frequency modulation within a band: the frequency of each sample is band / 2 · tanh(u), u a parameter.

    The instantaneous frequency stays in the band; the spectrum has skirts, which ``quality.energy_in_band`` measures.

    Args:
        samples: of the pulse.
        band: limits of the frequency over the sample rate, at most 1.
        swept: share of the band that the pulse sweeps linearly before it learns.

    Example:
        >>> fm = FreeFM(256, band=0.25)
        >>> bool(fm.frequency().abs().max() <= 0.125), fm().shape
        (True, torch.Size([256]))
    """

    def __init__(self, samples: int, band: float = 1.0, swept: float = 0.95) -> None:
        super().__init__()
        samples = checked_value(Samples, samples, "FreeFM: samples")
        self.band = checked_value(Band, band, "FreeFM: band")
        share = checked_value(Annotated[float, Bounds(0, 1, below=True)], swept, "FreeFM: swept")
        self.u = nn.Parameter(torch.atanh(torch.linspace(-share, share, samples)))

    def frequency(self) -> Tensor:
        """Turns per sample: (samples,)."""
        return self.band / 2 * torch.tanh(self.u)

    def forward(self) -> Tensor:
        return _unit(2 * math.pi * self.frequency().cumsum(0))


def fitted(waveform: Tensor, radar: RadarConfig) -> Tensor:
    """``waveform``, complex (samples,) or (batch, samples), or ConfigurationError if ``radar`` cannot send it."""
    if not waveform.is_complex() or waveform.ndim not in (1, 2):
        raise ConfigurationError(
            f"waveform has dtype {waveform.dtype} and shape {tuple(waveform.shape)}, expected complex (samples,) or "
            "(batch, samples)"
        )
    if not waveform.detach().abs().isfinite().all():
        raise ConfigurationError("waveform has samples that are NaN or infinite, expected finite ones")
    if waveform.shape[-1] > radar.samples:
        raise ConfigurationError(
            f"waveform lasts {waveform.shape[-1] / radar.sample_rate:g} s ({waveform.shape[-1]} samples), expected at "
            f"most the pulse of {radar.pulse:g} s ({radar.samples} samples)"
        )
    return waveform


def _unit(phase: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(phase), phase)
