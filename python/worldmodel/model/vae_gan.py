"""A discriminator of pictures, whose features say how well a picture is reconstructed: VAE-GAN.

Larsen et al. 2016, arXiv 1512.09300. Squared error of pixels hardly notices a small thing at a wrong place; what tells
pictures from reconstructions learns to. With D_l(x), the features before the last layer of a discriminator D:

    reconstruction   ½ |D_l(x) - D_l(x̃)|²,  x̃ = Dec(z), z ~ Enc(x)
    discriminator    -log D(x) - log(1 - D(x̃)) - log(1 - D(Dec(z_p))),  z_p ~ N(0, 1)
    decoder          the reconstruction, and -log D of both fakes

The squared error of pixels stays beside: a discriminator takes long to have features.
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.data.spaces import ObservationSpec
from worldmodel.model.codecs import ImageCodec
from worldmodel.model.perception import Perception


class Discriminator(nn.Module):
    """Tells pictures from what a decoder draws.

    Args:
        spec: of observations that are pictures.
        channels: of the first convolution; doubled by each further one.
        stride: of the first convolution.
    """

    def __init__(self, spec: ObservationSpec, channels: int, stride: int) -> None:
        super().__init__()
        self.names = list(spec.modalities)
        codecs = [ImageCodec(modality, 1, channels, stride) for modality in spec.modalities.values()]
        for codec in codecs:
            codec.drop_decoder()
        self.codecs = nn.ModuleList(codecs)

    def forward(self, planes: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Pictures from -0.5 to 0.5, channels first, (pictures, ...) by name -> features, and logits (pictures,)."""
        features, logits = [], []
        for name, codec in zip(self.names, self.codecs, strict=True):
            image = cast(ImageCodec, codec)
            features.append(image.encoder(planes[name]).flatten(1))
            logits.append(image.project(features[-1])[:, 0])
        return torch.cat(features, -1), torch.stack(logits).sum(0)


class VaeGan(nn.Module):
    """Losses of a perception of pictures and a discriminator.

    Args:
        perception: of pictures alone.
        channels: of the discriminator's first convolution.
        stride: of it.
    """

    def __init__(self, perception: Perception, channels: int, stride: int) -> None:
        super().__init__()
        self.perception = perception
        self.discriminator = Discriminator(perception.spec, channels, stride)

    def losses(self, latent: Tensor, observations: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Means over pictures: of the perception's losses, and of the discriminator's.

        Args:
            latent: samples of the pictures' posteriors, (pictures, *latent shape).
            observations: the pictures, uint8 (pictures, ...) by name.

        Returns:
            "pixels", "features" and "adversarial" of the perception, and the discriminator's loss; the gradient of each
            into the other is to be thrown away.
        """
        perception, discriminator = self.perception, self.discriminator
        codecs = zip(perception.names, perception.codecs, strict=True)
        real = {name: cast(ImageCodec, codec).scaled(observations[name]) for name, codec in codecs}
        reconstructed = perception.decode(latent)
        pixels = torch.stack([(reconstructed[name] - real[name]).square().sum((1, 2, 3)) for name in real]).sum(0)
        seen, real_logits = discriminator(real)
        fake_features, _ = discriminator(reconstructed)
        features = 0.5 * (fake_features - seen.detach()).square().sum(-1)
        # The adversary is the decoder's, not the encoder's.
        _, fakes = discriminator(perception.decode(torch.cat([latent.detach(), torch.randn_like(latent)])))
        own = F.softplus(-real_logits).mean() + 2 * F.softplus(fakes).mean()
        losses = {"pixels": pixels.mean(), "features": features.mean(), "adversarial": 2 * F.softplus(-fakes).mean()}
        return losses, own
