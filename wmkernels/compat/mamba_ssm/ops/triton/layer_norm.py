"""The sum of a block's branches and its norm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import require_shape, state_dtype
from wmkernels.compat.normalise import normalise

OP = "layer_norm_fn"


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """``norm(dropout(rowscale x) + dropout(x1) + residual)``; arithmetic in float32 (float64), differentiable.

    Args:
        x: (..., features).
        weight: (features,).
        bias: (features,).
        residual: as ``x``, of any floating dtype.
        x1: as ``x``, not with ``rowscale``.
        weight1: (features,), of a second norm of the same sum.
        bias1: (features,).
        eps: added to the variance.
        dropout_p: probability that an entry of ``x`` or ``x1`` is dropped; the others are scaled up.
        rowscale: (...).
        prenorm: also return the sum.
        residual_in_fp32: return it in float32 where there is no ``residual``, whose dtype it has otherwise.
        is_rms_norm: the RMS norm instead of LayerNorm.
        return_dropout_mask: also return what was kept of ``x`` and of ``x1``, bool, or None without dropout.

    Returns:
        The norm, as ``x``; then, each if asked for, the second norm, the sum and two masks.

    Raises:
        ValueError: invalid shape; ``rowscale`` with ``x1``.
    """
    for name, value in (("residual", residual), ("x1", x1)):
        if value is not None:
            require_shape(OP, name, value, [f"size {i}" for i in range(x.dim())], x.shape, "x")
    if rowscale is not None and x1 is not None:
        raise ValueError(f"{OP}: rowscale is given with x1, expected one of the two")
    dtype = state_dtype(x.dtype)
    total = x.to(dtype)
    if rowscale is not None:
        total = total * rowscale.to(dtype)[..., None]
    total, mask = _dropped(total, dropout_p)
    mask1 = None
    if x1 is not None:
        other, mask1 = _dropped(x1.to(dtype), dropout_p)
        total = total + other
    held = torch.float32 if residual_in_fp32 else x.dtype
    if residual is not None:
        total, held = total + residual.to(dtype), residual.dtype
    found: list[Tensor | None] = [normalise(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        found.append(normalise(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        found.append(total.to(held))
    if return_dropout_mask:
        found += [mask, mask1]
    return tuple(found) if len(found) > 1 else found[0]  # type: ignore[return-value]


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    if not p:
        return x, None
    kept = torch.rand_like(x) >= p
    return x.masked_fill(~kept, 0) / (1 - p), kept


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """``layer_norm_fn`` with ``is_rms_norm``."""
    return layer_norm_fn(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32),
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer of ``layer_norm_fn``; with ``prenorm`` also the sum that was normalised."""
    normed, total = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    assert isinstance(normed, Tensor) and isinstance(total, Tensor)
    out = F.linear(normed.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, total) if prenorm else out


class RMSNorm(nn.Module):
    """``rms_norm_fn`` with a learned ``weight`` (hidden_size,), and with dropout in training."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, **factory))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor | None, ...]:
        """As ``x`` (..., hidden_size); with ``prenorm`` also the sum that was normalised."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
