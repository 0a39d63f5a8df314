"""Prediction, s'_{t+1} = P(s_t, a_t): prior of the next latent, reward and continuation."""

import dataclasses

import torch
from torch import Tensor, nn

from wmkernels.layers import run_network
from worldmodel.model.latents import Latent
from worldmodel.model.networks import ScalarConfig, ScalarHead, mlp
from worldmodel.runs.fields import Checked, Layers, Size


@dataclasses.dataclass(frozen=True)
class PredictionConfig(Checked):
    """Prediction.

    Attributes:
        hidden: layer width.
        layers: per network.
        reward: prediction of the scaled reward.
    """

    hidden: Size = 128
    layers: Layers = 1
    reward: ScalarConfig = dataclasses.field(default_factory=ScalarConfig)


@dataclasses.dataclass
class Predicted:
    """Predictions from (s_t, a_t).

    Attributes:
        prior: of z_{t+1}, (..., *parameter shape).
        reward: outputs of the reward head.
        continues: continuation logit, (...).
    """

    prior: Tensor
    reward: Tensor
    continues: Tensor


class Prediction(nn.Module):
    """Two networks on s_t and a_t."""

    def __init__(self, features: int, action_width: int, latent: Latent, config: PredictionConfig) -> None:
        super().__init__()
        self.distribution = latent.distribution
        inputs = features + action_width
        self.latent = mlp(inputs, config.hidden, config.layers, latent.outputs)
        trunk = mlp(inputs, config.hidden, config.layers, config.hidden)
        self.trunk = nn.Sequential(trunk, nn.LayerNorm(config.hidden), nn.SiLU())
        self.reward = ScalarHead(config.hidden, config.reward)
        self.continues = nn.Linear(config.hidden, 1)

    def forward(self, features: Tensor, action: Tensor) -> Predicted:
        """``features`` (..., features), ``action`` (..., action width)."""
        return Predicted(self.prior(features, action), *self.outcome(features, action))

    def prior(self, features: Tensor, action: Tensor) -> Tensor:
        """``Predicted.prior``: all that the next step of imagination needs."""
        return self.distribution(self.latent(_joined(features, action)))

    def outcome(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """``Predicted.reward`` and ``Predicted.continues``."""
        return self._heads(self.trunk(_joined(features, action)))

    def outcome_in_one_call(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """``outcome``, up to rounding, of a chain of layers where it can run, for features without gradient."""
        inputs = _joined(features, action)
        outcome = run_network(self.trunk, inputs)
        return self._heads(self.trunk(inputs) if outcome is None else outcome)

    def _heads(self, outcome: Tensor) -> tuple[Tensor, Tensor]:
        return self.reward(outcome), self.continues(outcome).squeeze(-1)

    def mean_reward(self, predicted: Predicted) -> Tensor:
        """Divided by the reward scale, (...)."""
        return self.reward.mean(predicted.reward)


def _joined(features: Tensor, action: Tensor) -> Tensor:
    return torch.cat([features, action.to(features.dtype)], -1)
