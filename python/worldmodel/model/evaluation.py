"""Evaluation, v_t = E(s_t) = E[r_t + γ E(s_{t+1})]: the critic."""

import copy
import dataclasses
from typing import Annotated

from torch import Tensor, nn

from wmkernels import linear_scan
from wmkernels.layers import run_network
from worldmodel.model.networks import ScalarConfig, ScalarHead, mlp, polyak_update
from worldmodel.runs.fields import Bounds, Checked, Layers, Share, Size


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Checked):
    """Evaluation.

    Attributes:
        hidden: layer width.
        layers: of the network.
        discount: γ, per step.
        lambda_: λ of the returns.
        value: prediction of the value.
        tau: Polyak rate of the target network.
    """

    hidden: Size = 128
    layers: Layers = 2
    discount: Share = 0.99
    lambda_: Share = 0.95
    value: ScalarConfig = dataclasses.field(default_factory=ScalarConfig)
    tau: Annotated[float, Bounds(0, 1, above=True)] = 0.02


class Evaluation(nn.Module):
    """Value network and target network."""

    def __init__(self, features: int, config: EvaluationConfig) -> None:
        super().__init__()
        self.config = config
        self.network = self._network(features)
        self.target = copy.deepcopy(self.network).requires_grad_(False)

    def _network(self, features: int) -> nn.Sequential:
        hidden = self.config.hidden
        trunk = mlp(features, hidden, self.config.layers, hidden)
        return nn.Sequential(trunk, nn.LayerNorm(hidden), nn.SiLU(), ScalarHead(hidden, self.config.value))

    @property
    def head(self) -> ScalarHead:
        head = self.network[-1]
        assert isinstance(head, ScalarHead)
        return head

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features)

    def value(self, features: Tensor, target: bool = False) -> Tensor:
        """v_t divided by the reward scale, (...)."""
        outputs = self.target(features) if target else self.network(features)
        return self.head.mean(outputs)

    def target_value_in_one_call(self, features: Tensor) -> Tensor:
        """``value`` of the target, up to rounding, of a chain of layers where it can run, without gradient."""
        trunk = self.target[:-1]
        assert isinstance(trunk, nn.Sequential)
        hidden = run_network(trunk, features)
        return self.head.mean(self.target(features) if hidden is None else self.target[-1](hidden))

    def update_target(self) -> None:
        polyak_update(self.target, self.network, self.config.tau)


def lambda_returns(rewards: Tensor, discounts: Tensor, next_values: Tensor, lambda_: float | Tensor) -> Tensor:
    """G_t = r_t + d_t ((1 - λ) v_{t+1} + λ G_{t+1}), with G = v_{t+1} after the last step.

    Sutton & Barto 2018, eq. 12.18. All are (batch, time); ``discounts`` d are γ times the continuation probability.
    λ may differ from step to step: with 0, G_{t+1} is another episode's.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 3)
        >>> lambda_returns(one, 0.5 * one, 2 * one, lambda_=1.0)
        tensor([[2., 2., 2.]])
    """
    tokens = rewards + (1 - lambda_) * discounts * next_values
    returns = linear_scan(lambda_ * discounts, tokens, next_values[:, -1], reverse=True)
    assert isinstance(returns, Tensor)
    return returns
