"""The receiver: matched filter, Doppler filter, and CA-CFAR as a decision and as a differentiable score.

Source: Richards, Fundamentals of Radar Signal Processing, 2nd ed. (2014), sections 4.2 (matched filter), 5.3 (Doppler
filter bank) and 6.5 (CA-CFAR).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.environments.radar.config import CFARConfig, RadarConfig
from worldmodel.environments.radar.waveforms import fitted


def matched_filter(received: Tensor, waveform: Tensor) -> Tensor:
    """Correlates ``received`` (..., cells) with ``waveform`` (..., samples), of energy scaled to 1.

    White noise keeps its power; the echo of amplitude 1 and delay d has its peak, the waveform's norm, in cell d. Cells
    go round.
    """
    norm = waveform.abs().square().sum(-1, keepdim=True).sqrt()
    spectrum = torch.fft.fft(waveform / norm, received.shape[-1])
    return torch.fft.ifft(torch.fft.fft(received) * spectrum.conj())


def adaptive_filter(received: Tensor, waveform: Tensor, smoothing: int = 5) -> Tensor:
    """Matched filter for noise whose spectrum is not flat: each frequency's share is divided by the power there.

    The power is estimated from all pulses of the interval and ``smoothing`` neighbouring frequencies. Noise of any
    spectrum keeps power 1 in each cell. The echo of a pulse, below the noise before it is compressed, changes little.

    Args:
        received: complex (..., pulses, cells).
        waveform: complex (..., 1, samples), or (samples,).
        smoothing: frequencies, odd.

    Returns:
        Complex (..., pulses, cells).
    """
    cells = received.shape[-1]
    spectrum, pulse = torch.fft.fft(received, norm="ortho"), torch.fft.fft(waveform, cells, norm="ortho")
    power = spectrum.abs().square().mean(-2, keepdim=True)
    power = sum(power.roll(shift, -1) for shift in range(-(smoothing // 2), smoothing // 2 + 1)) / smoothing
    level = (pulse.abs().square() / power).mean(-1, keepdim=True).sqrt()
    return torch.fft.ifft(spectrum * pulse.conj() / (power * level), norm="ortho")


def doppler_filter(pulses: Tensor) -> Tensor:
    """Discrete Fourier transform over pulses, (..., pulses, cells), scaled so that white noise keeps its power.

    Row k is the Doppler shift of k / (pulses × repetition); M equal pulses gain a power of M: 18.06 dB for 64.
    """
    return torch.fft.fft(pulses, dim=-2, norm="ortho")


def range_doppler_map(radar: RadarConfig, received: Tensor, waveform: Tensor) -> Tensor:
    """Power in each Doppler row and range cell; the noise's mean is 1.

    Args:
        radar: its parameters.
        received: complex (batch, pulses, cells).
        waveform: transmitted, complex (samples,) or (batch, samples).

    Returns:
        Real (batch, pulses, cells).

    Raises:
        ConfigurationError: another shape, a waveform longer than the pulse.
    """
    filtered = matched_filter(radar_shaped(radar, received, "received"), fitted(waveform, radar)[..., None, :])
    return doppler_filter(filtered).abs().square()


def follow(maps: Tensor, cells: Tensor) -> Tensor:
    """Maps in a frame that moves with the targets of each Doppler row: what was ``cells`` further on is at 0.

    Args:
        maps: (..., rows, range cells), which go round.
        cells: whole cells by which each row has moved away, int64, broadcast with (..., rows); negative goes back.
    """
    count = maps.shape[-1]
    index = (torch.arange(count, device=maps.device) + cells[..., None]) % count
    return maps.gather(-1, index.expand(maps.shape))


def radar_shaped(radar: RadarConfig, signal: Tensor, name: str) -> Tensor:
    """``signal``, or ValueError if its shape is not (batch, pulses, cells)."""
    if signal.ndim != 3 or tuple(signal.shape[1:]) != (radar.pulses, radar.cells):
        raise ValueError(
            f"{name} has shape {tuple(signal.shape)}, expected (batch, pulses={radar.pulses}, cells={radar.cells})"
        )
    return signal


def cfar_threshold(powers: Tensor, config: CFARConfig) -> Tensor:
    """``config.factor`` times the mean of each cell's references along the last dimension, where cells go round.

    Raises:
        ConfigurationError: fewer cells than the references and guards take.
    """
    cells, half, reach = powers.shape[-1], config.references // 2, config.reach
    config.check(cells)
    around = torch.cat([powers[..., cells - reach :], powers, powers[..., :reach]], -1)
    means = F.avg_pool1d(around.reshape(-1, 1, cells + 2 * reach), half, 1)[:, 0]  # of half the references each
    before, after = means[:, :cells], means[:, -cells:]
    return ((before + after) * (config.factor / 2)).view_as(powers)


def detect(powers: Tensor, config: CFARConfig) -> Tensor:
    """Whether each cell is above its threshold: bool of the shape of ``powers``. For scores; it has no gradient."""
    return powers.detach() > cfar_threshold(powers.detach(), config)


def soft_detect(powers: Tensor, config: CFARConfig, temperature: float = 0.1) -> Tensor:
    """``detect`` with a gradient: sigmoid((ln power − ln threshold) / temperature).

    The gradient's mean is that of the detection probability up to an error that falls with the square of the
    temperature; its variance rises with the inverse.

    Args:
        powers: (..., cells).
        config: of the CFAR.
        temperature: width of the step in nepers of power; at 0 it is ``detect``.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"soft_detect: temperature is {temperature}, expected a positive number of nepers of power")
    return torch.sigmoid((powers.log() - cfar_threshold(powers, config).log()) / temperature)
