"""Norms with a gate."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import require_shape, state_dtype
from wmkernels.compat.normalise import normalise


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """``norm(x) silu(z)``, or ``norm(x silu(z))``; arithmetic in float32 (float64), differentiable.

    Args:
        x: (..., features).
        weight: (features,).
        bias: (features,).
        z: as ``x``; None for no gate.
        eps: added to the variance.
        group_size: features that are normalised together, a divisor of them; None for all.
        norm_before_gate: gate the normalised features, not the norm's input.
        is_rms_norm: the RMS norm instead of LayerNorm.

    Returns:
        As ``x``.

    Raises:
        ValueError: invalid shape or group_size.
    """
    if z is not None:
        require_shape("layernorm_fn", "z", z, [f"size {i}" for i in range(x.dim())], x.shape, "x")
    if group_size is not None and (group_size < 1 or x.shape[-1] % group_size):
        raise ValueError(f"layernorm_fn: group_size is {group_size}, expected a divisor of {x.shape[-1]} features")
    dtype = state_dtype(x.dtype)
    values, gate = x.to(dtype), None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        values = values * gate
    values = normalise(values, weight, bias, eps, is_rms_norm, group_size)
    if gate is not None and norm_before_gate:
        values = values * gate
    return values.to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """``layernorm_fn`` with ``is_rms_norm``."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


rms_norm_ref = rmsnorm_fn


class LayerNorm(nn.Module):
    """``layernorm_fn`` with learned ``weight`` and ``bias`` (hidden_size,)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, **factory))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **factory))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """As ``x`` (..., hidden_size)."""
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


class RMSNorm(nn.Module):
    """``rmsnorm_fn`` with a learned ``weight`` (hidden_size,)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """As ``x`` (..., hidden_size)."""
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
