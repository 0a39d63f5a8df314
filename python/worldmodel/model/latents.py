"""Latents: distributions over z_t, one tensor each, for slicing and stacking."""

import abc
import dataclasses
import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.model.networks import log_probability, one_hot, sample_index
from worldmodel.runs.fields import Bounds, Checked, Share, Size, Weight


class Latent(abc.ABC):
    """A family of distributions over z_t.

    Attributes:
        shape: of a sample.
        outputs: network outputs per distribution.
        width: features of ``embed``.
        residual: whether predictions are changes of z_t, which states then hold as "latent".
        decodes: whether observations are reconstructed.
    """

    shape: tuple[int, ...]
    outputs: int
    width: int
    residual: bool = False
    decodes: bool = True

    @abc.abstractmethod
    def distribution(self, outputs: Tensor) -> Tensor:
        """(..., outputs) -> parameters (..., *parameter shape)."""

    @abc.abstractmethod
    def sample(self, distribution: Tensor) -> Tensor:
        """Differentiable, (..., *shape)."""

    @abc.abstractmethod
    def mode(self, distribution: Tensor) -> Tensor:
        """Differentiable, (..., *shape)."""

    @abc.abstractmethod
    def as_observed(self, distribution: Tensor) -> Tensor:
        """The latent that embeds as an observed step does: ``embed`` of it is ``embed_mean``, (..., *shape)."""

    @abc.abstractmethod
    def embed(self, latent: Tensor) -> Tensor:
        """Sample (..., *shape) -> features (..., width)."""

    @abc.abstractmethod
    def embed_mean(self, distribution: Tensor) -> Tensor:
        """Expected features, (..., width), for observed steps."""

    @abc.abstractmethod
    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) in nats, (...)."""

    @abc.abstractmethod
    def entropy(self, distribution: Tensor) -> Tensor:
        """Nats, (...)."""

    @abc.abstractmethod
    def mixture(self, distributions: Tensor) -> Tensor:
        """Of several equally probable ones, (several, ..., *parameter shape): of this family, with their moments."""

    def flatten(self, latent: Tensor) -> Tensor:
        """(..., *shape) -> (..., entries), for the decoder."""
        return latent.flatten(-len(self.shape))

    def lead(self, latent: Tensor) -> torch.Size:
        """The dimensions (...) before a sample's shape."""
        return latent.shape[: latent.dim() - len(self.shape)]


class CategoricalLatent(Latent):
    """Categorical variables; one-hot straight-through samples (Bengio et al. 2013).

    Parameters are probabilities (..., variables, classes), with unimix against dead classes (Hafner et al. 2023, arXiv
    2301.04104).
    """

    def __init__(self, config: "CategoricalConfig") -> None:
        self.config = config
        self.shape = (config.variables, config.classes)
        self.outputs = self.width = config.variables * config.classes

    def distribution(self, outputs: Tensor) -> Tensor:
        return self.unimix(outputs.unflatten(-1, self.shape).softmax(-1))

    def unimix(self, probabilities: Tensor) -> Tensor:
        ratio = self.config.unimix_ratio
        return probabilities * (1 - ratio) + ratio / self.config.classes

    def sample(self, distribution: Tensor) -> Tensor:
        return one_hot(sample_index(distribution), distribution) if self.config.stochastic else distribution

    def mode(self, distribution: Tensor) -> Tensor:
        return one_hot(distribution.argmax(-1), distribution) if self.config.stochastic else distribution

    def as_observed(self, distribution: Tensor) -> Tensor:
        if not self.config.stochastic:
            return distribution
        ratio = self.config.unimix_ratio
        return (distribution - ratio / self.config.classes) / (1 - ratio)

    def embed(self, latent: Tensor) -> Tensor:
        """Flattened, with unimix, which probabilities have already."""
        return self.flatten(self.unimix(latent) if self.config.stochastic else latent)

    def embed_mean(self, distribution: Tensor) -> Tensor:
        return self.flatten(distribution)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return (p * (log_probability(p) - log_probability(q))).sum((-1, -2))

    def entropy(self, distribution: Tensor) -> Tensor:
        return -(distribution * log_probability(distribution)).sum((-1, -2))

    def mixture(self, distributions: Tensor) -> Tensor:
        return distributions.mean(0)


