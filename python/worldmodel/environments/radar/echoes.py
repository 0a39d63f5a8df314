"""Echoes of targets: delays as phase ramps in frequency, Doppler within a pulse and from pulse to pulse, fluctuation.

Range cells go round: in a train of equal pulses the tail of a late echo arrives after the next pulse has begun.

Sources: Swerling, "Probability of detection for fluctuating targets", RAND RM-1217 (1954); Richards, Fundamentals of
Radar Signal Processing, 2nd ed. (2014), section 2.2.5 (fluctuation) and chapter 4 (delay and Doppler).
"""

import math

import torch
from torch import Tensor

from worldmodel.environments.radar.config import RadarConfig, Targets
from worldmodel.environments.radar.waveforms import fitted


def normal(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Complex normal samples of mean power 1, of the precision of ``like`` and on its device."""
    dtype = torch.complex128 if like.dtype in (torch.float64, torch.complex128) else torch.complex64
    return torch.randn(shape, dtype=dtype, generator=generator, device=like.device)


def fluctuation(
    swerling: int, shape: tuple[int, ...], pulses: int, generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """Complex amplitudes of mean power 1 and uniform phase (Swerling 1954).

    Power is constant (0), exponential (1, 2) or gamma with two degrees, the mean of two exponentials (3, 4); amplitude
    and phase are constant over the interval (0, 1, 3) or independent from pulse to pulse (2, 4).

    Returns:
        Complex (..., pulses), with ``shape`` before.
    """
    several = (*shape, pulses if swerling in (2, 4) else 1)
    first = normal(several, generator, like)
    if swerling == 0:
        first = first / first.abs()
    elif swerling in (3, 4):
        second = normal(several, generator, like)
        first = first / first.abs() * ((first.abs() ** 2 + second.abs() ** 2) / 2).sqrt()
    return first.expand(*shape, pulses)


def response(waveform: Tensor, delay: Tensor, doppler: Tensor, cells: int) -> Tensor:
    """One pulse's echo of amplitude 1, after ``delay`` and shifted by ``doppler``.

    Args:
        waveform: complex (..., samples), broadcast with the others.
        delay: samples, of any real value and shape (...).
        doppler: turns per sample, (...).
        cells: samples from pulse to pulse.

    Returns:
        Complex (..., cells).
    """
    time = torch.arange(waveform.shape[-1], device=waveform.device, dtype=delay.dtype)
    frequency = torch.fft.fftfreq(cells, device=waveform.device, dtype=delay.dtype)
    shifted = waveform * torch.exp(2j * math.pi * doppler[..., None] * time)
    spectrum = torch.fft.fft(shifted, cells) * torch.exp(-2j * math.pi * delay[..., None] * frequency)
    return torch.fft.ifft(spectrum)


def echoes(radar: RadarConfig, waveform: Tensor, targets: Targets, generator: torch.Generator | None) -> Tensor:
    """The sum of the echoes of ``targets``.

    Args:
        radar: its parameters.
        waveform: transmitted, complex (samples,) or (batch, samples).
        targets: of the batch; differentiable in distance, velocity and cross-section.
        generator: of the fluctuation.

    Returns:
        Complex (batch, pulses, cells), in units of the noise.

    Raises:
        ConfigurationError: a waveform longer than the pulse, a target beyond the unambiguous range.
    """
    waveform = fitted(waveform, radar)
    targets.check(radar)
    doppler = radar.doppler(targets.velocity)
    each = response(waveform[..., None, :], radar.delay(targets.distance), doppler, radar.cells)
    turns = doppler[..., None] * radar.cells * torch.arange(radar.pulses, device=doppler.device, dtype=doppler.dtype)
    amplitude = radar.signal_to_noise(targets.distance, targets.cross_section).sqrt()
    random = fluctuation(targets.swerling, tuple(targets.distance.shape), radar.pulses, generator, targets.distance)
    factors = amplitude[..., None] * random * torch.exp(2j * math.pi * turns)  # (batch, targets, pulses)
    return torch.einsum("bkm,bkn->bmn", factors, each)
