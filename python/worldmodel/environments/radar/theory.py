"""Detection theory: required signal-to-noise ratios and detection probabilities in closed form.

A square-law detector sums the power of ``pulses`` samples of unit noise and compares it with a threshold. Powers and
signal-to-noise ratios are per pulse and linear where not in dB.

Sources: Albersheim, "A closed-form approximation to Robertson's detection characteristics", Proc. IEEE 69 (1981);
Swerling, "Probability of detection for fluctuating targets", RAND RM-1217 (1954); Richards, Fundamentals of Radar
Signal Processing, 2nd ed. (2014), chapter 6 and section 6.5 (CA-CFAR).
"""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from worldmodel.runs.fields import Bounds, ConfigurationError, checked_value

Swerling = Literal[0, 1, 2, 3, 4]
Probability = Annotated[float, Bounds(0, 1, above=True, below=True)]
Pulses = Annotated[int, Bounds(1, 8192)]
References = Annotated[int, Bounds(1, 4096)]
_TINY = 1e-300  # added to a mean of 0, whose logarithm has no gradient


def decibel(ratio: float) -> float:
    """10 log10 of a ratio of powers."""
    return 10 * math.log10(ratio)


def power(decibels: float) -> float:
    """Ratio of powers of a value in dB."""
    return float(10 ** (decibels / 10))


def albersheim(detection: float, false_alarm: float, pulses: int = 1) -> float:
    """Signal-to-noise ratio per pulse in dB that a steady target needs (Albersheim 1981).

    It was made for a linear detector, and is within 0.2 dB of one for probabilities of detection from 0.5 to 0.9. Lower
    ones need more than it says: 0.9 dB more for 0.1 and false alarms at 1e-6, and 4 dB at 1e-3.

    Args:
        detection: probability, 0.1 to 0.9.
        false_alarm: probability, 1e-7 to 1e-3.
        pulses: summed noncoherently, 1 to 8,096.

    Raises:
        ConfigurationError: a value outside the range for which the approximation was made.

    Example:
        >>> round(albersheim(0.9, 1e-6), 3), round(albersheim(0.9, 1e-6, pulses=10), 3)
        (13.115, 4.99)
    """
    detection = checked_value(Annotated[float, Bounds(0.1, 0.9)], detection, "albersheim: detection")
    false_alarm = checked_value(Annotated[float, Bounds(1e-7, 1e-3)], false_alarm, "albersheim: false_alarm")
    pulses = checked_value(Annotated[int, Bounds(1, 8096)], pulses, "albersheim: pulses")
    a, b = math.log(0.62 / false_alarm), math.log(detection / (1 - detection))
    slope = 6.2 + 4.54 / math.sqrt(pulses + 0.44)
    return -5 * math.log10(pulses) + slope * math.log10(a + 0.12 * a * b + 1.7 * b)


def threshold(false_alarm: float, pulses: int = 1) -> float:
    """Summed power of unit noise that is exceeded with probability ``false_alarm`` (Richards 2014, section 6.3).

    Example:
        >>> round(threshold(1e-4), 4) == round(4 * math.log(10), 4)
        True
    """
    false_alarm = checked_value(Probability, false_alarm, "threshold: false_alarm")
    pulses = checked_value(Pulses, pulses, "threshold: pulses")
    if pulses == 1:
        return -math.log(false_alarm)
    shape = torch.tensor(float(pulses), dtype=torch.float64)
    x = -math.log(false_alarm)
    low, high = 0.0, pulses + x + math.sqrt(2 * pulses * x)  # Laurent & Massart 2000, lemma 1
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        above = torch.special.gammaincc(shape, torch.tensor(middle, dtype=torch.float64)) > false_alarm
        low, high = (middle, high) if above else (low, middle)


