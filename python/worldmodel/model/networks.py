"""MLP, scalar head, Polyak update."""

import dataclasses
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.runs.fields import Bounds, Checked


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def log_probability(probabilities: Tensor) -> Tensor:
    """The logarithm, finite at 0, where a softmax may underflow: 0 log 0 is 0, and so is its gradient's share."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def sample_index(probabilities: Tensor) -> Tensor:
    """Samples class indices by inverting the cumulative sum: (..., classes) -> (...).

    NaN gives class 0, so that it shows in the loss.
    """
    total = probabilities.detach().cumsum(-1)
    point = torch.rand_like(total[..., :1]) * total[..., -1:]
    return (total <= point).sum(-1).clamp(max=probabilities.shape[-1] - 1)


def mlp(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    """``layers`` times linear, layer norm and SiLU; then linear."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(inputs, hidden, bias=False), nn.LayerNorm(hidden), nn.SiLU()]
        inputs = hidden
    return nn.Sequential(*modules, nn.Linear(inputs, outputs))


class FirstBatchNorm(nn.Module):
    """Standardises by the moments of the first batch, and then for ever by the same ones (arXiv 1602.07868, sec. 3).

    What it standardises may so shrink later, which batch norm would hide.
    """

    mean: Tensor
    deviation: Tensor
    begun: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.register_buffer("begun", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return (x - self.mean) / self.deviation

    @torch.no_grad()
    def begin(self, mean: Tensor, variance: Tensor) -> None:
        """Takes the first batch's moments, (size,)."""
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(variance > 1e-12, variance, 1).sqrt())
        self.begun.fill_(1)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source."""
    for behind, ahead in zip(target.parameters(), source.parameters(), strict=True):
        behind.lerp_(ahead, tau)


@dataclasses.dataclass(frozen=True)
class ScalarConfig(Checked):
    """A scalar prediction.

    Attributes:
        kind: "mean" (squared error), or "two_hot": a distribution over bins (cross-entropy).
        bins: of "two_hot", evenly spaced over the support.
    """

    kind: Literal["mean", "two_hot"] = "mean"
    bins: Annotated[int, Bounds(2, 4096)] = 41


class ScalarHead(nn.Module):
    """Features -> a scalar; untrained, zero or the centre of the support.

    The support of "two_hot", ``v_min`` to ``v_max``, is [-1, 1], extended to the range of past targets.
    """

    v_min: Tensor
    v_max: Tensor

    def __init__(self, inputs: int, config: ScalarConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(inputs, 1 if config.kind == "mean" else config.bins)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.register_buffer("v_min", torch.tensor(-1.0))
        self.register_buffer("v_max", torch.tensor(1.0))

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) -> (..., 1), or logits (..., bins)."""
        return self.project(features)

    def mean(self, outputs: Tensor) -> Tensor:
        """``outputs`` of ``forward`` -> (...)."""
        if self.config.kind == "mean":
            return outputs.squeeze(-1)
        return outputs.softmax(-1) @ self._centers().to(outputs.dtype)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """``outputs`` of ``forward``, ``target`` (...) without gradient -> (...)."""
        if self.config.kind == "mean":
            return (outputs.squeeze(-1) - target).square()
        position = (target - self.v_min) / (self.v_max - self.v_min) * (self.config.bins - 1)
        position = position.clamp(0, self.config.bins - 1)
        below = position.floor().long().clamp(0, self.config.bins - 2)  # 0 for NaN, so that it shows in the loss
        weight_above = position - below
        logs = F.log_softmax(outputs, -1)
        near = logs.gather(-1, torch.stack([below, below + 1], -1))  # (..., 2)
        return -(near[..., 0] * (1 - weight_above) + near[..., 1] * weight_above)

    @torch.no_grad()
    def extend_support(self, low: Tensor, high: Tensor) -> None:
        """Extends the support to ``low`` and ``high``, both ()."""
        self.v_min.copy_(torch.minimum(self.v_min, low))
        self.v_max.copy_(torch.maximum(self.v_max, high))

    def _centers(self) -> Tensor:
        share = torch.linspace(0, 1, self.config.bins, device=self.v_min.device)
        return self.v_min + share * (self.v_max - self.v_min)
