"""A radar's parameters and its radar equation.

Source: Richards, Fundamentals of Radar Signal Processing, 2nd ed. (2014), section 2.2 (radar equation) and chapter 4
(range, Doppler and their ambiguities).
"""

import dataclasses
import math
from typing import Annotated

import torch
from torch import Tensor

from worldmodel.environments.radar.theory import Probability, cfar_factor, checked_power, power
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Unit

LIGHT = 299_792_458.0
"""Speed of light in m/s."""
BOLTZMANN = 1.380649e-23
"""Boltzmann's constant in J/K."""

Hertz = Annotated[float, Bounds(0, 1e12, above=True), Unit("Hz")]
Seconds = Annotated[float, Bounds(0, 10, above=True), Unit("s")]
Watts = Annotated[float, Bounds(0, 1e12, above=True), Unit("W")]
Decibels = Annotated[float, Bounds(-300, 300), Unit("dB")]
Loss = Annotated[float, Bounds(0, 300), Unit("dB")]
Kelvin = Annotated[float, Bounds(0, 1e6, above=True), Unit("K")]


@dataclasses.dataclass(frozen=True)
class RadarConfig(Checked):
    """A pulse-Doppler radar with one antenna, and one coherent processing interval of it.

    Attributes:
        carrier: frequency, Hz.
        bandwidth: of the pulse, Hz; at most ``sample_rate``.
        sample_rate: complex samples per second, Hz.
        pulse: duration of a pulse, s; a whole number of samples.
        repetition: interval between the beginnings of two pulses, s; a whole number of samples.
        pulses: per coherent processing interval.
        power: transmitted while a pulse lasts, W.
        gain: of the antenna, dB.
        noise_figure: of the receiver, dB.
        loss: of the system, dB.
        temperature: of the receiver's input, K.

    Raises:
        ConfigurationError: a value outside its bounds, a pulse as long as the repetition, a bandwidth above the sample
            rate, or a duration that is no whole number of samples.

    Example:
        >>> radar = RadarConfig()
        >>> radar.samples, radar.cells, round(radar.unambiguous_range), round(radar.cell_length, 1)
        (64, 256, 3837, 15.0)
    """

    carrier: Hertz = 10e9
    bandwidth: Hertz = 10e6
    sample_rate: Hertz = 10e6
    pulse: Seconds = 6.4e-6
    repetition: Seconds = 25.6e-6
    pulses: Annotated[int, Bounds(1, 4096)] = 64
    power: Watts = 100.0
    gain: Decibels = 30.0
    noise_figure: Decibels = 3.0
    loss: Loss = 3.0
    temperature: Kelvin = 290.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bandwidth > self.sample_rate:
            raise ConfigurationError(
                f"RadarConfig: bandwidth is {self.bandwidth:g} Hz, expected at most sample_rate ({self.sample_rate:g} "
                "Hz)"
            )
        if self.pulse >= self.repetition:
            raise ConfigurationError(
                f"RadarConfig: pulse is {self.pulse:g} s, expected less than repetition ({self.repetition:g} s)"
            )
        for name in ("pulse", "repetition"):
            count = getattr(self, name) * self.sample_rate
            if round(count) < 1 or abs(count - round(count)) > 1e-6 * count:
                raise ConfigurationError(
                    f"RadarConfig: {name} is {getattr(self, name):g} s, {count:g} samples at {self.sample_rate:g} Hz, "
                    "expected a whole number of at least 1"
                )

    @property
    def samples(self) -> int:
        """Of a pulse."""
        return round(self.pulse * self.sample_rate)

    @property
    def cells(self) -> int:
        """Range cells: samples from pulse to pulse."""
        return round(self.repetition * self.sample_rate)

    @property
    def time_bandwidth(self) -> float:
        """Product of duration and bandwidth of a pulse: its compression gain."""
        return self.pulse * self.bandwidth

    @property
    def wavelength(self) -> float:
        """In m."""
        return LIGHT / self.carrier

    @property
    def cell_length(self) -> float:
        """Range per cell, m."""
        return LIGHT / (2 * self.sample_rate)

    @property
    def unambiguous_range(self) -> float:
        """Range of an echo that arrives with the next pulse, m."""
        return LIGHT * self.repetition / 2

    @property
    def unambiguous_velocity(self) -> float:
        """Radial velocity in m/s whose Doppler shift is half a turn from pulse to pulse: ± λ / (4 T)."""
        return self.wavelength / (4 * self.repetition)

    def delay(self, distance: Tensor) -> Tensor:
        """Delay in samples of echoes from ``distance``, m."""
        return distance * (2 * self.sample_rate / LIGHT)

    def doppler(self, velocity: Tensor) -> Tensor:
        """Doppler shift in turns per sample of targets that approach with ``velocity``, m/s."""
        return velocity * (2 / (self.wavelength * self.sample_rate))

    def doppler_of_row(self, row: Tensor) -> Tensor:
        """Doppler shift in turns per sample of rows, int64, of a range-Doppler map; the upper half is negative."""
        return (row - self.pulses * (2 * row >= self.pulses)) / (self.pulses * self.cells)

    def velocity_of_row(self, row: Tensor) -> Tensor:
        """Radial velocity in m/s at the middle of rows, int64, of a range-Doppler map; positive approaches."""
        return self.doppler_of_row(row) * (self.wavelength * self.sample_rate / 2)

    def cells_moved(self, seconds: float) -> Tensor:
        """Range cells that targets of each Doppler row move away in ``seconds``: float32 (pulses,)."""
        return self.velocity_of_row(torch.arange(self.pulses)) * (-seconds / self.cell_length)

    def signal_to_noise(self, distance: Tensor, cross_section: Tensor) -> Tensor:
        """Mean signal-to-noise ratio of one sample, linear: P G² λ² σ / ((4π)³ R⁴ L k T F fs).

        Args:
            distance: R, m.
            cross_section: σ, m².
        """
        noise = BOLTZMANN * self.temperature * power(self.noise_figure) * self.sample_rate
        constant = self.power * power(2 * self.gain - self.loss) * self.wavelength**2 / ((4 * math.pi) ** 3 * noise)
        return constant * cross_section / distance**4

    def cross_section(self, distance: Tensor, snr: Tensor) -> Tensor:
        """Cross-section in m² whose matched-filtered pulses, filtered by Doppler, have ``snr`` (linear).

        It is the inverse of ``samples`` × ``pulses`` × ``signal_to_noise``.
        """
        one = self.signal_to_noise(distance, torch.ones_like(distance))
        return snr / (one * self.samples * self.pulses)


