"""MLP, linear layer with a gate, scalar head, Polyak update."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.layers import LayerChain
from worldmodel.runs.fields import Bounds, Checked

# One per row, on the CPU, so that a row is drawn alike beside any others; None for PyTorch's own.
Generators = Sequence[torch.Generator] | None
_SUPPORT = 10.0  # of "two_hot", in symlog and in units of the reward scale


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Inverse of ``symlog``: sign(x) (exp(|x|) - 1)."""
    return x.sign() * x.abs().expm1()


def log_probability(probabilities: Tensor) -> Tensor:
    """The logarithm, finite at 0, where a softmax may underflow: 0 log 0 is 0, and so is its gradient's share."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def sample_index(probabilities: Tensor, generators: Generators = None) -> Tensor:
    """Samples class indices by inverting the cumulative sum: (..., classes) -> (...).

    NaN gives class 0, so that it shows in the loss.
    """
    total = probabilities.detach().cumsum(-1)
    point = uniform(total[..., :1], generators) * total[..., -1:]
    return (total <= point).sum(-1).clamp(max=probabilities.shape[-1] - 1)


def one_hot(index: Tensor, probabilities: Tensor) -> Tensor:
    """Indices (...) as one-hot, (..., classes), with the gradient of ``probabilities`` (..., classes)."""
    hot = torch.zeros_like(probabilities).scatter_(-1, index[..., None], 1)
    if not (torch.is_grad_enabled() and probabilities.requires_grad):
        return hot
    return hot + (probabilities - probabilities.detach())


def uniform(like: Tensor, generators: Generators = None) -> Tensor:
    """Random numbers from 0 to 1 in shape, dtype and device of ``like``."""
    return _drawn(torch.rand, like, generators)


def normal(like: Tensor, generators: Generators = None) -> Tensor:
    """Random numbers of mean 0 and variance 1 in shape, dtype and device of ``like``."""
    return _drawn(torch.randn, like, generators)


def _drawn(draw: Callable[..., Tensor], like: Tensor, generators: Generators) -> Tensor:
    if generators is None:
        return draw(like.shape, dtype=like.dtype, device=like.device)
    rows = [draw(like.shape[1:], dtype=like.dtype, generator=generator) for generator in generators]
    return torch.stack(rows).to(like.device)


def mlp(inputs: int, hidden: int, layers: int, outputs: int, gate: range | None = None) -> nn.Sequential:
    """``layers`` times linear, layer norm and SiLU; then linear. The first is a ``GatedLinear`` with ``gate``."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(inputs, hidden, bias=False), nn.LayerNorm(hidden), nn.SiLU()]
        inputs = hidden
    modules.append(nn.Linear(inputs, outputs))
    if gate is not None:
        modules[0] = GatedLinear(cast(nn.Linear, modules[0]), gate)
    return nn.Sequential(*modules)


class GatedLinear(nn.Module):
    """W x (1 + G x_gate): some inputs scale what the others say (Perez et al. 2018, arXiv 1709.07871).

    What follows a sum of two inputs' parts must first learn that they interact; here each of the gate's inputs reads
    the others by weights of its own.
    """

    def __init__(self, linear: nn.Linear, gate: range) -> None:
        """``gate``: the inputs that scale."""
        super().__init__()
        self.linear = linear
        self.inputs = slice(gate.start, gate.stop)
        self.gate = nn.Linear(len(gate), linear.out_features)
        nn.init.normal_(self.gate.weight)
        nn.init.ones_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.linear(x) * self.gate(x[..., self.inputs])

    def add_to(self, chain: LayerChain, source: int) -> tuple[int, int]:
        """Of ``wmkernels.layers.Chainable``."""
        size = self.linear.out_features
        outputs, gates = chain.columns(size), chain.columns(size)
        chain.linear(self.linear, source, outputs)
        chain.linear(self.gate, source + self.inputs.start, gates)
        chain.multiply(gates, outputs, size)
        return outputs, size


