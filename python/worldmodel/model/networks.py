"""What the five functions are built from: a perceptron with norms, and a head that predicts one number."""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): the identity near zero, a logarithm far from it."""
    return x.sign() * x.abs().log1p()


def draw_index(probabilities: Tensor) -> Tensor:
    """A class for each distribution (..., classes), (...): the first at which the sum passes a uniform number.

    NaN draws the first class, so that it shows in the loss and not as an error of a random generator.
    """
    total = probabilities.detach().cumsum(-1)
    point = torch.rand_like(total[..., :1]) * total[..., -1:]
    return (total <= point).sum(-1).clamp(max=probabilities.shape[-1] - 1)


def perceptron(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    """``layers`` times a projection to ``hidden``, layer norm and SiLU, and a projection to ``outputs``."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(inputs, hidden, bias=False), nn.LayerNorm(hidden), nn.SiLU()]
        inputs = hidden
    return nn.Sequential(*modules, nn.Linear(inputs, outputs))


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, share: float) -> None:
    """Moves the parameters of ``slow`` by ``share`` of the way to those of ``fast``, a module of the same kind."""
    for behind, ahead in zip(slow.parameters(), fast.parameters(), strict=True):
        behind.lerp_(ahead, share)


@dataclasses.dataclass(frozen=True)
class NumberConfig:
    """How a number is predicted.

    Attributes:
        kind: "mean", trained by the squared error, or "two_hot": a distribution over bins, trained by cross-entropy.
        bins: of "two_hot", spread evenly over the range of the targets seen so far.
    """

    kind: Literal["mean", "two_hot"] = "mean"
    bins: int = 41

    def __post_init__(self) -> None:
        if self.kind not in ("mean", "two_hot") or self.bins < 2:
            raise ValueError(
                f"NumberConfig: kind is {self.kind!r} and bins {self.bins}, expected 'mean' or 'two_hot' and at least 2"
            )


class NumberHead(nn.Module):
    """Reads one number off features. It says zero before training.

    ``low`` and ``high`` are buffers: the range of the targets seen, over which the bins of "two_hot" spread.
    """

    low: Tensor
    high: Tensor

    def __init__(self, inputs: int, config: NumberConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(inputs, 1 if config.kind == "mean" else config.bins)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.register_buffer("low", torch.tensor(-1.0))
        self.register_buffer("high", torch.tensor(1.0))

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) -> the outputs that ``mean`` and ``loss`` read: (..., 1) or logits (..., bins)."""
        return self.project(features)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expected number, (...)."""
        if self.config.kind == "mean":
            return outputs.squeeze(-1)
        return outputs.softmax(-1) @ self._centers().to(outputs.dtype)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The loss of each prediction, (...); ``target`` (...) has no gradient."""
        if self.config.kind == "mean":
            return (outputs.squeeze(-1) - target).square()
        place = (target - self.low) / (self.high - self.low) * (self.config.bins - 1)
        place = place.clamp(0, self.config.bins - 1)
        below = place.floor().long().clamp(max=self.config.bins - 2)
        above_share = place - below
        logs = F.log_softmax(outputs, -1)
        near = logs.gather(-1, torch.stack([below, below + 1], -1))  # (..., 2)
        return -(near[..., 0] * (1 - above_share) + near[..., 1] * above_share)

    @torch.no_grad()
    def widen(self, targets: Tensor) -> None:
        """Lets the range of the bins take in ``targets``."""
        if self.config.kind == "two_hot" and targets.numel():
            self.low.copy_(torch.fmin(self.low, targets.min()))
            self.high.copy_(torch.fmax(self.high, targets.max()))

    def _centers(self) -> Tensor:
        share = torch.linspace(0, 1, self.config.bins, device=self.low.device)
        return self.low + share * (self.high - self.low)
