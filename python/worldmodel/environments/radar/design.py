"""A pulse by gradient: low sidelobes at a bounded main lobe and a bounded spectrum.

The pulse has a constant envelope and is described by the frequency of each of its samples (``waveforms.FreeFM``). The
loss is a smooth maximum of the sidelobes' power in nepers, and penalties of the main lobe's width and of the energy
outside the band. The smooth maximum sharpens from step to step.

Source of the limit: for a spectrum strictly within the band, the narrowest main lobe at a given sidelobe is that of
Dolph, "A current distribution for broadside arrays", Proc. IRE 34 (1946).
"""

import dataclasses
import math
from typing import Annotated

import torch
from torch import Tensor

from worldmodel.environments.radar import quality
from worldmodel.environments.radar.theory import Probability
from worldmodel.environments.radar.waveforms import LFM, FreeFM
from worldmodel.runs.fields import Bounds, Checked, Limit, Positive, Seed

_FINE = 4  # lags per sample
_STRICT = 0.9  # of the allowed energy outside the band: where its penalty begins


@dataclasses.dataclass(frozen=True)
class DesignConfig(Checked):
    """What pulse is wanted.

    Attributes:
        time_bandwidth: pulse duration times the LFM's bandwidth B, to which others are compared.
        oversampling: samples per 1 / B.
        broadening: largest width of the main lobe between half powers, over the LFM's, 1 to 4.
        band: of the spectrum, over B.
        inside: least share of the energy in it.
        edge: lag at which sidelobes begin, in 1 / B.
        steps: of Adam.
        rate: its first learning rate, which falls to 1/50.
        seed: of a perturbation of the first frequencies, an LFM's.
    """

    time_bandwidth: Annotated[int, Bounds(4, 4096)] = 64
    oversampling: Annotated[int, Bounds(2, 64)] = 4
    broadening: Annotated[float, Bounds(1, 4)] = 1.25
    band: Annotated[float, Bounds(1, 64)] = 1.2
    inside: Probability = 0.99
    edge: Positive = 1.8
    steps: Limit = 1500
    rate: Positive = 0.01
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class Design:
    """A pulse and its figures.

    Attributes:
        waveform: complex (samples,).
        peak_sidelobe: outside the main lobe, which ends at the first null, dB.
        main_lobe: width between half powers over the LFM's.
        null: half of the distance between the main lobe's nulls, in 1 / B.
        inside: share of the energy in the wanted band.
        peak_sidelobe_doppler: the larger of those of the ambiguity function's cuts at ± 0.1 / duration, dB.
    """

    waveform: Tensor
    peak_sidelobe: float
    main_lobe: float
    null: float
    inside: float
    peak_sidelobe_doppler: float


def design(config: DesignConfig) -> Design:
    """The best pulse of a run that meets the limits, or the last one if none did; the same for the same seed.

    Example:
        >>> found = design(DesignConfig(time_bandwidth=16, steps=20))
        >>> found.waveform.shape, found.main_lobe < 1.5
        (torch.Size([64]), True)
    """
    generator = torch.Generator().manual_seed(config.seed)
    samples = config.time_bandwidth * config.oversampling
    fm = FreeFM(samples, 1 / config.oversampling)
    with torch.no_grad():
        fm.u.add_(0.01 * torch.randn(samples, generator=generator))
    half_width = quality.main_lobe(_cut(LFM(samples, 1 / config.oversampling)().detach())) / 2
    adam = torch.optim.Adam(fm.parameters(), config.rate)
    best, best_peak = fm().detach(), math.inf
    for step in range(config.steps):
        done = step / config.steps
        adam.param_groups[0]["lr"] = config.rate * (1 - 0.98 * done)
        waveform = fm()
        loss, excess, peak = _loss(waveform, config, half_width, sharpness=3 * 40**done)
        if excess <= 0 and peak < best_peak:
            best, best_peak = waveform.detach(), peak
        adam.zero_grad()
        loss.backward()
        adam.step()
    return measured(best if best_peak < math.inf else fm().detach(), config)


def measured(waveform: Tensor, config: DesignConfig) -> Design:
    """The figures of ``waveform``, complex (samples,), as the configuration defines them."""
    samples, rate = waveform.shape[-1], config.oversampling
    lfm = quality.main_lobe(_cut(LFM(samples, 1 / rate)().detach()))
    cut = _cut(waveform)
    first, last = quality.nulls(cut)
    return Design(
        waveform=waveform,
        peak_sidelobe=quality.peak_sidelobe(cut),
        main_lobe=quality.main_lobe(cut) / lfm,
        null=(last - first) / 2 / (_FINE * rate),
        inside=float(quality.energy_in_band(waveform, config.band / rate)),
        peak_sidelobe_doppler=max(quality.peak_sidelobe(_cut(waveform, sign * 0.1 / samples)) for sign in (1, -1)),
    )


def _cut(waveform: Tensor, doppler: float = 0.0) -> Tensor:
    return quality.correlation(waveform, doppler, _FINE)


def _loss(waveform: Tensor, config: DesignConfig, half_width: float, sharpness: float) -> tuple[Tensor, float, float]:
    """The loss; by how much the limits are missed, at most 0 where they hold; the largest sidelobe's power, nepers."""
    lags = _cut(waveform)
    power = torch.log(lags[len(lags) // 2 :].abs().square() + 1e-12)
    sidelobes = power[round(config.edge * config.oversampling * _FINE) :]
    peaks = torch.logsumexp(sharpness * sidelobes, 0) / sharpness
    lag = config.broadening * half_width
    below, share = math.floor(lag), lag - math.floor(lag)
    lobe = (1 - share) * power[below] + share * power[below + 1] - math.log(0.5)  # at the wanted width
    outside = 1 - quality.energy_in_band(waveform, config.band / config.oversampling)
    allowed = 1 - config.inside
    penalty = torch.relu(lobe + 0.02) * 20 + torch.relu(outside / allowed - _STRICT) * 20
    excess = max(float(lobe.detach()), float(outside.detach()) - allowed)
    return peaks + penalty, excess, float(sidelobes.detach().max())
