"""Policies: distributions over actions, encoded by ``ActionSpec.encode``, (..., action width)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.model.networks import sample_index


class Policy:
    """A distribution over actions per state."""

    def sample(self) -> Tensor:
        """A differentiable sample."""
        raise NotImplementedError

    def log_probability(self, actions: Tensor) -> Tensor:
        """Log probability (density) of ``actions``, (...)."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """The mode."""
        raise NotImplementedError

    def entropy(self) -> Tensor:
        """Nats, (...)."""
        raise NotImplementedError


class DiscretePolicy(Policy):
    """Independent categoricals with unimix, one per entry of an action."""

    def __init__(self, logits: Tensor, sizes: tuple[int, ...], unimix_ratio: float) -> None:
        parts = logits.split(sizes, -1)
        self.probabilities = [part.softmax(-1) * (1 - unimix_ratio) + unimix_ratio / part.shape[-1] for part in parts]

    def sample(self) -> Tensor:
        """One-hot, concatenated; straight-through gradient."""
        hot = []
        for p in self.probabilities:
            hot.append(F.one_hot(sample_index(p), p.shape[-1]).to(p.dtype) + (p - p.detach()))
        return torch.cat(hot, -1)

    def log_probability(self, actions: Tensor) -> Tensor:
        """Summed over entries; ``actions`` one-hot, concatenated."""
        return (actions.detach() * torch.cat(self.probabilities, -1).log()).sum(-1)

    def mode(self) -> Tensor:
        """One-hot, concatenated."""
        return torch.cat([F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype) for p in self.probabilities], -1)

    def entropy(self) -> Tensor:
        """Summed over entries."""
        return sum((-(p * p.log()).sum(-1) for p in self.probabilities), torch.zeros(()))

    def probability_of(self, actions: Tensor) -> Tensor:
        """Probabilities (..., actions) of one-hot ``actions`` (actions, action width)."""
        product = torch.ones(())
        for p, hot in zip(
            self.probabilities, actions.split([p.shape[-1] for p in self.probabilities], -1), strict=True
        ):
            product = product * (p @ hot.t().to(p.dtype))
        return product


class ContinuousPolicy(Policy):
    """Independent normals, clipped to [-1, 1]; the gradient passes through the clip."""

    def __init__(self, outputs: Tensor, min_std: float, max_std: float) -> None:
        mean, spread = outputs.chunk(2, -1)
        self.mean = mean.tanh()
        self.std = min_std + (max_std - min_std) * (spread + 2).sigmoid()

    def sample(self) -> Tensor:
        """Reparametrised."""
        raw = self.mean + self.std * torch.randn_like(self.mean)
        return raw + (raw.clamp(-1, 1) - raw).detach()

    def log_probability(self, actions: Tensor) -> Tensor:
        """The density inside; at -1 and 1, the tail probability."""
        actions = actions.detach()
        distance = (actions - self.mean) / self.std
        inside = -0.5 * distance.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        beyond = torch.special.log_ndtr(torch.where(actions > 0, -distance, distance))
        return torch.where(actions.abs() < 1, inside, beyond).sum(-1)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def entropy(self) -> Tensor:
        """Of the unclipped densities."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
