"""Codecs per kind of modality.

encode(modality)              (steps, *shape) -> (steps, width)
reconstruct(features)         (steps, hidden) -> prediction
loss(prediction, modality)    nats or squared error, summed over the modality, (steps,)
decode(prediction)            the most probable observation, (steps, *shape)
drop_decoder()                leaves ``encode`` alone
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.data.spaces import Modality
from worldmodel.model.networks import FirstBatchNorm, symexp, symlog

_WINDOW = 1e6  # steps in the running mean and variance
_MIN_VARIANCE = 1e-10  # below: a constant entry
_HEAVIEST = 100.0  # weight of a class in the loss
_LINEAR = 10.0  # deviations from the mean, beyond which numbers grow as a logarithm


class ClassCodec(nn.Module):
    """Classes, whose cross-entropy counts as much as what they tell.

    With ``rare`` above 0, that share of a class's weight is its information -ln p, divided by the mean over all that is
    seen: a key that is in one view of a thousand weighs more than the floor, and the mean weight stays 1.
    """

    counts: Tensor
    present: Tensor

    def _register_counts(self, sizes: Sequence[int], rare: float) -> None:
        """``sizes``: number of classes by entry."""
        self.rare = rare
        if rare:
            present = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
            self.register_buffer("present", present, persistent=False)
            self.register_buffer("counts", present.double())

    @property
    def learns_statistics(self) -> bool:
        return self.rare > 0

    def weights(self) -> Tensor:
        """Of every class of every entry, (entries, classes), at most 100; 1 for classes that an entry lacks."""
        probability = self.counts / self.counts.sum(-1, keepdim=True)
        told = -torch.where(self.present, probability, 1).log()
        mean = (probability * told).sum(-1, keepdim=True)
        relative = torch.where(self.present & (mean > 0), told / mean, 1)  # one class tells nothing
        return (1 - self.rare + self.rare * relative).clamp(max=_HEAVIEST)

    @torch.no_grad()
    def moments(self, modality: Tensor) -> Tensor:
        """(steps, ..., entries) -> how often each class is seen, (entries, classes)."""
        entries, classes = self.counts.shape
        index = modality.long().flatten(0, -2) + classes * torch.arange(entries, device=modality.device)
        return torch.bincount(index.flatten(), minlength=entries * classes).view(entries, classes).double()

    @torch.no_grad()
    def update(self, moments: Tensor) -> None:
        """Adds counts, (processes, entries, classes); old ones fade, down to one of each class."""
        self.counts += moments.sum(0)
        self.counts *= (_WINDOW / self.counts.sum(-1, keepdim=True)).clamp(max=1)
        self.counts.clamp_(min=self.present.double())

    def _weighted(self, loss: Tensor, modality: Tensor) -> Tensor:
        """``loss`` and classes, (steps, ..., entries)."""
        if not self.rare:
            return loss
        entries, classes = self.counts.shape
        index = modality.long() + classes * torch.arange(entries, device=modality.device)
        return loss * self.weights().to(loss.dtype).flatten()[index]


class CategoricalCodec(ClassCodec):
    """One-hot classes and a softmax per entry. Floating-point input is one-hot already, for gradients."""

    offsets: Tensor
    padding: Tensor
    zero: Tensor

    def __init__(self, modality: Modality, hidden: int, rare: float = 0.0) -> None:
        super().__init__()
        self.sizes = modality.sizes
        self._register_counts(modality.sizes, rare)
        self.width = sum(modality.sizes)
        self.project = nn.Linear(hidden, len(modality.sizes) * max(modality.sizes))
        sizes = torch.tensor(modality.sizes)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("padding", torch.arange(max(modality.sizes)) >= sizes[:, None], persistent=False)
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def drop_decoder(self) -> None:
        del self.project

    def encode(self, modality: Tensor) -> Tensor:
        if modality.is_floating_point():
            return modality
        hot = self.zero.new_zeros(modality.shape[0], self.width)
        return hot.scatter_(1, modality.long() + self.offsets, 1.0)

    def reconstruct(self, features: Tensor) -> Tensor:
        """Logits (steps, entries, classes); minus infinity for classes an entry lacks."""
        logits = self.project(features).unflatten(-1, self.padding.shape)
        return logits.masked_fill(self.padding, -torch.inf)

    def loss(self, prediction: Tensor, modality: Tensor) -> Tensor:
        loss = F.cross_entropy(prediction.flatten(0, 1), modality.long().flatten(), reduction="none")
        return self._weighted(loss.view_as(modality), modality).sum(-1)

    def decode(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(-1)


class StandardisedCodec(nn.Module):
    """Numbers standardised in symlog space, so that entries of small variance count.

    A modality's last dimension has the entries, each with its own mean and variance. Beyond 10 deviations from the mean
    they grow as a logarithm: what an almost constant entry jumps to is no 1e5.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    learns_statistics = True

    def _register_moments(self, entries: int) -> None:
        self.register_buffer("mean", torch.zeros(entries))
        self.register_buffer("variance", torch.ones(entries))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @property
    def deviation(self) -> Tensor:
        """Standard deviation, (entries,); 1 for constants, whose noise must not be amplified."""
        return torch.where(self.variance > _MIN_VARIANCE, self.variance, 1).sqrt()

    def standardised(self, modality: Tensor) -> Tensor:
        numbers = (symlog(modality.to(self.mean.dtype)) - self.mean) / self.deviation
        size = numbers.abs()
        far = _LINEAR + (size - _LINEAR).clamp(min=0).log1p()
        return torch.where(size <= _LINEAR, numbers, numbers.sign() * far)

    def restored(self, numbers: Tensor) -> Tensor:
        """Inverts ``standardised``; finite."""
        size = numbers.abs()
        far = _LINEAR + (size - _LINEAR).clamp(min=0).expm1()
        numbers = torch.where(size <= _LINEAR, numbers, numbers.sign() * far)
        most = math.log(torch.finfo(numbers.dtype).max) - 1
        return symexp((numbers * self.deviation + self.mean).clamp(-most, most))

    @torch.no_grad()
    def moments(self, modality: Tensor) -> Tensor:
        """(steps, ..., entries) -> count, mean and variance of symlog over finite steps, (3, entries)."""
        numbers = symlog(modality.to(self.mean.dtype))
        numbers = numbers[numbers.flatten(1).isfinite().all(-1)]
        if not numbers.shape[0]:
            return torch.zeros_like(self.mean).expand(3, -1)
        count = torch.full_like(self.mean, numbers.shape[0])
        numbers = numbers.flatten(0, -2)
        return torch.stack([count, numbers.mean(0), numbers.var(0, correction=0)])

    @torch.no_grad()
    def update(self, moments: Tensor) -> None:
        """Merges ``moments``, (processes, 3, entries) (Chan et al. 1979)."""
        for count, mean, variance in moments.unbind(0):
            steps = int(count[0])
            if not steps:
                continue
            self.count.add_(steps).clamp_(max=_WINDOW)
            weight = steps / self.count.item()
            between = weight * (1 - weight) * (mean - self.mean).square()
            self.variance.lerp_(variance, weight).add_(between)
            self.mean.lerp_(mean, weight)


