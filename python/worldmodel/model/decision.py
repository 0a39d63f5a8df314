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
from worldmodel.model.policies import ContinuousPolicy, DiscretePolicy, Policy
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Layers, Size, Weight


@dataclasses.dataclass(frozen=True)
class DecisionConfig(Checked):
    """Decision.

    Attributes:
        hidden: layer width.
        layers: of the network.
        gradient: "all_action", "reinforce", "pathwise", or "auto": all_action up to ``max_enumerated_actions`` discrete
            actions, reinforce for more, pathwise for continuous ones.
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
        outputs = spec.width if spec.kind == "discrete" else 2 * spec.width
        self.network = mlp(features, config.hidden, config.layers, outputs)
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if self.gradient == "all_action" and not self.is_enumerable:
            count = math.prod(spec.sizes) if spec.kind == "discrete" else "continuous"
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
        if self.spec.kind == "continuous":
            return "pathwise"
        return "all_action" if self.is_enumerable else "reinforce"

    def forward(self, features: Tensor) -> Policy:
        outputs = self.network(features)
        if self.spec.kind == "discrete":
            return DiscretePolicy(outputs, self.spec.sizes, self.config.unimix_ratio)
        return ContinuousPolicy(outputs, self.config.min_std, self.config.max_std)

    def all_actions(self, like: Tensor) -> Tensor:
        """All discrete actions, (actions, action width), in dtype and device of ``like``."""
        choices = [torch.arange(size, device=like.device) for size in self.spec.sizes]
        table = torch.cartesian_prod(*choices).view(-1, len(choices))
        return self.spec.encode(table if self.spec.shape else table.squeeze(-1)).to(like.dtype)
