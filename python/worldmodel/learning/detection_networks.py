"""Networks of the game between detector and jammer: one finds targets in what was received, one makes jamming.

Both are convolutions over pulses or Doppler rows and range cells, which go round.
"""

import dataclasses
import functools
import itertools
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.nn import ConvLSTM
from worldmodel.environments.radar.config import CFARConfig
from worldmodel.environments.radar.echoes import normal
from worldmodel.environments.radar.receiver import (
    adaptive_filter,
    cfar_threshold,
    doppler_filter,
    follow,
    matched_filter,
)
from worldmodel.runs.fields import Bounds, Checked, Size

_AROUND = CFARConfig()
_REMEMBERS = 4.0  # bias of a forget gate that keeps nearly all, to begin with
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
        logits: Tensor = self.network(map_features(received, waveform))[:, 0]
        return logits


def map_features(received: Tensor, waveform: Tensor) -> Tensor:
    """What networks see of an interval, (batch, 4, rows, cells); arguments as of ``DetectionNetwork``."""
    pulse = waveform[:, None]
    filtered = torch.stack([matched_filter(received, pulse), adaptive_filter(received, pulse)], 1)
    powers = doppler_filter(filtered).abs().square()
    powers = powers / powers.mean(-1, keepdim=True) + _FLOOR
    around = cfar_threshold(powers, _AROUND) / _AROUND.factor
    return torch.cat([powers.log(), (powers / around).log()], 1)


@dataclasses.dataclass(frozen=True)
class TrackingConfig(NetworkConfig):
    """Of a detection network with a memory.

    Attributes:
        following: whether the memory is in a frame that moves with the targets of each Doppler row, or stays.
    """

    following: bool = True


@dataclasses.dataclass(frozen=True)
class MapState:
    """A memory of maps.

    Attributes:
        h: of the ConvLSTM, (1, batch, width, rows, cells), in the frame of the game's first interval.
        c: as ``h``.
        intervals: of the game that it has seen, int64 (batch,).
    """

    h: Tensor
    c: Tensor
    intervals: Tensor


class TrackingNetwork(nn.Module):
    """D(X_1, ..., X_t): the log odds that a target is in each cell of interval t, from all intervals up to it.

    Convolutions see each interval as ``DetectionNetwork`` does; a ConvLSTM (Shi et al. 2015) along range cells goes on
    from interval to interval; and a last layer reads both. In a frame that follows, a target that moves with the
    velocity of its Doppler row stays where it is, up to half a cell.

    Args:
        moved: cells that targets of each Doppler row move away from interval to interval, float (rows,).
        config: of the layers.

    Example:
        >>> from worldmodel.environments.radar.config import RadarConfig
        >>> radar = RadarConfig(pulse=1.6e-6, repetition=6.4e-6, pulses=8)
        >>> network = TrackingNetwork(radar.cells_moved(0.05))
        >>> received, pulses = torch.randn(2, 3, 8, 64) + 0j, torch.randn(2, 3, 16) + 0j
        >>> scores, state = network(received, pulses)
        >>> after, state = network(received, pulses, state)
        >>> scores.shape, state.intervals
        (torch.Size([2, 3, 8, 64]), tensor([6, 6]))
    """

    moved: Tensor

    def __init__(self, moved: Tensor, config: TrackingConfig | None = None) -> None:
        super().__init__()
        config = config or TrackingConfig()
        self.register_buffer("moved", moved if config.following else torch.zeros_like(moved))
        self.network = CircularNetwork(4, config.width, config)
        self.memory = ConvLSTM(config.width, config.width, (1, 3), batch_first=True, forget_bias=_REMEMBERS)
        self.last = nn.Conv2d(2 * config.width, 1, 1)

    def forward(
        self, received: Tensor, waveform: Tensor, state: MapState | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, MapState]:
        """Scores (batch, intervals, rows, cells), and the state after the last interval.

        Args:
            received: complex (batch, intervals, pulses, cells).
            waveform: sent, complex (batch, intervals, samples).
            state: after the intervals before; None where there are none.
            reset: bool (batch, intervals), true in the first interval of another game, which knows of none before.
        """
        batch, intervals = received.shape[:2]
        number = _since_reset(received, state, reset)
        features = self.network(map_features(received.flatten(0, 1), waveform.flatten(0, 1)))
        features = features.unflatten(0, (batch, intervals))
        away = cells_away(self.moved, number)[:, :, None]  # (batch, intervals, 1, rows)
        # Each step of the ConvLSTM looks one cell to either side: of maps that go round, as many cells are enough.
        going_round = functools.partial(_going_round, reach=intervals)
        before = None if state is None else (going_round(state.h), going_round(state.c))
        outputs, (h, c) = self.memory(going_round(follow(features, away)), before, reset)
        own = slice(intervals, intervals + received.shape[-1])
        remembered = follow(outputs[..., own], -away)
        logits = self.last(torch.cat([features, remembered], 2).flatten(0, 1))
        after = MapState(h[..., own], c[..., own], number[:, -1] + 1)
        return logits[:, 0].unflatten(0, (batch, intervals)), after


def cells_away(moved: Tensor, number: Tensor) -> Tensor:
    """Whole cells from the place in interval 0 to that in interval ``number``, the nearest where there are fractions.

    Args:
        moved: cells from interval to interval, (rows,).
        number: of intervals, int64 (...).

    Returns:
        int64 (..., rows).
    """
    return (moved * number[..., None]).round().long()


def _since_reset(received: Tensor, state: MapState | None, reset: Tensor | None) -> Tensor:
    """Number of each interval in its game, int64 (batch, intervals)."""
    batch, intervals = received.shape[:2]
    position = torch.arange(intervals, device=received.device).expand(batch, -1)
    number = position if state is None else position + state.intervals[:, None]
    if reset is None:
        return number
    start = torch.where(reset, position, -1).cummax(1).values
    return torch.where(start < 0, number, position - start)


def _going_round(maps: Tensor, reach: int) -> Tensor:
    """Maps (..., cells) with ``reach`` cells more on either side."""
    cells = maps.shape[-1]
    return maps[..., torch.arange(-reach, cells + reach, device=maps.device) % cells]


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
