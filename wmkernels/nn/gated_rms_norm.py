"""RMS norm with a gate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import state_dtype


class GatedRMSNorm(nn.Module):
    """``norm(x silu(z))``, or ``norm(x) silu(z)``, with a norm per group of features and a weight per feature.

    Args:
        features: of inputs and outputs.
        groups: a divisor of ``features``.
        norm_before_gate: gate the normalised features, not the norm's input.
        eps: added to the mean square.
        dtype: of the weight. Arithmetic is in float32 (float64).
    """

    def __init__(
        self,
        features: int,
        groups: int = 1,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.groups = features, groups
        self.norm_before_gate, self.eps = norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.features}, groups={self.groups}, norm_before_gate={self.norm_before_gate}, eps={self.eps}"

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """As ``x`` (..., features); ``z`` likewise."""
        dtype = state_dtype(x.dtype)
        values, gate = x.to(dtype), F.silu(z.to(dtype))
        if not self.norm_before_gate:
            values = values * gate
        grouped = values.unflatten(-1, (self.groups, self.features // self.groups))
        values = unit_rms(grouped, self.eps).flatten(-2) * self.weight.to(dtype)
        if self.norm_before_gate:
            values = values * gate
        return values.to(x.dtype)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """``x`` over its root mean square of the last dimension, in float32 (float64)."""
    wide = x.to(state_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
