"""Perception, ô = D⁻¹(D(o)): an observation as a few categorical variables, and the observation that they say.

The latent z of a step is ``variables`` one-hot vectors over ``classes``, drawn from probabilities that depend on this
step's observation alone, so that all steps of a batch are seen at once; or it is these probabilities themselves.
Gradients pass a draw straight through to the probabilities (Bengio et al. 2013), which hold a share of the uniform
distribution so that no class is ever lost (Hafner et al. 2023, arXiv 2301.04104).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.data.spaces import ObservationSpec
from worldmodel.model.codecs import VectorCodec, build_codec
from worldmodel.model.networks import draw_index, perceptron


@dataclasses.dataclass(frozen=True)
class PerceptionConfig:
    """Perception.

    Attributes:
        variables: categorical variables of a latent.
        classes: of each of them.
        drawn: whether a latent is drawn from its probabilities. If not, it is the probabilities themselves: numbers are
            kept to more than classes can say, and what is imagined is one future, the mean of those that are possible.
        uniform: share of the uniform distribution in every probability.
        hidden: width of the layers.
        layers: between the leaves and the latent, and back.
        image_channels: of the first convolution of an image; each further one has twice as many.
    """

    variables: int = 8
    classes: int = 8
    drawn: bool = True
    uniform: float = 0.01
    hidden: int = 128
    layers: int = 1
    image_channels: int = 16

    def __post_init__(self) -> None:
        if self.variables < 1 or self.classes < 2 or not 0 <= self.uniform < 1:
            raise ValueError(
                f"PerceptionConfig: variables is {self.variables}, classes {self.classes} and uniform {self.uniform}, "
                "expected at least 1, at least 2, and a share below 1"
            )


class Perception(nn.Module):
    """Encoder, latent and decoder.

    Example:
        >>> from gymnasium import spaces
        >>> spec = ObservationSpec.from_space(spaces.Discrete(4))
        >>> perception = Perception(spec, PerceptionConfig(variables=2, classes=4))
        >>> logits = perception({"observation": torch.tensor([[[0], [3], [1]]])})
        >>> perception.draw(perception.probabilities(logits)).shape
        torch.Size([1, 3, 2, 4])
    """

    def __init__(self, spec: ObservationSpec, config: PerceptionConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        codecs = {name: build_codec(leaf, config.hidden, config.image_channels) for name, leaf in spec.leaves.items()}
        self.names = list(codecs)
        self.codecs = nn.ModuleList(codecs.values())
        width = sum(codec.width for codec in codecs.values())
        self.encoder = perceptron(width, config.hidden, config.layers, self.latent_width)
        layers = perceptron(self.latent_width, config.hidden, config.layers, config.hidden)
        self.decoder = nn.Sequential(layers, nn.LayerNorm(config.hidden), nn.SiLU())

    @property
    def latent_width(self) -> int:
        """variables * classes."""
        return self.config.variables * self.config.classes

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Leaves (..., *leaf.shape) -> logits of the latent, (..., variables, classes)."""
        read, lead = [], torch.Size()
        for name, codec in self._codecs():
            leaf = observations[name]
            lead = leaf.shape[: leaf.dim() - len(self.spec.leaves[name].shape)]
            read.append(codec.read(leaf.flatten(0, len(lead) - 1)))
        logits = self.encoder(torch.cat(read, -1))
        return logits.view(*lead, self.config.variables, self.config.classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax with its share of the uniform distribution."""
        return self.blur(logits.softmax(-1))

    def blur(self, probabilities: Tensor) -> Tensor:
        """Mixes the uniform distribution in."""
        share = self.config.uniform
        return probabilities * (1 - share) + share / self.config.classes

    def draw(self, probabilities: Tensor) -> Tensor:
        """A one-hot draw from each variable with the gradient of the probabilities; or those, if not ``drawn``."""
        if not self.config.drawn:
            return probabilities
        return self._straight_through(draw_index(probabilities), probabilities)

    def heard(self, latent: Tensor) -> Tensor:
        """What memory reads of an imagined latent: as blurred as the probabilities that it reads of a seen one."""
        return self.blur(latent) if self.config.drawn else latent

    def mode(self, probabilities: Tensor) -> Tensor:
        """The likeliest class instead of a draw, with the same gradient."""
        if not self.config.drawn:
            return probabilities
        return self._straight_through(probabilities.argmax(-1), probabilities)

    def decode(self, latent: Tensor) -> dict[str, Tensor]:
        """What latents (..., variables, classes) say of each leaf, as its codec's ``loss`` and ``picture`` take it.

        Logits for classes, (..., entries, classes), and for grids, (..., classes, height, width, channels); numbers
        through symlog; pixels around zero, channels first.
        """
        features = self.decoder(latent.flatten(-2).flatten(0, -2))
        said = {name: codec.reconstruct(features) for name, codec in self._codecs()}
        return {name: value.view(*latent.shape[:-2], *value.shape[1:]) for name, value in said.items()}

    def reconstruct(self, latent: Tensor) -> dict[str, Tensor]:
        """The observations that latents (..., variables, classes) say, as the leaves' own form."""
        lead = latent.shape[:-2]
        said = self.decode(latent.flatten(0, -3))
        pictures = {}
        for name, codec in self._codecs():
            picture = codec.picture(said[name])
            pictures[name] = picture.view(*lead, *picture.shape[1:])
        return pictures

    def reconstruction_loss(self, latent: Tensor, observations: Mapping[str, Tensor]) -> Tensor:
        """The loss of each step, (...): nats for classes and grids, squared error for numbers and pixels."""
        lead = latent.shape[:-2]
        features = self.decoder(latent.flatten(-2).flatten(0, -2))
        total = features.new_zeros(features.shape[0])
        for name, codec in self._codecs():
            total = total + codec.loss(codec.reconstruct(features), observations[name].flatten(0, len(lead) - 1))
        return total.view(lead)

    def take_in(self, observations: Mapping[str, Tensor], valid: Tensor) -> None:
        """Lets the running scales of numbers take in observations (batch, time, ...) where ``valid``."""
        for name, codec in self._codecs():
            if isinstance(codec, VectorCodec):
                codec.take_in(observations[name][valid])

    def _codecs(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self.codecs, strict=True)

    def _straight_through(self, index: Tensor, probabilities: Tensor) -> Tensor:
        hot = F.one_hot(index, self.config.classes).to(probabilities.dtype)
        return hot + (probabilities - probabilities.detach())


def divergence(probabilities: Tensor, from_logs: Tensor) -> Tensor:
    """KL(p || q) summed over variables, (...): p as probabilities, q as their logarithms, (..., variables, classes)."""
    return (probabilities * (probabilities.log() - from_logs)).sum((-1, -2))
