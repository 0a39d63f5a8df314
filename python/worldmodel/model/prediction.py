"""Prediction, s'_{t+1} = P(s_t, a_t): the next latent, the reward and whether the episode goes on.

It predicts states and not pixels. All of it is read from (s_t, a_t), before the action enters memory.
"""

import dataclasses

import torch
from torch import Tensor, nn

from worldmodel.model.networks import NumberConfig, NumberHead, perceptron


@dataclasses.dataclass(frozen=True)
class PredictionConfig:
    """Prediction.

    Attributes:
        hidden: width of the layers.
        layers: of each of the two networks, one for the latent and one for reward and continuation.
        reward: how the reward is predicted; targets are divided by the running scale of rewards.
    """

    hidden: int = 128
    layers: int = 1
    reward: NumberConfig = dataclasses.field(default_factory=NumberConfig)


@dataclasses.dataclass
class Predicted:
    """What follows (s_t, a_t).

    Attributes:
        logits: of the next latent, (..., variables, classes).
        reward: outputs of the reward head; ``Prediction.mean_reward`` reads the number.
        continues: logit of the episode going on, (...).
    """

    logits: Tensor
    reward: Tensor
    continues: Tensor


class Prediction(nn.Module):
    """Two perceptrons on (s_t, a_t), the action encoded as ``ActionSpec.encode`` does."""

    def __init__(
        self, features: int, action_width: int, variables: int, classes: int, config: PredictionConfig
    ) -> None:
        super().__init__()
        self.shape = (variables, classes)
        inputs = features + action_width
        self.latent = perceptron(inputs, config.hidden, config.layers, variables * classes)
        trunk = perceptron(inputs, config.hidden, config.layers, config.hidden)
        self.trunk = nn.Sequential(trunk, nn.LayerNorm(config.hidden), nn.SiLU())
        self.reward = NumberHead(config.hidden, config.reward)
        self.continues = nn.Linear(config.hidden, 1)

    def forward(self, features: Tensor, action: Tensor) -> Predicted:
        """``features`` (..., features), ``action`` (..., action width)."""
        inputs = torch.cat([features, action.to(features.dtype)], -1)
        outcome = self.trunk(inputs)
        logits = self.latent(inputs).unflatten(-1, self.shape)
        return Predicted(logits, self.reward(outcome), self.continues(outcome).squeeze(-1))

    def mean_reward(self, predicted: Predicted) -> Tensor:
        """The expected reward in units of the running scale, (...)."""
        return self.reward.mean(predicted.reward)
