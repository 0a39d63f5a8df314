"""A residual block: the sum of both branches, its norm, a mixer, and perhaps an MLP likewise."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wmkernels.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn


def add_and_norm(
    norm: nn.Module, branch: Tensor, residual: Tensor | None, fused: bool, in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum). ``fused`` sums in float32; else the sum is rounded before the norm."""
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    if fused:
        eps = norm.eps
        assert isinstance(eps, float)
        normed, total = layer_norm_fn(
            branch,
            weight,
            bias,
            residual,
            eps=eps,
            prenorm=True,
            residual_in_fp32=in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
        assert isinstance(normed, Tensor) and isinstance(total, Tensor)
        return normed, total
    total = branch if residual is None else branch + residual
    return norm(total.to(weight.dtype)), total.float() if in_fp32 and total.dtype != torch.float64 else total


class Block(nn.Module):
    """Takes and returns the branch and the residual, whose sum is what a usual block returns.

    Args:
        dim: features.
        mixer_cls: ``mixer_cls(dim)`` makes the mixer.
        mlp_cls: likewise the MLP; ``nn.Identity`` for none.
        norm_cls: likewise each norm, ``nn.LayerNorm`` or ``RMSNorm``.
        fused_add_norm: sum and norm in float32, by ``layer_norm_fn``.
        residual_in_fp32: the residual is float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """(branch, residual), both (batch, time, dim)."""
        how = (self.fused_add_norm, self.residual_in_fp32)
        hidden_states, residual = add_and_norm(self.norm, hidden_states, residual, *how)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_and_norm(self.norm2, hidden_states, residual, *how)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]
