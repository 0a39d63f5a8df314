"""Perception, ô = D⁻¹(D(o)): encoder to the posterior of z_t given o_t alone, and decoder."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from worldmodel.data.actions import MASK
from worldmodel.data.spaces import ObservationSpec
from worldmodel.model.codecs import StandardisedCodec, build_codec
from worldmodel.model.latents import CategoricalConfig, LatentConfig
from worldmodel.model.networks import mlp
from worldmodel.runs.fields import Bounds, Checked, Layers, Size


@dataclasses.dataclass(frozen=True)
class PerceptionConfig(Checked):
    """Perception.

    Attributes:
        latent: kind and size of z_t.
        hidden: layer width.
        layers: hidden layers of encoder and decoder.
        image_channels: of an image's first convolution; doubled by each further one.
    """

    latent: LatentConfig = dataclasses.field(default_factory=CategoricalConfig)
    hidden: Size = 128
    layers: Layers = 1
    image_channels: Annotated[int, Bounds(1, 1024)] = 16


class Perception(nn.Module):
    """Encoder and decoder.

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
        self.latent = config.latent.build()
        codecs = {
            name: build_codec(modality, config.hidden, config.image_channels)
            for name, modality in spec.modalities.items()
        }
        self.names = list(codecs)
        self.codecs = nn.ModuleList(codecs.values())
        width = sum(codec.width for codec in codecs.values())
        self.encoder = mlp(width, config.hidden, config.layers, self.latent.outputs)
        entries = self.latent.flatten(torch.empty(self.latent.shape)).shape[-1]
        layers = mlp(entries, config.hidden, config.layers, config.hidden)
        self.decoder = nn.Sequential(layers, nn.LayerNorm(config.hidden), nn.SiLU())

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """(..., *shape) by modality -> posterior (..., *parameter shape)."""
        encoded, lead = [], torch.Size()
        for name, codec in self._codecs():
            modality = observations[name]
            lead = modality.shape[: modality.dim() - len(self.spec.modalities[name].shape)]
            encoded.append(codec.encode(modality.flatten(0, len(lead) - 1)))
        outputs = self.encoder(torch.cat(encoded, -1))
        return self.latent.distribution(outputs.view(*lead, -1))

    def decode(self, latent: Tensor) -> dict[str, Tensor]:
        """(..., *latent shape) -> predictions by modality.

        Logits of classes, (..., entries, classes), and grids, (..., classes, height, width, channels);
        vectors and maps standardised in symlog space, maps channels first; pixels from -0.5 to 0.5, channels first.
        """
        lead, features = self._decoder_features(latent)
        predictions = {name: codec.reconstruct(features) for name, codec in self._codecs()}
        return {name: value.view(*lead, *value.shape[1:]) for name, value in predictions.items()}

    def reconstruct(self, latent: Tensor) -> dict[str, Tensor]:
        """(..., *latent shape) -> encoded observations."""
        lead, features = self._decoder_features(latent)
        observations = {name: codec.decode(codec.reconstruct(features)) for name, codec in self._codecs()}
        return {name: value.view(*lead, *value.shape[1:]) for name, value in observations.items()}

    @torch.no_grad()
    def log_odds_of_legality(self, latent: Tensor) -> Tensor:
        """(..., *latent shape) -> log odds that each class of the actions is legal, (..., classes)."""
        lead, features = self._decoder_features(latent)
        logits = dict(self._codecs())[MASK].reconstruct(features)  # (steps, classes, 2)
        return (logits[..., 1] - logits[..., 0]).view(*lead, -1)

    def reconstruction_loss(self, latent: Tensor, observations: Mapping[str, Tensor]) -> Tensor:
        """Sum over modalities of nats or squared errors, (...)."""
        lead, features = self._decoder_features(latent)
        total = features.new_zeros(features.shape[0])
        for name, codec in self._codecs():
            total = total + codec.loss(codec.reconstruct(features), observations[name].flatten(0, len(lead) - 1))
        return total.view(lead)

    def standardised(
        self, observations: Mapping[str, Tensor], valid: Tensor
    ) -> Iterator[tuple[StandardisedCodec, Tensor]]:
        """Standardised codecs, with their ``observations`` (batch, time, ...) where ``valid``, (steps, ...)."""
        for name, codec in self._codecs():
            if isinstance(codec, StandardisedCodec):
                yield codec, observations[name][valid]

    def _decoder_features(self, latent: Tensor) -> tuple[torch.Size, Tensor]:
        return self.latent.lead(latent), self.decoder(self.latent.flatten(latent).flatten(0, -2))

    def _codecs(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self.codecs, strict=True)
