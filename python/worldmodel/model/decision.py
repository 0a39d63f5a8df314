"""Decision, π(s) = argmax_a Q(s, a): the actor, trained in imagination.

Gradients:

    all_action   sum over actions of π(a|s) Q(s, a)
    reinforce    log π(a|s) times the advantage of the imagined return (Williams 1992)
    pathwise     the imagined return through the dynamics; straight-through for discrete actions
"""

import dataclasses
import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from worldmodel.data.spaces import ActionSpec
from worldmodel.model.networks import mlp
from worldmodel.model.policies import ContinuousPolicy, DiscretePolicy, MixedPolicy, Policy, with_a_legal_class
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Layers, Size, Weight


@dataclasses.dataclass(frozen=True)
class DecisionConfig(Checked):
    """Decision.

    Attributes:
        hidden: layer width.
        layers: of the network.
        gradient: "all_action", "reinforce", "pathwise", or "auto": all_action up to ``max_enumerated_actions`` discrete
            actions, reinforce for more, pathwise for continuous and mixed ones.
        max_enumerated_actions: most discrete actions to enumerate.
        entropy: weight of the policy's entropy beside normalised returns.
        unimix_ratio: weight of the uniform distribution for discrete actions.
        min_std: smallest standard deviation of continuous actions.
        max_std: largest.
        greedy: "policy" takes the mode; "one_step_planning" maximises Q = r + γ v', or takes the mode if actions
            are not enumerable.
    """

    hidden: Size = 128
    layers: Layers = 2
    gradient: Literal["auto", "all_action", "reinforce", "pathwise"] = "auto"
    max_enumerated_actions: Size = 16
    entropy: Weight = 0.03
    unimix_ratio: Annotated[float, Bounds(0, 1, below=True)] = 0.01
    min_std: Annotated[float, Bounds(0, 1000, above=True)] = 0.1
    max_std: Annotated[float, Bounds(0, 1000, above=True)] = 1.0
    greedy: Literal["one_step_planning", "policy"] = "one_step_planning"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_std > self.max_std:
            raise ConfigurationError(
                f"DecisionConfig: min_std is {self.min_std} and max_std {self.max_std}, expected min_std <= max_std"
            )


class Decision(nn.Module):
    """The actor. Raises ConfigurationError for "all_action" without enumerable actions."""

    def __init__(self, features: int, spec: ActionSpec, config: DecisionConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        outputs = spec.classes + 2 * len(spec.low)
        self.network = mlp(features, config.hidden, config.layers, outputs)
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if self.gradient == "all_action" and not self.is_enumerable:
            count = math.prod(spec.sizes) if spec.kind == "discrete" else spec.kind
            raise ConfigurationError(
                f"DecisionConfig: gradient is 'all_action' for {count} actions, expected at most "
                f"max_enumerated_actions={config.max_enumerated_actions} of them"
            )

    @property
    def is_enumerable(self) -> bool:
        return self.spec.kind == "discrete" and math.prod(self.spec.sizes) <= self.config.max_enumerated_actions

    @property
    def gradient(self) -> str:
        if self.config.gradient != "auto":
            return self.config.gradient
        if self.spec.kind != "discrete":
            return "pathwise"
        return "all_action" if self.is_enumerable else "reinforce"

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Policy:
        """The policy in (..., features), of the legal classes in ``mask``, bool (..., classes), if it is given."""
        outputs = self.network(features)
        spec, config = self.spec, self.config
        if spec.kind == "continuous":
            return ContinuousPolicy(outputs, config.min_std, config.max_std)
        discrete = DiscretePolicy(outputs[..., : spec.classes], spec.sizes, config.unimix_ratio, mask)
        if spec.kind == "discrete":
            return discrete
        return MixedPolicy(discrete, ContinuousPolicy(outputs[..., spec.classes :], config.min_std, config.max_std))

    def all_actions(self, like: Tensor) -> Tensor:
        """All discrete actions, (actions, action width), in dtype and device of ``like``."""
        choices = [torch.arange(size, device=like.device) for size in self.spec.sizes]
        table = torch.cartesian_prod(*choices).view(-1, len(choices))
        return self.spec.encode(table if self.spec.shape else table.squeeze(-1)).to(like.dtype)

    def legal_actions(self, mask: Tensor) -> Tensor:
        """Which of ``all_actions`` have legal classes alone, bool (..., actions), by ``mask``, bool (..., classes)."""
        illegal = ~with_a_legal_class(mask, self.spec.sizes)
        actions = self.all_actions(torch.zeros((), device=mask.device))
        return illegal.to(actions.dtype) @ actions.t() == 0
