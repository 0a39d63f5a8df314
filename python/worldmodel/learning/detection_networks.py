"""Networks of the game between detector and jammer: one finds targets in what was received, one makes jamming.

Both are convolutions over pulses or Doppler rows and range cells, which go round.
"""

import dataclasses
import itertools
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.environments.radar.config import CFARConfig
from worldmodel.environments.radar.echoes import normal
from worldmodel.environments.radar.receiver import adaptive_filter, cfar_threshold, doppler_filter, matched_filter
from worldmodel.runs.fields import Bounds, Checked, Size

_AROUND = CFARConfig()
_FLOOR = 0.05  # of a row's mean power, added before the logarithm


@dataclasses.dataclass(frozen=True)
class NetworkConfig(Checked):
    """Of either network.

    Attributes:
        width: channels of a layer.
        layers: convolutions before the last one, which looks at each cell alone.
        rows: of a kernel, odd.
        cells: of a kernel, odd.
    """

    width: Size = 8
    layers: Annotated[int, Bounds(1, 16)] = 2
    rows: Annotated[int, Bounds(1, 63)] = 3
    cells: Annotated[int, Bounds(1, 63)] = 5


class CircularNetwork(nn.Module):
    """Convolutions over two dimensions that go round.

    Args:
        inputs: channels.
        outputs: channels.
        config: of the layers.
    """

    def __init__(self, inputs: int, outputs: int, config: NetworkConfig) -> None:
        super().__init__()
        kernel = (config.rows, config.cells)
        widths = [inputs, *[config.width] * config.layers]
        self.hidden = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding=(config.rows // 2, config.cells // 2), padding_mode="circular")
            for a, b in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(config.width, outputs, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, inputs, rows, cells) → (batch, outputs, rows, cells)."""
        for layer in self.hidden:
            inputs = F.silu(layer(inputs))
        outputs: Tensor = self.last(inputs)
        return outputs


class DetectionNetwork(nn.Module):
    """D(X, S): the log odds that a target is in each cell, from the signal received and the pulse sent.

    The signal goes through the matched filter of the pulse, with and without a flat spectrum of the noise, and through
    the Doppler filter. The network sees the logarithms of powers over the mean of their Doppler row, and over that of a
    CFAR's reference cells, so that a change of level changes nothing.

    Example:
        >>> from worldmodel.environments.radar.waveforms import LFM
        >>> DetectionNetwork()(torch.randn(2, 8, 64) + 0j, LFM(16)().expand(2, -1)).shape
        torch.Size([2, 8, 64])
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.network = CircularNetwork(4, 1, config or NetworkConfig())

    def forward(self, received: Tensor, waveform: Tensor) -> Tensor:
        """``received`` complex (batch, pulses, cells), ``waveform`` complex (batch, samples) → (batch, rows, cells)."""
        pulse = waveform[:, None]
        filtered = torch.stack([matched_filter(received, pulse), adaptive_filter(received, pulse)], 1)
        powers = doppler_filter(filtered).abs().square()
        powers = powers / powers.mean(-1, keepdim=True) + _FLOOR
        around = cfar_threshold(powers, _AROUND) / _AROUND.factor
        logits: Tensor = self.network(torch.cat([powers.log(), (powers / around).log()], 1))[:, 0]
        return logits


class JammerNetwork(nn.Module):
    """G(S): jamming from noise and an intercepted pulse.

    From noise and the pulse as it arrives, a network makes a signal, and taps with which the pulse is convolved: copies
    of any delay, phase and frequency. Barrage, spot, sweep, repeated and smeared copies are special cases.

    Example:
        >>> JammerNetwork()(torch.randn(2, 16) + 0j, torch.ones(2), 8, 64, None).shape
        torch.Size([2, 8, 64])
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.network = CircularNetwork(4, 4, config or NetworkConfig())

    def forward(
        self, intercepted: Tensor, ratio: Tensor, pulses: int, cells: int, generator: torch.Generator | None
    ) -> Tensor:
        """One interval's jamming of mean power ``ratio``, complex (batch, pulses, cells).

        Args:
            intercepted: pulse that the jammer heard, complex (batch, samples).
            ratio: jammer-to-noise ratio, linear, (batch,).
            pulses: of the interval.
            cells: samples from pulse to pulse.
            generator: of the noise.
        """
        noise = normal((len(ratio), pulses, cells), generator, ratio)
        heard = F.pad(intercepted, (0, cells - intercepted.shape[-1]))[:, None].expand(-1, pulses, -1)
        made = self.network(torch.stack([noise.real, noise.imag, heard.real, heard.imag], 1))
        own, taps = torch.complex(made[:, 0], made[:, 1]), torch.complex(made[:, 2], made[:, 3])
        signal = own + torch.fft.ifft(torch.fft.fft(taps) * torch.fft.fft(heard))
        power = signal.abs().square().mean((-2, -1), keepdim=True)
        return signal * ratio.sqrt()[:, None, None] / (power + 1e-12).sqrt()
