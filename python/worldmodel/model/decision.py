"""Decision, π(s) = argmax_a Q(s, a): a policy for acting, learned in imagination, and the look-ahead on Q itself.

A policy is a distribution over actions: softmaxes for discrete actions, normal densities clipped to [-1, 1] for
continuous ones. It is improved in one of three ways, each of them open to either kind where it makes sense:

    exact        the sum over all actions of π(a|s) Q(s, a), every action tried in imagination; few discrete actions
    reinforce    log π(a|s) times the advantage of the imagined return (Williams 1992)
    dynamics     the imagined return itself, through the differentiable dynamics; discrete actions straight through
"""

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.data.spaces import ActionSpec
from worldmodel.model.networks import draw_index, perceptron


@dataclasses.dataclass(frozen=True)
class DecisionConfig:
    """Decision.

    Attributes:
        hidden: width of the layers.
        layers: of the network.
        improve: "exact", "reinforce", "dynamics", or "auto": exact for few discrete actions, reinforce for many,
            dynamics for continuous ones.
        few: actions that are few.
        entropy: weight of the policy's entropy beside returns of scale one.
        uniform: share of the uniform distribution in the probabilities of discrete actions.
        min_std: smallest standard deviation of a continuous action.
        max_std: largest.
        greedy: how ``act(greedy=True)`` chooses: "look_ahead" takes the best Q = r + γ v' over all actions where they
            are few, "policy" the likeliest action.
    """

    hidden: int = 128
    layers: int = 2
    improve: Literal["auto", "exact", "reinforce", "dynamics"] = "auto"
    few: int = 16
    entropy: float = 0.03
    uniform: float = 0.01
    min_std: float = 0.1
    max_std: float = 1.0
    greedy: Literal["look_ahead", "policy"] = "look_ahead"

    def __post_init__(self) -> None:
        if self.improve not in ("auto", "exact", "reinforce", "dynamics"):
            raise ValueError(
                f"DecisionConfig: improve is {self.improve!r}, expected 'auto', 'exact', 'reinforce' or 'dynamics'"
            )
        if self.greedy not in ("look_ahead", "policy"):
            raise ValueError(f"DecisionConfig: greedy is {self.greedy!r}, expected 'look_ahead' or 'policy'")
        if not 0 < self.min_std <= self.max_std:
            raise ValueError(
                f"DecisionConfig: min_std is {self.min_std} and max_std {self.max_std}, expected 0 < min_std <= max_std"
            )


class Policy:
    """A distribution over actions in every state. Actions are in the networks' form, (..., action width)."""

    def sample(self) -> Tensor:
        """An action, with a gradient through it."""
        raise NotImplementedError

    def log_probability(self, actions: Tensor) -> Tensor:
        """The logarithm of the probability (density) of ``actions``, (...)."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """The likeliest action."""
        raise NotImplementedError

    def entropy(self) -> Tensor:
        """Nats, (...)."""
        raise NotImplementedError


class DiscretePolicy(Policy):
    """Independent softmaxes, one for each entry of an action."""

    def __init__(self, logits: Tensor, sizes: tuple[int, ...], uniform: float) -> None:
        parts = logits.split(sizes, -1)
        self.probabilities = [part.softmax(-1) * (1 - uniform) + uniform / part.shape[-1] for part in parts]

    def sample(self) -> Tensor:
        """One-hot and joined; the gradient is that of the probabilities."""
        hot = []
        for p in self.probabilities:
            hot.append(F.one_hot(draw_index(p), p.shape[-1]).to(p.dtype) + (p - p.detach()))
        return torch.cat(hot, -1)

    def log_probability(self, actions: Tensor) -> Tensor:
        """The sum over entries; ``actions`` one-hot and joined."""
        return (actions.detach() * torch.cat(self.probabilities, -1).log()).sum(-1)

    def mode(self) -> Tensor:
        """One-hot and joined."""
        return torch.cat([F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype) for p in self.probabilities], -1)

    def entropy(self) -> Tensor:
        """The sum over entries."""
        return sum((-(p * p.log()).sum(-1) for p in self.probabilities), torch.zeros(()))

    def of_all(self, actions: Tensor) -> Tensor:
        """Probabilities (..., actions) of ``actions`` (actions, action width), one-hot and joined."""
        product = torch.ones(())
        for p, hot in zip(
            self.probabilities, actions.split([p.shape[-1] for p in self.probabilities], -1), strict=True
        ):
            product = product * (p @ hot.t().to(p.dtype))
        return product


class ContinuousPolicy(Policy):
    """Independent normal densities, clipped to [-1, 1]; outside the gradient passes through the clip."""

    def __init__(self, outputs: Tensor, min_std: float, max_std: float) -> None:
        mean, spread = outputs.chunk(2, -1)
        self.mean = mean.tanh()
        self.std = min_std + (max_std - min_std) * (spread + 2).sigmoid()

    def sample(self) -> Tensor:
        """Reparametrised."""
        raw = self.mean + self.std * torch.randn_like(self.mean)
        return raw + (raw.clamp(-1, 1) - raw).detach()

    def log_probability(self, actions: Tensor) -> Tensor:
        """The density inside; at -1 and 1, where the clip gathers it, the probability of all that lies beyond."""
        actions = actions.detach()
        distance = (actions - self.mean) / self.std
        inside = -0.5 * distance.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        beyond = torch.special.log_ndtr(torch.where(actions > 0, -distance, distance))
        return torch.where(actions.abs() < 1, inside, beyond).sum(-1)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def entropy(self) -> Tensor:
        """Of the densities before the clip."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class Decision(nn.Module):
    """The policy's network."""

    def __init__(self, features: int, spec: ActionSpec, config: DecisionConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        outputs = spec.width if spec.kind == "discrete" else 2 * spec.width
        self.network = perceptron(features, config.hidden, config.layers, outputs)
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if self.improve == "exact" and not self.is_few:
            count = math.prod(spec.sizes) if spec.kind == "discrete" else "continuous"
            raise ValueError(
                f"DecisionConfig: improve is 'exact' for {count} actions, expected at most few={config.few} of them"
            )

    @property
    def is_few(self) -> bool:
        """Whether all actions can be tried."""
        return self.spec.kind == "discrete" and math.prod(self.spec.sizes) <= self.config.few

    @property
    def improve(self) -> str:
        """How the policy is improved, "auto" resolved."""
        if self.config.improve != "auto":
            return self.config.improve
        if self.spec.kind == "continuous":
            return "dynamics"
        return "exact" if self.is_few else "reinforce"

    def forward(self, features: Tensor) -> Policy:
        """(..., features) -> the distribution over actions there."""
        outputs = self.network(features)
        if self.spec.kind == "discrete":
            return DiscretePolicy(outputs, self.spec.sizes, self.config.uniform)
        return ContinuousPolicy(outputs, self.config.min_std, self.config.max_std)

    def all_actions(self, like: Tensor) -> Tensor:
        """Every discrete action, (actions, action width), on the device and in the dtype of ``like``."""
        choices = [torch.arange(size, device=like.device) for size in self.spec.sizes]
        table = torch.cartesian_prod(*choices).view(-1, len(choices))
        return self.spec.encode(table if self.spec.shape else table.squeeze(-1)).to(like.dtype)
