"""Policies: distributions over encoded actions, (..., action width)."""

import math

import torch
from torch import Tensor

from worldmodel.model.networks import Generators, log_probability, normal, one_hot, sample_index


class Policy:
    """A distribution over actions per state."""

    def sample(self, generators: Generators = None) -> Tensor:
        """Differentiable; ``generators`` are one per row, or None for PyTorch's own."""
        raise NotImplementedError

    def log_probability(self, actions: Tensor) -> Tensor:
        """Log probability or density, (...)."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        raise NotImplementedError

    def entropy(self) -> Tensor:
        """Nats, (...)."""
        raise NotImplementedError


class DiscretePolicy(Policy):
    """Independent categoricals with unimix and straight-through gradient; actions are one-hot, concatenated.

    Classes outside ``mask``, bool (..., classes), have probability 0; a categorical without a legal class has them all.
    """

    def __init__(self, logits: Tensor, sizes: tuple[int, ...], unimix_ratio: float, mask: Tensor | None = None) -> None:
        parts = logits.split(sizes, -1)
        if mask is None:
            self.probabilities = [
                part.softmax(-1) * (1 - unimix_ratio) + unimix_ratio / part.shape[-1] for part in parts
            ]
        else:
            masks = with_a_legal_class(mask, sizes).split(sizes, -1)
            self.probabilities = [
                part.masked_fill(~legal, -torch.inf).softmax(-1) * (1 - unimix_ratio)
                + (unimix_ratio / legal.sum(-1, keepdim=True) * legal).to(part.dtype)
                for part, legal in zip(parts, masks, strict=True)
            ]

    def sample(self, generators: Generators = None) -> Tensor:
        return torch.cat([one_hot(sample_index(p, generators), p) for p in self.probabilities], -1)

    def log_probability(self, actions: Tensor) -> Tensor:
        """Finite even where the probability is 0."""
        return (actions.detach() * log_probability(torch.cat(self.probabilities, -1))).sum(-1)

    def mode(self) -> Tensor:
        return torch.cat([one_hot(p.argmax(-1), p.detach()) for p in self.probabilities], -1)

    def entropy(self) -> Tensor:
        return sum((-(p * log_probability(p)).sum(-1) for p in self.probabilities), torch.zeros(()))

    def probability_of(self, actions: Tensor) -> Tensor:
        """``actions`` (actions, action width) -> (..., actions)."""
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

    def sample(self, generators: Generators = None) -> Tensor:
        raw = self.mean + self.std * normal(self.mean, generators)
        return raw + (raw.clamp(-1, 1) - raw).detach()

    def log_probability(self, actions: Tensor) -> Tensor:
        """Density inside; tail probability at -1 and 1."""
        actions = actions.detach()
        distance = (actions - self.mean) / self.std
        inside = -0.5 * distance.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        beyond = torch.special.log_ndtr(torch.where(actions > 0, -distance, distance))
        return torch.where(actions.abs() < 1, inside, beyond).sum(-1)

    def mode(self) -> Tensor:
        return self.mean

    def entropy(self) -> Tensor:
        """Of the unclipped normals."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class MixedPolicy(Policy):
    """Independent class indices and numbers: their log probabilities and entropies add up."""

    def __init__(self, discrete: DiscretePolicy, continuous: ContinuousPolicy) -> None:
        self.discrete, self.continuous = discrete, continuous

    def sample(self, generators: Generators = None) -> Tensor:
        return torch.cat([self.discrete.sample(generators), self.continuous.sample(generators)], -1)

    def log_probability(self, actions: Tensor) -> Tensor:
        numbers = self.continuous.mean.shape[-1]
        hot, values = actions[..., :-numbers], actions[..., -numbers:]
        return self.discrete.log_probability(hot) + self.continuous.log_probability(values)

    def mode(self) -> Tensor:
        return torch.cat([self.discrete.mode(), self.continuous.mode()], -1)

    def entropy(self) -> Tensor:
        return self.discrete.entropy() + self.continuous.entropy()


def with_a_legal_class(mask: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``mask``, bool (..., classes), with all classes of an entry that has no legal one, as padding has."""
    return torch.cat([part | ~part.any(-1, keepdim=True) for part in mask.split(sizes, -1)], -1)


def predicted_mask(log_odds: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Classes that are as likely legal as not, and the likeliest of each entry, bool (..., classes)."""
    return torch.cat([part >= part.amax(-1, keepdim=True).clamp(max=0) for part in log_odds.split(sizes, -1)], -1)