def detection_probability(snr: Tensor | float, false_alarm: float, pulses: int = 1, swerling: Swerling = 0) -> Tensor:
    """Probability that a target exceeds ``threshold``, differentiable with respect to ``snr``.

    The signal's power is gamma distributed with K degrees: K = 1, N, 2, 2N for Swerling 1 to 4 and N pulses. Given the
    power, the sum is a Poisson mixture of gamma variables; over the power, the mixture is negative binomial:
    1 − Pd = Σ_k w_k P(N + k, T), with P the lower incomplete gamma function, which ends the sum.

    Args:
        snr: mean signal-to-noise ratio per pulse, linear, of any shape.
        false_alarm: probability.
        pulses: summed noncoherently.
        swerling: 0 steady, 1 and 2 exponential power per scan and per pulse, 3 and 4 with four degrees of freedom.

    Returns:
        float64 of the shape of ``snr``.

    Raises:
        ConfigurationError: a negative or NaN signal-to-noise ratio; others outside their bounds.

    Example:
        >>> [round(float(detection_probability(10.0, 1e-4, swerling=kind)), 4) for kind in (0, 1)]
        [0.6161, 0.4329]
    """
    swerling = checked_value(Swerling, swerling, "detection_probability: swerling")
    snr = checked_power("detection_probability: snr", torch.as_tensor(snr, dtype=torch.float64), "linear")
    limit = threshold(false_alarm, pulses)
    if swerling == 1 and pulses == 1:
        return torch.exp(-limit / (1 + snr))
    if swerling == 2:
        shape = torch.tensor(float(pulses), dtype=torch.float64)
        return torch.special.gammaincc(shape, limit / (1 + snr))
    terms = int(limit + 12 * math.sqrt(limit) + 60)
    k = torch.arange(terms, dtype=torch.float64)
    misses = torch.special.gammainc(pulses + k, torch.tensor(limit, dtype=torch.float64))
    mean = pulses * snr[..., None] + _TINY
    if swerling == 0:
        log_weight = torch.xlogy(k, mean) - mean - torch.lgamma(k + 1)
    else:
        degrees = {1: 1, 3: 2, 4: 2 * pulses}[swerling]
        choices = torch.lgamma(k + degrees) - torch.lgamma(k + 1) - math.lgamma(degrees)
        share = mean / degrees
        log_weight = choices + torch.xlogy(k, share) - (k + degrees) * torch.log1p(share)
    return 1 - (log_weight.exp() * misses).sum(-1)


def cfar_factor(false_alarm: float, references: int) -> float:
    """Factor of the mean of ``references`` cells in a CA-CFAR: n (Pfa^(−1/n) − 1) (Richards 2014, section 6.5).

    Example:
        >>> round(cfar_factor(1e-4, 16), 3)
        12.452
    """
    false_alarm = checked_value(Probability, false_alarm, "cfar_factor: false_alarm")
    references = checked_value(References, references, "cfar_factor: references")
    return references * math.expm1(-math.log(false_alarm) / references)


def cfar_detection_probability(snr: Tensor | float, false_alarm: float, references: int) -> Tensor:
    """Of a Swerling 1 target behind a CA-CFAR with independent cells: (1 + α / (n (1 + S)))^(−n).

    Args:
        snr: mean signal-to-noise ratio in the cell under test, linear, of any shape; differentiable.
        false_alarm: probability.
        references: cells n of noise alone.

    Returns:
        Of the dtype and shape of ``snr``; a number becomes float64.

    Example:
        >>> [round(float(cfar_detection_probability(power(x), 1e-4, 16)), 3) for x in (10, 15, 20)]
        [0.335, 0.686, 0.884]
    """
    given = snr if isinstance(snr, Tensor) else torch.tensor(snr, dtype=torch.float64)
    given = checked_power("cfar_detection_probability: snr", given, "linear")
    factor = cfar_factor(false_alarm, references)
    return (1 + factor / (references * (1 + given))) ** -references


def checked_power(name: str, value: Tensor, unit: str) -> Tensor:
    """``value``, or ConfigurationError if an entry is negative, NaN or infinite."""
    bad = ~(value.detach().isfinite() & (value.detach() >= 0))
    if bad.any():
        first = value.detach()[bad].flatten()[0].item()
        raise ConfigurationError(f"{name} is {first:g} ({unit}), expected a finite value of at least 0 ({unit})")
    return value
