"""Exact detection probability behind a CA-CFAR whose cells are correlated, as those of one map are.

Matched-filtered noise is correlated from cell to cell, and the target's sidelobes lie in the reference cells. With a
Swerling 1 target, all cells y of a Doppler row are jointly complex normal, y = A n with independent unit normal n. A
detection is |y₀|² > α/n Σ|yᵢ|², that is nᴴ H n > 0 with H = Aᴴ diag(1, −α/n, …) A. One eigenvalue μ₀ of H is positive,
and P = Πᵢ μ₀ / (μ₀ − μᵢ) over the others. With independent cells this is ``theory.cfar_detection_probability``. It is
differentiable with respect to the waveform and all powers.

Source: the distribution of a quadratic form of complex normal variables, Turin, "The characteristic function of
Hermitian quadratic forms in complex normal variables", Biometrika 47 (1960), with a single positive eigenvalue.
"""

import torch
from torch import Tensor

from worldmodel.environments.radar.config import CFARConfig
from worldmodel.environments.radar.echoes import response
from worldmodel.environments.radar.receiver import matched_filter
from worldmodel.environments.radar.theory import checked_power


def detection_of(sources: Tensor, config: CFARConfig) -> Tensor:
    """Probability that the cell under test is above its threshold.

    Args:
        sources: A, complex (..., 1 + references, independent unit normal sources): the cell under test, then its
            references.
        config: of the CFAR.

    Returns:
        Real (...).
    """
    weight = torch.full(sources.shape[-2:-1], -config.factor / config.references, dtype=sources.real.dtype)
    weight[0] = 1
    forms = sources.mH @ (weight.to(sources.device)[:, None] * sources)
    values = torch.linalg.eigvalsh(forms)
    return 1 / (1 - values[..., :-1].clamp_max(0) / values[..., -1:]).prod(-1)


def noise_sources(waveform: Tensor, cells: int) -> Tensor:
    """What white noise of power 1 is after the matched filter: complex (cells out, cells in)."""
    unit = torch.eye(cells, dtype=waveform.dtype, device=waveform.device)
    return matched_filter(unit, waveform).mT


def expected_detection(
    waveform: Tensor,
    snr: Tensor,
    config: CFARConfig,
    cells: int,
    noise: Tensor | float = 1.0,
    copied: Tensor | None = None,
    ratio: Tensor | float = 0.0,
    width: int = 1,
    doppler: float = 0.0,
) -> Tensor:
    """Detection probability of a Swerling 1 target through the whole chain, in the middle of a cell and Doppler row.

    Args:
        waveform: complex (samples,), transmitted; differentiable.
        snr: of ``samples`` × pulses samples of the echo, linear: (); differentiable.
        config: of the CFAR.
        cells: range cells, which go round.
        noise: power of white noise, barrage jamming included, linear: (); differentiable.
        copied: complex (samples,), smeared over ``width`` cells around the target by the jammer; none for none.
        ratio: its jammer-to-noise ratio, as for ``jamming.smear``, linear: (); differentiable.
        width: as for ``jamming.smear``; the first copy is half of it before the target.
        doppler: of the target within its pulse, turns per sample.

    Returns:
        Real ().

    Raises:
        ConfigurationError: negative powers, or fewer cells than the CFAR takes.
    """
    config.check(cells)
    powers = {"snr": snr, "noise": noise, "ratio": ratio}
    snr, noise, ratio = (
        checked_power(f"expected_detection: {name}", torch.as_tensor(value), "linear") for name, value in powers.items()
    )
    energy = waveform.abs().square().sum()
    none = torch.zeros(1, dtype=waveform.real.dtype, device=waveform.device)
    target = response(waveform, none, none + doppler, cells) * (snr / energy).sqrt()
    white = noise_sources(waveform, cells) * noise.sqrt()
    sources = [matched_filter(target, waveform).mT, white]
    if copied is not None:
        delays = torch.arange(width, device=waveform.device, dtype=waveform.real.dtype) - width // 2
        copies = response(copied, delays, torch.zeros_like(delays), cells) * (ratio / width).sqrt()
        sources.append(matched_filter(copies, waveform).mT)
    used = torch.cat([torch.zeros(1, dtype=torch.int64), config.offsets]).to(waveform.device) % cells
    return detection_of(torch.cat(sources, -1)[used], config)
