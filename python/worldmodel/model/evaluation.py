"""Evaluation, v_t = E(s_t) = E[r_t + γ E(s_{t+1})]: what is to come, discounted."""

import copy
import dataclasses

from torch import Tensor, nn

from wmkernels import linear_scan
from worldmodel.model.networks import NumberConfig, NumberHead, follow, perceptron


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation.

    Attributes:
        hidden: width of the layers.
        layers: of the network.
        discount: γ, by which what comes a step later counts less.
        trace: λ of the returns: 0 trusts the next value, 1 only the last one.
        value: how the value is predicted.
        slow: share of the network that the slow target takes in at every update.
    """

    hidden: int = 128
    layers: int = 2
    discount: float = 0.99
    trace: float = 0.95
    value: NumberConfig = dataclasses.field(default_factory=NumberConfig)
    slow: float = 0.02

    def __post_init__(self) -> None:
        if not (0 <= self.discount <= 1 and 0 <= self.trace <= 1 and 0 < self.slow <= 1):
            raise ValueError(
                f"EvaluationConfig: discount is {self.discount}, trace {self.trace} and slow {self.slow}, expected "
                "shares between 0 and 1"
            )


class Evaluation(nn.Module):
    """A network for v_t, and a slow copy of it that makes the targets."""

    def __init__(self, features: int, config: EvaluationConfig) -> None:
        super().__init__()
        self.config = config
        self.network = self._network(features)
        self.slow = copy.deepcopy(self.network).requires_grad_(False)

    def _network(self, features: int) -> nn.Sequential:
        hidden = self.config.hidden
        trunk = perceptron(features, hidden, self.config.layers, hidden)
        return nn.Sequential(trunk, nn.LayerNorm(hidden), nn.SiLU(), NumberHead(hidden, self.config.value))

    @property
    def head(self) -> NumberHead:
        """What reads outputs of ``forward``."""
        head = self.network[-1]
        assert isinstance(head, NumberHead)
        return head

    def forward(self, features: Tensor) -> Tensor:
        """(..., features) -> outputs of the head."""
        return self.network(features)

    def value(self, features: Tensor, slow: bool = False) -> Tensor:
        """v_t in units of the running scale of rewards, (...)."""
        outputs = self.slow(features) if slow else self.network(features)
        return self.head.mean(outputs)

    def follow(self) -> None:
        """Moves the slow target a little towards the network."""
        follow(self.slow, self.network, self.config.slow)


def lambda_returns(rewards: Tensor, discounts: Tensor, next_values: Tensor, trace: float) -> Tensor:
    """G_t = r_t + d_t ((1 - λ) v_{t+1} + λ G_{t+1}), and G_{t+1} = v_{t+1} behind the last step.

    One linear scan in reverse (Sutton & Barto 2018, equation 12.18).

    Args:
        rewards: (batch, time).
        discounts: (batch, time), γ times the probability that the episode goes on.
        next_values: v_{t+1}, (batch, time).
        trace: λ.

    Returns:
        (batch, time).

    Example:
        >>> import torch
        >>> one = torch.ones(1, 3)
        >>> lambda_returns(one, 0.5 * one, 2 * one, trace=1.0)
        tensor([[2., 2., 2.]])
    """
    tokens = rewards + (1 - trace) * discounts * next_values
    returns = linear_scan(trace * discounts, tokens, next_values[:, -1], reverse=True)
    assert isinstance(returns, Tensor)
    return returns
