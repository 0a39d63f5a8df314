"""Densities of actions given features: an autoregressive mixture of normals, and the mean alone.

p(a | f) = Π_d Σ_k w_dk N(a_d; m_dk, s_dk²), where w, m and s of entry d are of f and a_1 to a_{d-1}: mixture density
networks (Bishop 1994) put one after another, as in NADE (Larochelle & Murray 2011, Uria et al. 2016, arXiv 1605.02226).
"""

import dataclasses
import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.model.networks import mlp, normal, sample_index
from worldmodel.runs.fields import Bounds, Checked, Size


@dataclasses.dataclass(frozen=True)
class MixtureDensityConfig(Checked):
    """An autoregressive mixture.

    Attributes:
        components: normals per entry.
        hidden: width of the hidden layer of an entry.
        min_std: least standard deviation: what is exact in the data has an unbounded density otherwise.
    """

    kind: ClassVar[str] = "mixture"
    components: Size = 6
    hidden: Size = 64
    min_std: Annotated[float, Bounds(0, 1000, above=True)] = 0.05

    def build(self, inputs: int, entries: int) -> "MixtureDensity":
        return MixtureDensity(inputs, entries, self)


@dataclasses.dataclass(frozen=True)
class MeanConfig(Checked):
    """The mean, by squared error: a normal of variance 1 per entry.

    Attributes:
        hidden: width of the hidden layer.
    """

    kind: ClassVar[str] = "mean"
    hidden: Size = 256

    def build(self, inputs: int, entries: int) -> "Mean":
        return Mean(inputs, entries, self)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Mixtures of normals, (..., components).

    Attributes:
        log_weight: sums to 1 as probabilities.
        mean: of each.
        std: of each.
    """

    log_weight: Tensor
    mean: Tensor
    std: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Nats of ``x`` (...)."""
        distance = (x[..., None] - self.mean) / self.std
        logs = self.log_weight - 0.5 * distance.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return logs.logsumexp(-1)

    def sample(self, temperature: float = 1.0) -> Tensor:
        """(...): a component by its weight, and its mean with ``temperature`` times its deviation."""
        index = sample_index(self.log_weight.exp())[..., None]
        mean, std = self.mean.gather(-1, index)[..., 0], self.std.gather(-1, index)[..., 0]
        return mean + temperature * std * normal(std) if temperature else mean


class MixtureDensity(nn.Module):
    """p(a | f), one entry of a after another.

    Args:
        inputs: features.
        entries: of an action.
        config: of the mixture.

    Example:
        >>> density = MixtureDensity(16, 4, MixtureDensityConfig(components=3))
        >>> features = torch.randn(5, 16)
        >>> actions = density.sample(features)
        >>> actions.shape, density.log_prob(features, actions).shape
        (torch.Size([5, 4]), torch.Size([5]))
    """

    earlier: Tensor

    def __init__(self, inputs: int, entries: int, config: MixtureDensityConfig) -> None:
        super().__init__()
        self.entries, self.config = entries, config
        self.context = nn.Linear(inputs, entries * config.hidden)
        # What each entry (first) hears of each one (second), of which those before it count.
        self.previous = nn.Parameter(torch.randn(entries, entries, config.hidden) / entries**0.5)
        self.register_buffer("earlier", torch.ones(entries, entries).tril(-1)[..., None], persistent=False)
        self.weight = nn.Parameter(torch.randn(entries, config.hidden, 3 * config.components) / config.hidden**0.5)
        start = torch.zeros(3, config.components)
        start[1], start[2] = torch.linspace(-1, 1, config.components), -1.0
        self.bias = nn.Parameter(start.flatten().repeat(entries, 1))

    def forward(self, features: Tensor, actions: Tensor) -> Mixture:
        """Features (..., inputs) and actions (..., entries) -> mixtures (..., entries, components)."""
        context = self.context(features).unflatten(-1, (self.entries, -1))
        heard = torch.einsum("...j,djh->...dh", actions, self.previous * self.earlier)
        return self._mixture(torch.einsum("...dh,dho->...do", F.silu(context + heard), self.weight) + self.bias)

    def log_prob(self, features: Tensor, actions: Tensor) -> Tensor:
        """Nats of actions (..., entries) -> (...)."""
        return self(features, actions).log_prob(actions).sum(-1)

    def loss(self, features: Tensor, actions: Tensor) -> Tensor:
        """Nats that the actions (..., entries) cost, (...)."""
        return -self.log_prob(features, actions)

    def sample(self, features: Tensor, temperature: float = 1.0) -> Tensor:
        """Actions (..., entries); at ``temperature`` 0 each entry is the mean of a component."""
        context = self.context(features).unflatten(-1, (self.entries, -1))
        drawn: list[Tensor] = []
        for entry in range(self.entries):
            hidden = context[..., entry, :]
            if drawn:
                hidden = hidden + torch.stack(drawn, -1) @ self.previous[entry, :entry]
            outputs = F.silu(hidden) @ self.weight[entry] + self.bias[entry]
            drawn.append(self._mixture(outputs).sample(temperature))
        return torch.stack(drawn, -1)

    def _mixture(self, outputs: Tensor) -> Mixture:
        weight, mean, std = outputs.unflatten(-1, (3, -1)).unbind(-2)
        return Mixture(weight.log_softmax(-1), mean, self.config.min_std + F.softplus(std))


class Mean(nn.Module):
    """The mean of actions, with the methods of ``MixtureDensity``."""

    def __init__(self, inputs: int, entries: int, config: MeanConfig) -> None:
        super().__init__()
        self.layers = mlp(inputs, config.hidden, 1, entries)

    def loss(self, features: Tensor, actions: Tensor) -> Tensor:
        """Half the squared error of actions (..., entries), (...)."""
        return 0.5 * (self.layers(features) - actions).square().sum(-1)

    def sample(self, features: Tensor, temperature: float = 1.0) -> Tensor:
        """Actions (..., entries): the mean, whatever ``temperature``."""
        return self.layers(features)
