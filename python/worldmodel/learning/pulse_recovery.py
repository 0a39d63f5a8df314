"""A jammer's network that recovers the pulse from what it intercepted, noise included.

The loss is the sum of the squared error; of the squared error of the pulse-compression output, which is what the
radar's matched filter makes of a copy; and of an adversarial part, by which a discriminator takes the recovered pulse
for a true one (Goodfellow et al., "Generative adversarial nets", 2014).
"""

import dataclasses
import itertools
import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.environments.radar.config import Decibels
from worldmodel.environments.radar.echoes import normal
from worldmodel.learning.timed import Timed, TimedConfig, falling
from worldmodel.runs.fields import Bounds, Size, Weight

FAMILIES = ("LFM", "third-order FM", "phase code")


def sample_pulses(family: str, batch: int, samples: int, chips: int, generator: torch.Generator | None) -> Tensor:
    """Random pulses of a family, complex (batch, samples), of constant envelope 1 and a random phase.

    The frequency of an FM pulse is a polynomial of time, of degree 1 (``LFM``) or 3, whose Legendre coefficients are
    uniform, and scaled so that it stays within the sampled band; a phase code has ``chips`` independent phases.

    Raises:
        ValueError: an unknown family, or a number of samples that is no multiple of ``chips``.
    """
    if family not in FAMILIES or samples % chips:
        raise ValueError(
            f"sample_pulses: family {family!r}, {samples} samples and {chips} chips, expected one of {FAMILIES} and a "
            "multiple of the chips"
        )
    if family == "phase code":
        phases = 2 * math.pi * torch.rand(batch, chips, generator=generator).repeat_interleave(samples // chips, 1)
        return torch.polar(torch.ones_like(phases), phases)
    x = torch.linspace(-1, 1, samples)
    legendre = torch.stack([torch.ones_like(x), x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2])
    terms = 2 if family == "LFM" else 4
    weights = 2 * torch.rand(batch, terms, generator=generator) - 1
    frequency = weights @ legendre[:terms]
    frequency = frequency / (2 * frequency.abs().amax(1, keepdim=True).clamp_min(1))  # turns per sample
    phases = 2 * math.pi * (frequency.cumsum(1) + torch.rand(batch, 1, generator=generator))
    return torch.polar(torch.ones_like(phases), phases)


def intercepted(pulses: Tensor, snr: Tensor, generator: torch.Generator | None) -> Tensor:
    """``pulses`` (batch, samples) with noise at ``snr`` per sample, linear, (batch,), of power 1 in all."""
    noise = normal(tuple(pulses.shape), generator, snr)
    return (pulses * snr[:, None].sqrt() + noise) / (1 + snr[:, None]).sqrt()


def similarity(found: Tensor, pulses: Tensor) -> Tensor:
    """|⟨found, pulse⟩| / (‖found‖ ‖pulse‖), 0 to 1: what is left of the amplitude after compression, (batch,)."""
    return (found.conj() * pulses).sum(-1).abs() / (found.norm(dim=-1) * pulses.norm(dim=-1)).clamp_min(1e-12)


def compressed(found: Tensor, pulses: Tensor) -> Tensor:
    """The matched filter's output over the pulse's energy, all lags: complex (batch, 2 × samples)."""
    size = 2 * pulses.shape[-1]
    spectrum = torch.fft.fft(found, size) * torch.fft.fft(pulses, size).conj()
    return torch.fft.ifft(spectrum) / pulses.abs().square().sum(-1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class RecoveryConfig(TimedConfig):
    """Networks, pulses and training.

    Attributes:
        samples: of a pulse.
        chips: of a phase code.
        snr: smallest and largest signal-to-noise ratio per sample in training, dB.
        width: channels of a layer.
        layers: of dilations 1, 2, 4, ...
        reach: of the filter, samples on each side.
        compression: weight of the pulse-compression loss.
        adversarial: weight of the adversarial loss.
        batch_size: pulses per update.
        lr: of Adam, until it falls to 2% in the last half.

    The others are of ``TimedConfig``.
    """

    samples: Size = 64
    chips: Size = 16
    snr: tuple[Decibels, Decibels] = (-6.0, 15.0)
    width: Size = 32
    layers: Annotated[int, Bounds(1, 12)] = 3
    reach: Annotated[int, Bounds(1, 1024)] = 8
    compression: Weight = 1.0
    adversarial: Weight = 0.01
    batch_size: Size = 48
    lr: Annotated[float, Bounds(0, 1, above=True)] = 5e-3


class RecoveryNetwork(nn.Module):
    """Intercepted pulse → pulse, complex (batch, samples) both: a filter that a network steers.

    Each sample is a weighted sum of those within ``reach``. The weights come from a convolution over products of one
    sample and the conjugate of another. So a phase that all samples share changes the result by that phase alone.

    Example:
        >>> RecoveryNetwork(RecoveryConfig())(torch.ones(2, 64) + 0j).shape
        torch.Size([2, 64])
    """

    def __init__(self, config: RecoveryConfig) -> None:
        super().__init__()
        self.reach = config.reach
        widths = [2 * config.reach + 1, *[config.width] * config.layers]
        self.hidden = nn.ModuleList(
            nn.Conv1d(before, after, 5, padding=2 * 2**layer, dilation=2**layer)
            for layer, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.weights = nn.Conv1d(config.width, 2 * (2 * config.reach + 1), 1)

    def forward(self, heard: Tensor) -> Tensor:
        around = F.pad(heard, (self.reach, self.reach)).unfold(-1, heard.shape[-1], 1)  # (batch, shifts, samples)
        products = around[:, self.reach :] * heard[:, None].conj()
        features = torch.cat([products.real, products[:, 1:].imag], 1)
        for number, layer in enumerate(self.hidden):
            change = F.silu(layer(features))
            features = features + change if number else change
        real, imaginary = self.weights(features).chunk(2, 1)
        return heard + (torch.complex(real, imaginary) * around).sum(1)


class RecoveryTrainer(Timed):
    """Trains a recovery network against a discriminator, on all families alike.

    Attributes:
        network: that recovers.
        discriminator: of true and recovered pulses.
        seconds: of training, by ``config.clock``.

    Example:
        >>> trainer = RecoveryTrainer(RecoveryConfig(samples=32, width=8, batch_size=3, updates=1))
        >>> sorted(trainer.iterate()), trainer.finished
        (['adversarial', 'compression', 'discriminator', 'squared_error'], True)
    """

    def __init__(self, config: RecoveryConfig) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.network = RecoveryNetwork(config)
        self.discriminator = nn.Sequential(
            *(nn.Conv1d(2, config.width, 5, 2), nn.SiLU(), nn.Conv1d(config.width, config.width, 5, 2), nn.SiLU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(config.width, 1)),
        )
        self._optimizers = [torch.optim.Adam(x.parameters(), config.lr) for x in (self.network, self.discriminator)]

    def iterate(self) -> dict[str, float]:
        """One update of each network; returns the losses."""
        config = self.config
        with self.timing():
            each = math.ceil(config.batch_size / len(FAMILIES))
            pulses = torch.cat([sample_pulses(x, each, config.samples, config.chips, self.generator) for x in FAMILIES])
            low, high = config.snr
            decibels = low + (high - low) * torch.rand(len(pulses), generator=self.generator)
            found = self.network(intercepted(pulses, 10 ** (decibels / 10), self.generator))
            losses = {
                "squared_error": (found - pulses).abs().square().mean(),
                "compression": (compressed(found, pulses) - compressed(pulses, pulses)).abs().square().sum(-1).mean(),
                "adversarial": F.softplus(-self.discriminator(_real(found))).mean(),
            }
            weights = {"compression": config.compression, "adversarial": config.adversarial}
            self._step(0, torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum())
            true, recovered = self.discriminator(_real(torch.cat([pulses, found.detach()]))).chunk(2)
            losses["discriminator"] = (F.softplus(-true) + F.softplus(recovered)).mean()
            self._step(1, losses["discriminator"])
            self.updates += 1
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _step(self, side: int, loss: Tensor) -> None:
        optimizer = self._optimizers[side]
        optimizer.param_groups[0]["lr"] = self.config.lr * falling(self.progress)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()


@torch.no_grad()
def similarities(
    network: RecoveryNetwork, config: RecoveryConfig, snr: float, pulses: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Mean similarity to the pulse of what was intercepted at ``snr``, dB per sample, and recovered; by family."""
    found = {}
    for family in FAMILIES:
        generator = torch.Generator().manual_seed(seed)
        true = sample_pulses(family, pulses, config.samples, config.chips, generator)
        heard = intercepted(true, torch.full((pulses,), 10 ** (snr / 10)), generator)
        before, after = (float(similarity(x, true).mean()) for x in (heard, network(heard)))
        found[family] = (before, after)
    return found


def _real(signal: Tensor) -> Tensor:
    return torch.stack([signal.real, signal.imag], 1)