@dataclasses.dataclass(frozen=True)
class CFARConfig(Checked):
    """A cell-averaging CFAR along range (Richards 2014, section 6.5).

    Attributes:
        references: cells whose mean estimates the noise, half of them on each side of the cell under test; even.
        guard: cells left out between it and them, on each side.
        false_alarm: probability per cell, of independent cells.

    Example:
        >>> CFARConfig(references=3)
        Traceback (most recent call last):
            ...
        worldmodel...ConfigurationError: CFARConfig: references is 3, expected an even number of cells
    """

    references: Annotated[int, Bounds(2, 4096)] = 16
    guard: Annotated[int, Bounds(0, 4096)] = 2
    false_alarm: Probability = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.references % 2:
            raise ConfigurationError(f"CFARConfig: references is {self.references}, expected an even number of cells")

    @property
    def factor(self) -> float:
        """Threshold over the mean of the references."""
        return cfar_factor(self.false_alarm, self.references)

    @property
    def reach(self) -> int:
        """Cells from the cell under test to the last reference."""
        return self.guard + self.references // 2

    @property
    def offsets(self) -> Tensor:
        """Of the references from the cell under test, cells: int64 (references,)."""
        side = torch.arange(self.guard + 1, self.reach + 1)
        return torch.cat([-side.flip(0), side])

    def check(self, cells: int) -> None:
        """Raises ConfigurationError if ``cells`` range cells, which go round, are too few."""
        if 2 * self.reach + 1 > cells:
            raise ConfigurationError(
                f"CFARConfig: {self.references} references and {self.guard} guard cells on each side take "
                f"{2 * self.reach + 1} cells, expected at most the map's {cells} range cells"
            )


@dataclasses.dataclass(frozen=True)
class Targets:
    """Point targets of a batch.

    Attributes:
        distance: m, (batch, targets); an echo begins before the next pulse does.
        velocity: m/s, (batch, targets), positive where the target approaches.
        cross_section: mean, m², (batch, targets).
        swerling: 0 to 4 (Swerling 1954); one for all.

    Example:
        >>> Targets(torch.tensor([[900.0]]), torch.tensor([[10.0]]), torch.tensor([[1.0]]), swerling=1).count
        1
    """

    distance: Tensor
    velocity: Tensor
    cross_section: Tensor
    swerling: int = 0

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("distance", "velocity", "cross_section")}
        if len(set(shapes.values())) != 1 or self.distance.ndim != 2:
            raise ConfigurationError(f"Targets: shapes are {shapes}, expected one shape (batch, targets)")
        if type(self.swerling) is not int or not 0 <= self.swerling <= 4:
            raise ConfigurationError(f"Targets: swerling is {self.swerling}, expected 0, 1, 2, 3 or 4")
        checked_power("Targets: cross_section", self.cross_section, "m²")
        if not self.velocity.isfinite().all():
            raise ConfigurationError("Targets: velocity is NaN or infinite (m/s), expected finite values (m/s)")

    @property
    def count(self) -> int:
        """Targets per batch element."""
        return self.distance.shape[1]

    def check(self, radar: RadarConfig) -> None:
        """Raises ConfigurationError for a target that is not between 0 and the unambiguous range of ``radar``."""
        distance = self.distance.detach()
        bad = ~((distance > 0) & (distance < radar.unambiguous_range))
        if bad.any():
            raise ConfigurationError(
                f"Targets: distance is {distance[bad][0].item():g} m, expected more than 0 m and below the unambiguous "
                f"range of {radar.unambiguous_range:g} m"
            )
