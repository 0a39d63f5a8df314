"""Exploration: a reward for steps that would tell something about the world (Sekar et al. 2020, arXiv 2005.05960).

Several networks learn to predict the next latent from the same (s_t, a_t). What is known they predict alike; where they
differ, the observation would say which of them is right. That information, in nats, is an imagined step's bonus.
"""

import dataclasses
import itertools
import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.model.latents import Latent
from worldmodel.runs.fields import Bounds, Checked, Layers, Size, Weight


@dataclasses.dataclass(frozen=True)
class ExplorationConfig(Checked):
    """Exploration.

    Attributes:
        bonus: reward per nat, in units of the reward scale, beside the environment's; 0 for no exploration.
        networks: how many predict the next latent.
        hidden: layer width.
        layers: of each network.
    """

    bonus: Weight = 0.0
    networks: Annotated[int, Bounds(2, 64)] = 5
    hidden: Size = 64
    layers: Layers = 1


class Exploration(nn.Module):
    """Networks that predict the next latent; nothing else is trained through them."""

    def __init__(self, features: int, action_width: int, latent: Latent, config: ExplorationConfig) -> None:
        super().__init__()
        self.config = config
        self._latent = latent
        widths = [features + action_width, *[config.hidden] * config.layers, latent.outputs]
        self.layers = nn.ModuleList(
            ParallelLinear(config.networks, inputs, outputs) for inputs, outputs in itertools.pairwise(widths)
        )

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """(..., features), (..., action width) -> distributions of z_{t+1}, (networks, ..., *parameter shape)."""
        inputs = torch.cat([features, action.to(features.dtype)], -1)
        lead, x = inputs.shape[:-1], inputs.flatten(0, -2).expand(self.config.networks, -1, -1)
        for index, layer in enumerate(self.layers):
            x = layer(F.silu(F.layer_norm(x, x.shape[-1:])) if index else x)
        return self._latent.distribution(x.unflatten(1, lead))

    def loss(self, features: Tensor, action: Tensor, posterior: Tensor) -> Tensor:
        """KL of the next ``posterior`` from each network's distribution, their mean, (...), in nats."""
        distributions = self(features.detach(), action)
        return self._latent.kl(posterior.detach().expand_as(distributions), distributions).mean(0)

    def information(self, features: Tensor, action: Tensor) -> Tensor:
        """The mutual information of each variable of z_{t+1} and of which network is right, summed, (...), in nats.

        Never negative; of one variable at most ln(networks). The sum is an upper bound of the information in all
        variables together, which would no longer tell a little that is new from a lot. For normal latents, each is that
        of a normal with the moments of the mixture, an upper bound as well.
        """
        distributions = self(features, action)
        mixture = self._latent.entropy(self._latent.mixture(distributions))
        return (mixture - self._latent.entropy(distributions).mean(0)).clamp(min=0)

    def bonus(self, features: Tensor, action: Tensor) -> Tensor:
        """Reward divided by the reward scale, (...)."""
        return self.config.bonus * self.information(features, action)


class ParallelLinear(nn.Module):
    """``nn.Linear`` of several networks at once: (networks, rows, inputs) -> (networks, rows, outputs)."""

    def __init__(self, networks: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(networks, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(networks, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)
