"""Models of equal size: the same layers around different memories."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.nn import LocalAttention, Mamba, MemoryAttention
from wmkernels.nn.rotary import rotate

BASE = 10_000.0  # of the rotary frequencies (Su et al. 2021)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is tuned.

    Attributes:
        lr: highest learning rate.
        window: of windowed attention, in steps.
        tokens: of the memory of memory attention.
        block: steps between updates of that memory.
        d_state: states per channel of a scan.
        heads: of attention.
    """

    lr: float = 2e-3
    window: int = 64
    tokens: int = 16
    block: int = 32
    d_state: int = 16
    heads: int = 4


class RotaryAttention(nn.Module):
    """Causal attention to everything before in the same call, with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        pairs = width // heads // 2
        frequencies = BASE ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, inputs: Tensor, state: None = None) -> tuple[Tensor, None]:
        angles = torch.arange(inputs.shape[1], dtype=torch.float64)[:, None] * self.frequencies
        q, k, v = self.in_proj(inputs).chunk(3, -1)
        q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(-2)), None


class WindowedAttention(nn.Module):
    """``LocalAttention`` on frames of one token."""

    def __init__(self, width: int, window: int, heads: int) -> None:
        super().__init__()
        self.attention = LocalAttention(width, window, heads)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, after = self.attention(inputs.unsqueeze(2), state)
        return outputs.squeeze(2), after


Make = Callable[[int, Settings], nn.Module]
KINDS: dict[str, Make] = {
    "scan": lambda width, s: Mamba(width, s.d_state),
    "window": lambda width, s: WindowedAttention(width, s.window, s.heads),
    "rotary": lambda width, s: RotaryAttention(width, s.heads),
    "memory": lambda width, s: MemoryAttention(width, s.tokens, s.block, s.heads),
}
MEMORIES = {  # kinds of layers in turn; the hybrid's are two scans to a window, as in Griffin (De et al. 2024)
    "memory attention": ("memory",),
    "memory attention (continued)": ("memory",),
    "scan": ("scan",),
    "scan (continued)": ("scan",),
    "rotary attention": ("rotary",),
    "windowed attention": ("window",),
    "hybrid": ("scan", "window", "scan"),
}
CONTINUED = {f"{plain} (continued)": plain for plain in ("memory attention", "scan")}


class Layer(nn.Module):
    """Pre-norm memory and multilayer perceptron, with residual connections."""

    def __init__(self, width: int, hidden: int, memory: nn.Module) -> None:
        super().__init__()
        self.memory = memory
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, after = self.memory(self.norms[0](x), state)
        x = x + y
        return x + self.mlp(self.norms[1](x)), after


class Model(nn.Module):
    """(batch, time) classes -> logits of the next class, (batch, time, classes), and the layers' last states."""

    def __init__(self, kinds: tuple[str, ...], settings: Settings, classes: int, layers: int, width: int, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(
            Layer(width, hidden, KINDS[kinds[i % len(kinds)]](width, settings)) for i in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor, states: Sequence[Any] | None = None) -> tuple[Tensor, list[Any]]:
        x, after = self.embed(x), []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, state = layer(x, state)
            after.append(state)
        return self.head(self.norm(x)), after


def build(memory: str, settings: Settings, classes: int, layers: int, parameters: int) -> Model:
    """The widest model, its perceptrons about twice as wide, of ``parameters``; the perceptrons take up the rest."""

    def size(width: int, hidden: int) -> int:
        with torch.device("meta"):
            model = Model(MEMORIES[memory], settings, classes, layers, width, hidden)
        return sum(p.numel() for p in model.parameters())

    step = 2 * settings.heads
    width = step
    while size(width + step, 2 * (width + step)) <= parameters:
        width += step
    per_unit = layers * (2 * width + 1)
    hidden = 2 * width + max(0, math.floor((parameters - size(width, 2 * width)) / per_unit))
    return Model(MEMORIES[memory], settings, classes, layers, width, hidden)
