"""What a pulse is worth: sidelobes, main lobe, energy in its band, ambiguity.

Source: Levanon & Mozeson, Radar Signals (2004), chapters 2 (matched filter) and 3 (ambiguity function).
"""

import math

import torch
from torch import Tensor

from worldmodel.runs.fields import ConfigurationError

_SPECTRUM = 16  # frequencies per sample of the pulse


def correlation(waveform: Tensor, doppler: float = 0.0, fine: int = 1) -> Tensor:
    """Matched filter's output for an echo shifted by ``doppler``, a cut of the ambiguity function; differentiable.

    Args:
        waveform: complex (samples,).
        doppler: turns per sample.
        fine: lags per sample; those between samples are interpolated in frequency.

    Returns:
        Complex (2 × samples × fine − 1,), lag 0 in the middle, where it is 1 without Doppler.
    """
    samples = waveform.shape[-1]
    time = torch.arange(samples, device=waveform.device, dtype=waveform.real.dtype)
    spectrum = torch.fft.fft(waveform, 2 * samples)
    echo = torch.fft.fft(waveform * torch.exp(2j * math.pi * doppler * time), 2 * samples)
    product = echo * spectrum.conj()
    if fine > 1:
        low, edge, high = product[:samples], product[samples : samples + 1] / 2, product[samples + 1 :]
        product = fine * torch.cat([low, edge, product.new_zeros(2 * samples * (fine - 1) - 1), edge, high])
    lags = torch.fft.ifft(product) / waveform.abs().square().sum()
    return torch.cat([lags[samples * fine + 1 :], lags[: samples * fine]])


def nulls(cut: Tensor) -> tuple[int, int]:
    """Indices of the first local minima of |cut| (lags,) on both sides of its peak, which the main lobe ends at.

    Raises:
        ConfigurationError: there is none on a side.
    """
    size = cut.detach().abs()
    peak = int(size.argmax())
    before, after = (size[:-1] > size[1:]).nonzero(), (size[1:] > size[:-1]).nonzero()
    before, after = before[before < peak], after[after >= peak]
    if not (len(before) and len(after)):
        raise ConfigurationError(f"the main lobe does not end within {len(size)} lags, expected a longer pulse")
    return int(before[-1]) + 1, int(after[0])


def peak_sidelobe(cut: Tensor) -> float:
    """Largest value outside the main lobe over the peak, dB."""
    size, (first, last) = cut.detach().abs(), nulls(cut)
    return 20 * math.log10(float(torch.cat([size[: first + 1], size[last:]]).max() / size.max()))


def integrated_sidelobe(cut: Tensor) -> float:
    """Energy outside the main lobe over that of the main lobe, dB."""
    energy, (first, last) = cut.detach().abs().square(), nulls(cut)
    lobe = energy[first : last + 1].sum()
    return 10 * math.log10(float((energy.sum() - lobe) / lobe))


def main_lobe(cut: Tensor) -> float:
    """Width between the points of half the peak's power, in lags, interpolated linearly in amplitude."""
    size, level = cut.detach().abs() / cut.detach().abs().max(), math.sqrt(0.5)
    peak, low = int(size.argmax()), (size < level).nonzero()[:, 0]
    width = 0.0
    for outside, step in ((int(low[low > peak][0]), 1), (int(low[low < peak][-1]), -1)):
        inside = outside - step
        share = (float(size[inside]) - level) / (float(size[inside]) - float(size[outside]))
        width += abs(inside - peak) + share
    return width


def energy_in_band(waveform: Tensor, band: float) -> Tensor:
    """Share of the energy at frequencies of at most ``band`` / 2 turns per sample; differentiable."""
    count = _SPECTRUM * waveform.shape[-1]
    energy = torch.fft.fft(waveform, count).abs().square()
    inside = torch.fft.fftfreq(count, device=waveform.device).abs() <= band / 2
    return energy[inside].sum() / energy.sum()


def ambiguity(waveform: Tensor, dopplers: Tensor) -> Tensor:
    """|Ambiguity function|, 1 at lag and Doppler 0: (dopplers, 2 samples − 1), lag 0 in the middle.

    Args:
        waveform: complex (samples,).
        dopplers: turns per sample, (dopplers,).

    Example:
        >>> surface = ambiguity(torch.ones(8) + 0j, torch.tensor([0.0, 1 / 8]))
        >>> [round(x, 3) for x in surface[:, 7].tolist()]
        [1.0, 0.0]
    """
    return torch.stack([correlation(waveform, doppler).abs() for doppler in dopplers.tolist()])