class VectorCodec(StandardisedCodec):
    """Vectors, standardised."""

    def __init__(self, modality: Modality, hidden: int) -> None:
        super().__init__()
        entries = modality.shape[0]
        self.width = entries + 1
        self.project = nn.Linear(hidden, entries)
        self._register_moments(entries)

    def drop_decoder(self) -> None:
        del self.project

    def encode(self, modality: Tensor) -> Tensor:
        """Appends a one, which keeps the scale that the next layer norm would remove."""
        numbers = self.standardised(modality)
        return torch.cat([numbers, torch.ones_like(numbers[:, :1])], -1)

    def reconstruct(self, features: Tensor) -> Tensor:
        return self.project(features)

    def loss(self, prediction: Tensor, modality: Tensor) -> Tensor:
        """Gaussian negative log-likelihood at variance 1, up to a constant."""
        return 0.5 * (prediction - self.standardised(modality)).square().sum(-1)

    def decode(self, prediction: Tensor) -> Tensor:
        return self.restored(prediction)


Upsampling = Literal["nearest", "transposed"]


class TransposedConvolution(nn.ConvTranspose2d):
    """Multiplies the sides by an even ``stride``, and leaves out what is beyond ``size``."""

    def __init__(self, before: int, after: int, stride: int, size: tuple[int, int]) -> None:
        super().__init__(before, after, 2 * stride, stride=stride, padding=stride // 2)
        self.size = size

    def forward(self, planes: Tensor) -> Tensor:  # type: ignore[override]
        height, width = self.size
        return super().forward(planes)[..., :height, :width]


class ImageCodec(nn.Module):
    """Strided convolutions down to a side of at most 4, and back by upsampling or transposed convolutions.

    ``stride`` is even, and that of the first convolution; it is 2 of the others.

    Attributes:
        norm: of the pixels, 0 to 255, that are encoded; None scales them to -0.5 to 0.5.
    """

    def __init__(
        self, modality: Modality, hidden: int, channels: int, stride: int = 2, upsampling: Upsampling = "nearest"
    ) -> None:
        super().__init__()
        self.shape = height, width, colors = modality.shape
        stages = 1 + max(0, math.ceil(math.log2(min(height, width) / (4 * stride))))
        sides = [(height, width)]
        layers: list[nn.Module] = []
        planes = [colors] + [channels * 2**i for i in range(stages)]
        for before, after in itertools.pairwise(planes):
            step = 2 if layers else stride
            convolution = nn.Conv2d(before, after, 2 * step - 1, stride=step, padding=step - 1)
            layers += [convolution, nn.GroupNorm(1, after), nn.SiLU()]
            sides.append((-(-sides[-1][0] // step), -(-sides[-1][1] // step)))
        self.encoder = nn.Sequential(*layers)
        self.norm: FirstBatchNorm | None = None
        self.small = (planes[-1], *sides[-1])
        self.width = hidden
        self.project = nn.Linear(math.prod(self.small), hidden)
        self.expand = nn.Linear(hidden, math.prod(self.small))
        back: list[nn.Module] = []
        for stage in reversed(range(stages)):
            last = stage == 0
            before, after = planes[stage + 1], planes[stage]
            if upsampling == "transposed":
                back.append(TransposedConvolution(before, after, stride if last else 2, sides[stage]))
            else:
                back += [nn.Upsample(size=sides[stage]), nn.Conv2d(before, after, 3, padding=1)]
            back += [] if last else [nn.GroupNorm(1, planes[stage]), nn.SiLU()]
        self.decoder = nn.Sequential(*back)

    def drop_decoder(self) -> None:
        del self.expand, self.decoder

    def centre(self) -> FirstBatchNorm:
        """Encodes what differs from the first batch's mean picture from now on; returns the norm, to be begun."""
        self.norm = FirstBatchNorm(math.prod(self.shape), self.shape[-1])
        return self.norm

    def encode(self, modality: Tensor) -> Tensor:
        if self.norm is None:
            return self.encode_planes(self.scaled(modality))
        pixels = self.norm(modality.flatten(1))  # whose mean has the weights' type
        return self.encode_planes(pixels.unflatten(1, self.shape).movedim(-1, 1))

    def encode_planes(self, planes: Tensor) -> Tensor:
        """(steps, channels, height, width) -> (steps, width)."""
        return self.project(self.encoder(planes).flatten(1))

    def reconstruct(self, features: Tensor) -> Tensor:
        """(steps, channels, height, width), from -0.5 to 0.5, not clipped."""
        return self.decoder(self.expand(features).unflatten(-1, self.small))

    def loss(self, prediction: Tensor, modality: Tensor) -> Tensor:
        return (prediction - self.scaled(modality)).square().sum((1, 2, 3))

    def decode(self, prediction: Tensor) -> Tensor:
        return ((prediction + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)

    def scaled(self, modality: Tensor) -> Tensor:
        """Pixels (steps, *shape) -> planes from -0.5 to 0.5, channels first."""
        return modality.movedim(-1, 1).to(self.project.weight.dtype) / 255 - 0.5


class MapCodec(StandardisedCodec):
    """Real numbers on a grid: standardised per channel, then as an image."""

    def __init__(
        self, modality: Modality, hidden: int, channels: int, stride: int = 2, upsampling: Upsampling = "nearest"
    ) -> None:
        super().__init__()
        self.image = ImageCodec(modality, hidden, channels, stride, upsampling)
        self.width = self.image.width
        self._register_moments(modality.shape[-1])

    def drop_decoder(self) -> None:
        self.image.drop_decoder()

    def encode(self, modality: Tensor) -> Tensor:
        return self.image.encode_planes(self.standardised(modality).movedim(-1, 1))

    def reconstruct(self, features: Tensor) -> Tensor:
        """Standardised, (steps, channels, height, width)."""
        return self.image.reconstruct(features)

    def loss(self, prediction: Tensor, modality: Tensor) -> Tensor:
        """Gaussian negative log-likelihood at variance 1, up to a constant."""
        return 0.5 * (prediction.movedim(1, -1) - self.standardised(modality)).square().sum((1, 2, 3))

    def decode(self, prediction: Tensor) -> Tensor:
        return self.restored(prediction.movedim(1, -1))


class GridCodec(ClassCodec):
    """Class indices on a grid: embeddings summed over channels, convolved."""

    offsets: Tensor

    def __init__(self, modality: Modality, hidden: int, rare: float = 0.0, embedding: int = 16) -> None:
        super().__init__()
        height, width, channels = modality.shape
        self.shape = modality.shape
        self.classes = max(modality.sizes)
        self._register_counts(modality.sizes, rare)
        self.width = hidden
        self.register_buffer("offsets", torch.arange(channels) * self.classes, persistent=False)
        self.embed = nn.Embedding(channels * self.classes, embedding)
        self.convolve = nn.Conv2d(embedding, 2 * embedding, 3, padding=1)
        self.project = nn.Linear(2 * embedding * height * width, hidden)
        self.expand = nn.Linear(hidden, 2 * embedding * height * width)
        self.classify = nn.Conv2d(2 * embedding, channels * self.classes, 1)

    def drop_decoder(self) -> None:
        del self.expand, self.classify

    def encode(self, modality: Tensor) -> Tensor:
        index = modality.long() + self.offsets  # (steps, height, width, channels)
        hot = self.embed.weight.new_zeros(*index.shape[:-1], self.embed.num_embeddings).scatter_(-1, index, 1.0)
        embedded = hot @ self.embed.weight  # a product has a faster gradient than a look-up
        planes = self.convolve(embedded.movedim(-1, 1)).movedim(1, -1)
        weight = self._by_cell(self.project.weight).flatten(1)
        return F.linear(F.silu(planes).flatten(1), weight, self.project.bias)

    def reconstruct(self, features: Tensor) -> Tensor:
        """Logits (steps, classes, height, width, channels)."""
        weight = self._by_cell(self.expand.weight.t()).flatten(1).t()
        bias = self._by_cell(self.expand.bias[None]).flatten()
        planes = F.silu(F.linear(features, weight, bias)).unflatten(-1, (*self.shape[:2], -1))
        logits = F.linear(planes, self.classify.weight.flatten(1), self.classify.bias)
        return logits.unflatten(-1, (self.shape[2], self.classes)).movedim(-1, 1)

    def _by_cell(self, weights: Tensor) -> Tensor:
        """(rows, planes * height * width) -> (rows, height, width, planes), the order of all that is computed."""
        return weights.unflatten(1, (-1, *self.shape[:2])).movedim(1, -1)

    def loss(self, prediction: Tensor, modality: Tensor) -> Tensor:
        logits = prediction.movedim(1, -1).flatten(0, -2)  # contiguous
        loss = F.cross_entropy(logits, modality.long().flatten(), reduction="none").view_as(modality)
        return self._weighted(loss, modality).sum((1, 2, 3))

    def decode(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(1)


def build_codec(
    modality: Modality,
    hidden: int,
    channels: int,
    rare: float = 0.0,
    stride: int = 2,
    upsampling: Upsampling = "nearest",
) -> Any:
    """The codec of ``modality``; ``channels``, ``stride``: of an image's first convolution; ``rare``: for classes."""
    if modality.kind == "categorical":
        return CategoricalCodec(modality, hidden, rare)
    if modality.kind == "vector":
        return VectorCodec(modality, hidden)
    if modality.kind == "map":
        return MapCodec(modality, hidden, channels, stride, upsampling)
    if modality.kind == "image":
        return ImageCodec(modality, hidden, channels, stride, upsampling)
    return GridCodec(modality, hidden, rare)
