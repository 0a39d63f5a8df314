"""The gated MLP of a block."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """``fc2(values * activation(gate))`` of ``fc1(x)``, which is values, then gate.

    Args:
        in_features: of inputs.
        hidden_features: of values, rounded up to ``multiple_of``; None for 8/3 of ``in_features``.
        out_features: None for ``in_features``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        values, gate = self.fc1(x).chunk(2, -1)
        out: Tensor = self.fc2(values * self.activation(gate))
        return out
