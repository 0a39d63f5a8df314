"""The linear scan over any product and sum."""

from collections.abc import Callable

import torch
from torch import Tensor

from wmkernels.compat.linear_recurrence import recurrence

Binary = Callable[[Tensor, Tensor], Tensor]


def scan(
    gates: Tensor,
    tokens: Tensor,
    mul: Binary = torch.mul,
    add: Binary = torch.add,
    zeros_like: Callable[[Tensor], Tensor] = torch.zeros_like,
    ones_like: Callable[[Tensor], Tensor] = torch.ones_like,
    reverse: bool = False,
) -> Tensor:
    """``h_t = add(mul(gates_t, h_{t-1}), tokens_t)`` from zeros, in reverse from ``h_{t+1}``; differentiable.

    Args:
        gates: (batch, channels, time).
        tokens: as ``gates``.
        mul: product; with another than ``torch.mul`` or another sum, a loop over time.
        add: sum.
        zeros_like: makes the state before the first step.
        ones_like: makes the neutral gate of a tree; a loop needs none.
        reverse: run from the end.

    Returns:
        h, as ``tokens``.

    Raises:
        ValueError: invalid shape or device.
        TypeError: invalid dtype.
    """
    if mul is torch.mul and add is torch.add and zeros_like is torch.zeros_like:
        return recurrence("scan", gates, tokens, reverse)
    state, outputs = zeros_like(tokens[..., 0]), []
    steps = range(tokens.shape[-1])
    for t in reversed(steps) if reverse else steps:
        state = add(mul(gates[..., t], state), tokens[..., t])
        outputs.append(state)
    return torch.stack(outputs[::-1] if reverse else outputs, -1)