class GaussianLatent(Latent):
    """Independent normals, reparametrised (Kingma & Welling 2014, arXiv 1312.6114).

    Parameters are mean and standard deviation, (..., 2, size).
    """

    def __init__(self, config: "GaussianConfig") -> None:
        self.config = config
        self.shape = (config.size,)
        self.outputs, self.width = 2 * config.size, config.size

    def distribution(self, outputs: Tensor) -> Tensor:
        mean, spread = outputs.unflatten(-1, (2, -1)).unbind(-2)
        return torch.stack([mean, self.config.min_std + F.softplus(spread)], -2)

    def sample(self, distribution: Tensor) -> Tensor:
        mean, std = distribution.unbind(-2)
        return mean + std * torch.randn_like(mean) if self.config.stochastic else mean

    def mode(self, distribution: Tensor) -> Tensor:
        return distribution[..., 0, :]

    def as_observed(self, distribution: Tensor) -> Tensor:
        return distribution[..., 0, :]

    def embed(self, latent: Tensor) -> Tensor:
        return latent

    def embed_mean(self, distribution: Tensor) -> Tensor:
        return distribution[..., 0, :]

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        (p_mean, p_std), (q_mean, q_std) = p.unbind(-2), q.unbind(-2)
        ratio, distance = p_std / q_std, (p_mean - q_mean) / q_std
        return (0.5 * (ratio.square() + distance.square() - 1) - ratio.log()).sum(-1)

    def entropy(self, distribution: Tensor) -> Tensor:
        return (distribution[..., 1, :].log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def mixture(self, distributions: Tensor) -> Tensor:
        means, stds = distributions.unbind(-2)
        variance = stds.square().mean(0) + means.var(0, correction=0)
        return torch.stack([means.mean(0), variance.sqrt()], -2)


class EmbeddingLatent(Latent):
    """A vector that is learned by predicting it: a joint embedding (LeCun 2022; LeWM; V-JEPA 2-AC, arXiv 2506.09985).

    Parameters are the vector itself, (..., size). As a distribution it is a normal of variance 1 around it.
    """

    residual = True

    def __init__(self, config: "EmbeddingConfig") -> None:
        self.config = config
        self.shape = (config.size,)
        self.outputs = self.width = config.size
        self.decodes = config.reconstruction > 0

    def distribution(self, outputs: Tensor) -> Tensor:
        return outputs

    def sample(self, distribution: Tensor) -> Tensor:
        return distribution

    def mode(self, distribution: Tensor) -> Tensor:
        return distribution

    def as_observed(self, distribution: Tensor) -> Tensor:
        return distribution

    def embed(self, latent: Tensor) -> Tensor:
        return latent

    def embed_mean(self, distribution: Tensor) -> Tensor:
        return distribution

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return 0.5 * (p - q).square().sum(-1)

    def entropy(self, distribution: Tensor) -> Tensor:
        return torch.full_like(distribution[..., 0], 0.5 * math.log(2 * math.pi * math.e) * self.config.size)

    def mixture(self, distributions: Tensor) -> Tensor:
        """With their mean alone: the variance of this family is 1."""
        return distributions.mean(0)


@dataclasses.dataclass(frozen=True)
class CategoricalConfig(Checked):
    """Categorical latents.

    Attributes:
        variables: per step.
        classes: per variable.
        stochastic: whether z_t is sampled. If not, it is the probabilities, which are more exact for numbers.
        unimix_ratio: weight of the uniform distribution.
    """

    kind: ClassVar[str] = "categorical"
    variables: Annotated[int, Bounds(1, 4096)] = 8
    classes: Annotated[int, Bounds(2, 4096)] = 8
    stochastic: bool = True
    unimix_ratio: Annotated[float, Bounds(0, 1, below=True)] = 0.01

    def build(self) -> Latent:
        return CategoricalLatent(self)


@dataclasses.dataclass(frozen=True)
class GaussianConfig(Checked):
    """Independent normal latents.

    Attributes:
        size: entries of z_t.
        stochastic: whether z_t is sampled, or the mean.
        min_std: smallest standard deviation.
    """

    kind: ClassVar[str] = "gaussian"
    size: Size = 32
    stochastic: bool = True
    min_std: Annotated[float, Bounds(0, 1000, above=True)] = 0.1

    def build(self) -> Latent:
        return GaussianLatent(self)


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig(Checked):
    """Latents that are learned by predicting them, by default without a decoder.

    A constant is the easiest to predict. One of ``sigreg``, ``variance`` with ``covariance``, and ``tau`` with a small
    ``target_gradient`` is to prevent that collapse; ``worldmodel.learning.latent_objective`` has the losses.

    Attributes:
        size: entries of z_t.
        sigreg: weight of the distance of random projections from a standard normal (LeJEPA, arXiv 2511.08544).
        variance: weight of deviations below 1 (VICReg, arXiv 2105.04906).
        covariance: weight of the squared covariance of two entries (VICReg).
        tau: Polyak rate of a slow encoder, whose latents are the targets (BYOL, arXiv 2006.07733); 0 for none.
        target_gradient: scale of the gradient into the targets; 0 stops it.
        rollout: steps of the predictions that go on from predictions.
        rollout_weight: of their error.
        inverse: weight of inverse dynamics, a_t from z_t and z_{t+1}; 0 for none.
        reconstruction: weight of a decoder's error; 0 for no decoder.
    """

    kind: ClassVar[str] = "embedding"
    stochastic: ClassVar[bool] = False
    size: Size = 32
    sigreg: Weight = 10.0
    variance: Weight = 0.0
    covariance: Weight = 0.0
    tau: Share = 0.0
    target_gradient: Share = 1.0
    rollout: Size = 8
    rollout_weight: Weight = 1.0
    inverse: Weight = 0.0
    reconstruction: Weight = 0.0

    def build(self) -> Latent:
        return EmbeddingLatent(self)


LatentConfig = CategoricalConfig | GaussianConfig | EmbeddingConfig
