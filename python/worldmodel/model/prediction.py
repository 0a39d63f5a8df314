"""Prediction, s'_{t+1} = P(s_t, a_t): prior of the next latent, reward and continuation."""

import dataclasses

import torch
from torch import Tensor, nn

from wmkernels.layers import run_network
from worldmodel.data.actions import ActionSpec
from worldmodel.model.latents import Latent
from worldmodel.model.networks import ScalarConfig, ScalarHead, mlp
from worldmodel.runs.fields import Checked, Layers, Size


@dataclasses.dataclass(frozen=True)
class PredictionConfig(Checked):
    """Prediction.

    Attributes:
        hidden: layer width.
        layers: per network.
        action_gate: the action also scales what the networks read of the features, so that each action's reward and
            next latent have weights of their own from the start (``GatedLinear``).
        reward: prediction of the scaled reward.
    """

    hidden: Size = 128
    layers: Layers = 1
    action_gate: bool = False
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
        self.residual = latent.residual
        inputs = features + action_width + latent.width * latent.residual
        gate = range(features, features + action_width) if config.action_gate else None
        self.latent = mlp(inputs, config.hidden, config.layers, latent.outputs, gate)
        trunk = mlp(inputs, config.hidden, config.layers, config.hidden, gate)
        self.trunk = nn.Sequential(trunk, nn.LayerNorm(config.hidden), nn.SiLU())
        self.reward = ScalarHead(config.hidden, config.reward)
        self.continues = nn.Linear(config.hidden, 1)

    def forward(self, features: Tensor, action: Tensor, latent: Tensor | None = None) -> Predicted:
        """``features`` (..., features), ``action`` (..., action width); ``latent`` z_t of residual predictions."""
        return Predicted(self.prior(features, action, latent), *self.outcome(features, action, latent))

    def prior(self, features: Tensor, action: Tensor, latent: Tensor | None = None) -> Tensor:
        """``Predicted.prior``: all that the next step of imagination needs."""
        outputs = self.latent(self._inputs(features, action, latent))
        return self.distribution(outputs + latent if self.residual and latent is not None else outputs)

    def outcome(self, features: Tensor, action: Tensor, latent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``Predicted.reward`` and ``Predicted.continues``."""
        return self._heads(self.trunk(self._inputs(features, action, latent)))

    def outcome_in_one_call(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """``outcome``, up to rounding, of a chain of layers where it can run, for features without gradient."""
        inputs = self._inputs(features, action)
        outcome = run_network(self.trunk, inputs)
        return self._heads(self.trunk(inputs) if outcome is None else outcome)

    def _inputs(self, features: Tensor, action: Tensor, latent: Tensor | None = None) -> Tensor:
        given = [latent] if self.residual and latent is not None else []
        return torch.cat([features, action.to(features.dtype), *given], -1)

    def _heads(self, outcome: Tensor) -> tuple[Tensor, Tensor]:
        return self.reward(outcome), self.continues(outcome).squeeze(-1)

    def mean_reward(self, predicted: Predicted) -> Tensor:
        """Divided by the reward scale, (...)."""
        return self.reward.mean(predicted.reward)


class InverseDynamics(nn.Module):
    """a_t from z_t and z_{t+1}, so that latents keep what actions change (Pathak et al. 2017, arXiv 1705.05363)."""

    def __init__(self, width: int, action_spec: ActionSpec, config: PredictionConfig) -> None:
        super().__init__()
        self.sizes = action_spec.sizes
        self.network = mlp(2 * width, config.hidden, max(1, config.layers), action_spec.width)

    def loss(self, before: Tensor, after: Tensor, action: Tensor) -> Tensor:
        """Nats of the classes and squared error of the numbers of encoded actions, mean over both, (...).

        Args:
            before: z_t, (..., width).
            after: z_{t+1}.
            action: (..., action width).
        """
        outputs = self.network(torch.cat([before, after], -1))
        classes = sum(self.sizes)
        errors = [(outputs[..., classes:] - action[..., classes:]).square()]
        for scores, hot in zip(
            outputs[..., :classes].split(self.sizes, -1), action[..., :classes].split(self.sizes, -1), strict=True
        ):
            errors.append(-(hot * scores.log_softmax(-1)).sum(-1, keepdim=True))
        return torch.cat(errors, -1).mean(-1)