class FirstBatchNorm(nn.Module):
    """Standardises by the moments of the first batch, and then for ever by the same ones (arXiv 1602.07868, sec. 3).

    What it standardises may so shrink later, which batch norm would hide. Of a picture's pixels, channels last, all of
    one of ``channels`` have one deviation: those that seldom change must not count more, but what is small in one
    channel not less than what is large in another.
    """

    mean: Tensor
    deviation: Tensor
    begun: Tensor

    def __init__(self, size: int, channels: int | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(channels or size))
        self.register_buffer("begun", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        centred = x - self.mean
        return centred.unflatten(-1, (-1, len(self.deviation))).div_(self.deviation).flatten(-2)

    @torch.no_grad()
    def begin(self, mean: Tensor, variance: Tensor) -> None:
        """Takes the first batch's moments, (size,)."""
        self.mean.copy_(mean)
        variance = variance.unflatten(0, (-1, len(self.deviation))).mean(0)
        self.deviation.copy_(torch.where(variance > 1e-12, variance, 1).sqrt())
        self.begun.fill_(1)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source; buffers are the newest, as the source's weights are made for them."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):
        old.copy_(new)


@dataclasses.dataclass(frozen=True)
class ScalarConfig(Checked):
    """A scalar prediction.

    Attributes:
        kind: "mean" (squared error), or "two_hot": a distribution over bins (cross-entropy).
        bins: of "two_hot", evenly spaced in symlog over the support.
    """

    kind: Literal["mean", "two_hot"] = "mean"
    bins: Annotated[int, Bounds(2, 4096)] = 41


def _bins(config: ScalarConfig) -> Tensor:
    return symexp(torch.linspace(-_SUPPORT, _SUPPORT, config.bins))


class ScalarHead(nn.Module):
    """Features -> a scalar; untrained, zero.

    The bins of "two_hot", ``centers``, do not move, as every prediction would with them. Their support, ±22,025, is
    wide, because they are symexp of even steps (Hafner et al. 2023, arXiv 2301.04104, eq. 9). Untrained, the
    probability of a bin at c is proportional to (1 + |c|)^-2: far bins of equal probability would drown what the near
    ones say, for as long as training takes to empty them.
    """

    centers: Tensor

    def __init__(self, inputs: int, config: ScalarConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(inputs, 1 if config.kind == "mean" else config.bins)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        if config.kind == "two_hot":
            self.register_buffer("centers", _bins(config))
            with torch.no_grad():
                self.project.bias.copy_(-2 * symlog(self.centers).abs())

    @property
    def narrow(self) -> tuple[float, float] | None:
        """Ends of the bins, beyond which a target counts as the end, if a weights' file brought others; else None."""
        if self.config.kind == "mean" or torch.equal(self.centers, _bins(self.config).to(self.centers)):
            return None
        return float(self.centers[0]), float(self.centers[-1])

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) -> (..., 1), or logits (..., bins)."""
        return self.project(features)

    def mean(self, outputs: Tensor) -> Tensor:
        """``outputs`` of ``forward`` -> (...)."""
        if self.config.kind == "mean":
            return outputs.squeeze(-1)
        return outputs.softmax(-1) @ self.centers.to(outputs.dtype)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """``outputs`` of ``forward``, ``target`` (...) without gradient -> (...).

        Of "two_hot", a target beyond the support counts as its end.
        """
        if self.config.kind == "mean":
            return (outputs.squeeze(-1) - target).square()
        target = target.to(self.centers.dtype).contiguous()
        below = (torch.bucketize(target, self.centers, right=True) - 1).clamp(0, self.config.bins - 2)
        low, high = self.centers[below], self.centers[below + 1]
        above = ((target - low) / (high - low)).clamp(0, 1)  # NaN of a NaN target, so that it shows in the loss
        logs = F.log_softmax(outputs, -1)
        near = logs.gather(-1, torch.stack([below, below + 1], -1))  # (..., 2)
        return -(near[..., 0] * (1 - above) + near[..., 1] * above)
