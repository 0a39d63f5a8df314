"""Mamba's scan, and the scan between its projections."""

import torch.nn.functional as F
from torch import Tensor

from wmkernels.causal_conv1d.function import causal_conv1d
from wmkernels.checks import shown, state_dtype
from wmkernels.compat.arguments import narrowed
from wmkernels.nn.gated_rms_norm import unit_rms
from wmkernels.selective_scan.function import selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``wmkernels.selective_scan``, whose shapes, result and errors it has, with any mixture of dtypes.

    Args:
        u: (batch, channels, time).
        delta: as ``u``.
        A: (channels, state), real.
        B: (channels, state), (batch, state, time) or (batch, groups, state, time).
        C: as ``B``.
        D: (channels,).
        z: as ``u``.
        delta_bias: (channels,).
        delta_softplus: apply softplus to ``delta + delta_bias``.
        return_last_state: also return the last state (batch, channels, state), with its gradient.

    Example:
        >>> import torch
        >>> from wmkernels.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        >>> u, delta, A = torch.randn(1, 8, 10), torch.rand(1, 8, 10), -torch.rand(8, 4)
        >>> B = torch.randn(1, 4, 10)
        >>> selective_scan_fn(u, delta, A, B, B).shape
        torch.Size([1, 8, 10])
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, None)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``selective_scan_fn`` by the loop over time of the backend ``reference``."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "reference")


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    softplus, with_state = bool(delta_softplus), bool(return_last_state)
    delta, A, B, C, D, z, delta_bias = narrowed(u, delta, A, B, C, D, z, delta_bias)
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, softplus, with_state, backend=backend)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block between its input projection and its output: convolution, projections, scan, gate.

    Args:
        xz: (batch, 2 * channels, time), x before z.
        conv1d_weight: (channels, 1, width).
        conv1d_bias: (channels,).
        x_proj_weight: (rank + states of B + states of C, channels), without those that are given.
        delta_proj_weight: (channels, rank).
        out_proj_weight: (features, channels).
        out_proj_bias: (features,).
        A: (channels, state), real.
        B: as for ``selective_scan_fn``; projected from x if None.
        C: as ``B``.
        D: (channels,).
        delta_bias: (channels,).
        B_proj_bias: (state,), added to a projected B.
        C_proj_bias: (state,), added to a projected C.
        delta_softplus: apply softplus to ``delta + delta_bias``.
        checkpoint_lvl: 0 or 1, how much mamba_ssm's backward pass recomputes; here it recomputes the scan's states.
        b_rms_weight: (state,), of an RMS norm of a projected B.
        c_rms_weight: (state,), of an RMS norm of a projected C.
        dt_rms_weight: (channels,), of an RMS norm of the step sizes before ``delta_bias``.
        b_c_dt_rms_eps: added to the mean square in these norms.

    Returns:
        (batch, time, features).

    Raises:
        ValueError: invalid shape, device or checkpoint_lvl.
        TypeError: invalid dtype.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl is {shown(checkpoint_lvl)}, expected 0 or 1")
    return _inner(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C),
        *(D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight),
        *(b_c_dt_rms_eps, None),
    )


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """``mamba_inner_fn`` by loops over time."""
    return _inner(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C),
        *(D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, None, None, None, 0.0, "reference"),
    )


def _inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    b_rms_weight: Tensor | None,
    c_rms_weight: Tensor | None,
    dt_rms_weight: Tensor | None,
    eps: float,
    backend: str | None,
) -> Tensor:
    x, z = xz.mT.chunk(2, -1)  # (batch, time, channels)
    weights = narrowed(x, conv1d_weight.squeeze(1), conv1d_bias)
    convolved = causal_conv1d(x, *weights, activation="silu", channel_last=True, backend=backend)
    assert isinstance(convolved, Tensor)
    x = convolved
    projected, rank, states = F.linear(x, x_proj_weight), delta_proj_weight.shape[1], A.shape[1]
    delta = _normed(F.linear(projected[..., :rank], delta_proj_weight), dt_rms_weight, eps)
    if B is None:
        B = _normed(_plus(projected[..., rank : rank + states], B_proj_bias), b_rms_weight, eps)
    elif B.dim() > 2:
        B = B.mT
    if C is None:
        C = _normed(_plus(projected[..., -states:], C_proj_bias), c_rms_weight, eps)
    elif C.dim() > 2:
        C = C.mT
    delta, A, B, C, D, z, delta_bias = narrowed(x, delta, A, B, C, D, z, delta_bias)
    softplus = bool(delta_softplus)
    y = selective_scan(x, delta, A, B, C, D, z, delta_bias, softplus, channel_last=True, backend=backend)
    assert isinstance(y, Tensor)
    return F.linear(y, out_proj_weight, out_proj_bias)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = state_dtype(x.dtype)
    return (unit_rms(x.to(wide), eps) * weight.to(wide)).to(x.dtype)
