"""Perception, ô = D⁻¹(D(o)): encoder to the posterior of z_t given o_t alone, and decoder."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from worldmodel.data.actions import MASK
from worldmodel.data.spaces import ObservationSpec
from worldmodel.model.codecs import ClassCodec, ImageCodec, StandardisedCodec, Upsampling, build_codec
from worldmodel.model.latents import CategoricalConfig, LatentConfig
from worldmodel.model.networks import FirstBatchNorm, mlp
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Layers, Share, Size


@dataclasses.dataclass(frozen=True)
class PerceptionConfig(Checked):
    """Perception.

    Attributes:
        latent: kind and size of z_t.
        hidden: layer width.
        layers: hidden layers of encoder and decoder.
        image_channels: of an image's first convolution; doubled by each further one.
        image_stride: of an image's first convolution. A large one sees large pictures at little cost.
        upsampling: of a decoded image: the nearest pixel and a convolution, or a transposed convolution, which takes a
            third of the time.
        rare: share of a class's weight in reconstruction that is the information it gives, -ln p, and not 1.
    """

    latent: LatentConfig = dataclasses.field(default_factory=CategoricalConfig)
    hidden: Size = 128
    layers: Layers = 1
    image_channels: Annotated[int, Bounds(1, 1024)] = 16
    image_stride: Literal[2, 4, 8, 16] = 2
    upsampling: Upsampling = "nearest"
    rare: Share = 0.0


class Perception(nn.Module):
    """Encoder and, where the latent has one, decoder.

    Attributes:
        chunk_steps: steps at once, which bounds the memory of convolutions: only inputs and outputs of other chunks are
            kept, and the backward pass computes a chunk again. None for all at once.

    Example:
        >>> from gymnasium import spaces
        >>> spec = ObservationSpec.from_space(spaces.Discrete(4))
        >>> perception = Perception(spec, PerceptionConfig(CategoricalConfig(variables=2, classes=4)))
        >>> posterior = perception({"observation": torch.tensor([[[0], [3], [1]]])})
        >>> perception.latent.sample(posterior).shape
        torch.Size([1, 3, 2, 4])
    """

    def __init__(self, spec: ObservationSpec, config: PerceptionConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        self.chunk_steps: int | None = None
        self.latent = config.latent.build()
        if config.rare and not self.latent.decodes:
            raise ConfigurationError(
                f"model.perception.rare is {config.rare:g}, which weighs classes in reconstruction, and "
                "latent.reconstruction is 0, so there is none: expected 0"
            )
        codecs = {
            name: build_codec(
                modality, config.hidden, config.image_channels, config.rare, config.image_stride, config.upsampling
            )
            for name, modality in spec.modalities.items()
        }
        if config.rare and not any(isinstance(codec, ClassCodec) for codec in codecs.values()):
            raise ConfigurationError(
                f"model.perception.rare is {config.rare:g}, which weighs classes, and {', '.join(codecs)} "
                f"{'has' if len(codecs) == 1 else 'have'} none: expected 0"
            )
        self.names = list(codecs)
        self.codecs = nn.ModuleList(codecs.values())
        width = sum(codec.width for codec in codecs.values())
        self.encoder = mlp(width, config.hidden, config.layers, self.latent.outputs)
        self.norms: list[FirstBatchNorm] = []
        if self.latent.residual:
            # Little of a picture differs: without the first norm, a step of the last layer would move all latents.
            last = self.encoder[-1]
            assert isinstance(last, nn.Linear)
            self.norms = [codec.centre() for codec in codecs.values() if isinstance(codec, ImageCodec)]
            self.norms += [FirstBatchNorm(last.in_features), FirstBatchNorm(self.latent.outputs)]
            self.encoder.insert(len(self.encoder) - 1, self.norms[-2])
            self.encoder.append(self.norms[-1])
        if not self.latent.decodes:
            for codec in codecs.values():
                codec.drop_decoder()
            return
        entries = self.latent.flatten(torch.empty(self.latent.shape)).shape[-1]
        layers = mlp(entries, config.hidden, config.layers, config.hidden)
        self.decoder = nn.Sequential(layers, nn.LayerNorm(config.hidden), nn.SiLU())

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """(..., *shape) by modality -> posterior (..., *parameter shape)."""
        lead, steps = torch.Size(), []
        for name, modality in self.spec.modalities.items():
            lead = observations[name].shape[: observations[name].dim() - len(modality.shape)]
            steps.append(observations[name].flatten(0, len(lead) - 1))
        return self.latent.distribution(self._by_chunks(self._encode, *steps).view(*lead, -1))

    @property
    def begun(self) -> bool:
        """Whether ``begin`` has nothing to do."""
        return all(bool(norm.begun) for norm in self.norms)

    @torch.no_grad()
    def begin(
        self, observations: Mapping[str, Tensor], valid: Tensor, gather: Callable[[Tensor], Tensor] = torch.clone
    ) -> None:
        """Standardises by the first batch, (batch, time, ...), where it is ``valid``; a later call changes nothing.

        Codecs must have their statistics by then. ``gather`` takes (1, 3, size) to those of all processes.
        """
        for norm in self.norms:
            if norm.begun:
                continue
            seen: list[Tensor] = []
            handle = norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            self(observations)
            handle.remove()
            features = torch.cat(seen)[valid.flatten()].double()
            count = torch.full_like(features[0], len(features))
            sums = torch.stack([count, features.sum(0), features.square().sum(0)])
            count, total, squares = gather(sums[None]).sum(0)
            mean = total / count
            norm.begin(mean, squares / count - mean.square())

    def decode(self, latent: Tensor) -> dict[str, Tensor]:
        """(..., *latent shape) -> predictions by modality.

        Logits of classes, (..., entries, classes), and grids, (..., classes, height, width, channels);
        vectors and maps standardised in symlog space, maps channels first; pixels from -0.5 to 0.5, channels first.
        """
        return self._decoded(latent, lambda codec, features: codec.reconstruct(features))

    def reconstruct(self, latent: Tensor) -> dict[str, Tensor]:
        """(..., *latent shape) -> encoded observations."""
        return self._decoded(latent, lambda codec, features: codec.decode(codec.reconstruct(features)))

    @torch.no_grad()
    def log_odds_of_legality(self, latent: Tensor) -> Tensor:
        """(..., *latent shape) -> log odds that each class of the actions is legal, (..., classes)."""
        lead, features = self._decoder_features(latent)
        logits = dict(self._codecs())[MASK].reconstruct(features)  # (steps, classes, 2)
        return (logits[..., 1] - logits[..., 0]).view(*lead, -1)

    def reconstruction_loss(self, latent: Tensor, observations: Mapping[str, Tensor]) -> Tensor:
        """Sum over modalities of nats or squared errors, (...)."""
        lead, entries = self._entries(latent)
        steps = [observations[name].flatten(0, len(lead) - 1) for name in self.names]
        return self._by_chunks(self._loss, entries, *steps).view(lead)

    def moments(
        self, observations: Mapping[str, Tensor], valid: Tensor
    ) -> Iterator[tuple[StandardisedCodec | ClassCodec, list[Tensor]]]:
        """Codecs that learn statistics, with those of ``observations`` (batch, time, ...) if ``valid``, by chunks."""
        size = self.chunk_steps or valid.numel()
        for name, codec in self._codecs():
            if getattr(codec, "learns_statistics", False):
                chunks = zip(observations[name].flatten(0, 1).split(size), valid.flatten().split(size), strict=True)
                yield codec, [codec.moments(values[mask]) for values, mask in chunks]

    def _encode(self, *observations: Tensor) -> Tensor:
        """(steps, *shape) in the order of ``names`` -> (steps, outputs)."""
        pairs = zip(self._codecs(), observations, strict=True)
        return self.encoder(torch.cat([codec.encode(modality) for (_, codec), modality in pairs], -1))

    def _loss(self, entries: Tensor, *observations: Tensor) -> Tensor:
        features = self.decoder(entries)
        total = features.new_zeros(features.shape[0])
        for (_, codec), modality in zip(self._codecs(), observations, strict=True):
            total = total + codec.loss(codec.reconstruct(features), modality)
        return total

    def _decoded(self, latent: Tensor, decode: Callable[[Any, Tensor], Tensor]) -> dict[str, Tensor]:
        lead, features = self._decoder_features(latent)
        decoded = {name: self._by_chunks(partial(decode, codec), features) for name, codec in self._codecs()}
        return {name: value.view(*lead, *value.shape[1:]) for name, value in decoded.items()}

    def _decoder_features(self, latent: Tensor) -> tuple[torch.Size, Tensor]:
        lead, entries = self._entries(latent)
        return lead, self.decoder(entries)

    def _entries(self, latent: Tensor) -> tuple[torch.Size, Tensor]:
        if not self.latent.decodes:
            raise ConfigurationError(
                "this world model has no decoder, so it draws nothing: it was trained with latent.reconstruction 0"
            )
        return self.latent.lead(latent), self.latent.flatten(latent).flatten(0, -2)

    def _by_chunks(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``function`` of (steps, ...) tensors, ``chunk_steps`` at once."""
        chunk = self.chunk_steps
        if chunk is None or len(tensors[0]) <= chunk:
            return function(*tensors)
        if torch.is_grad_enabled():
            function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([function(*parts) for parts in zip(*(x.split(chunk) for x in tensors), strict=True)])

    def _codecs(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self.codecs, strict=True)
