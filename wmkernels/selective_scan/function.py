"""The public selective scan."""

import torch
from torch import Tensor

from wmkernels.checks import Signature, is_autocast
from wmkernels.dispatch import choose
from wmkernels.modes import needs_autograd, requires_pytorch
from wmkernels.registration import differentiably
from wmkernels.selective_scan.autograd import OP, SelectiveScan
from wmkernels.selective_scan.chunked import selective_scan_chunked
from wmkernels.selective_scan.reference import selective_scan_reference
from wmkernels.selective_scan.validation import canonical


def chunk_length(state: int, device_type: str) -> int:
    """Steps between saved states.

    On a CPU, saved states take at most 1/8 of a float32 activation's memory, up to 128 states per channel. On a GPU, a
    chunk is one tile of the CUDA backward kernel (fp32, up to 64 states), which then recomputes no earlier tile.
    """
    if device_type == "cpu":
        return min(max(8 * state, 64), 1024)
    return 32


def selective_scan(
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
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    channel_last: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan (S6; Gu & Dao 2023, arXiv 2312.00752, algorithm 2), differentiable.

    ``h_t = exp(step_t A) h_{t-1} + step_t B_t u_t`` and ``out_t = (C_t · h_t + D u_t) silu(z_t)``, with ``step_t =
    softplus(delta_t + delta_bias)`` or without softplus.

    Args:
        u: (batch, channels, time), any strides; float32, float64, bfloat16 or float16. The others may have any of these
            dtypes that float32 (float64 for float64) holds; unlike activations are computed in it.
        delta: step size, as ``u``.
        A: (channels, state), real, negative to decay; at most 256 states in compiled kernels. Arithmetic is in float32
            (float64).
        B: (channels, state), (batch, state, time) or (batch, groups, state, time); channel c uses group
            ``c // (channels // groups)``.
        C: as ``B``.
        D: skip connection, (channels,).
        z: gate, as ``u``.
        delta_bias: (channels,).
        delta_softplus: apply softplus to ``delta + delta_bias``.
        return_last_state: also return the last state.
        initial_state: (batch, channels, state), or (sequences, channels, state) with ``cu_seqlens``; zeros if None.
        reset: bool (batch, time); true drops the previous state, NaN included.
        cu_seqlens: int32 or int64 (sequences + 1,), nondecreasing from 0 to time: packed sequences, batch 1. Not
            checked on a GPU.
        channel_last: u, delta, z and out are (batch, time, channels), B and C (..., time, state).
        backend: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"chunked"`` or ``"reference"``; if None, the first
            of these that is verified and can run.

    Returns:
        The output, as ``u``; with ``return_last_state`` also the last state, as ``initial_state``, float32 (float64
        for float64).

    Raises:
        ValueError: invalid shape, device, backend or cu_seqlens.
        TypeError: invalid dtype.

    Example:
        >>> import torch, wmkernels
        >>> u, delta = torch.randn(2, 8, 100), torch.rand(2, 8, 100)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 100), torch.randn(2, 4, 100)
        >>> out, state = wmkernels.selective_scan(u, delta, A, B, C, return_last_state=True)
        >>> more = wmkernels.selective_scan(u, delta, A, B, C, initial_state=state)
        >>> out.shape, state.shape
        (torch.Size([2, 8, 100]), torch.Size([2, 8, 4]))
    """
    _SIGNATURE.require(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        return_last_state,
        initial_state,
        reset,
        cu_seqlens,
        channel_last,
        backend,
    )
    inputs = canonical(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, cu_seqlens, channel_last
    )
    state, device = inputs.A.shape[1], inputs.u.device
    chosen = choose(OP, device, backend, state, pytorch_for=requires_pytorch(inputs.differentiable))
    if chosen == "reference":
        out, last_state = selective_scan_reference(inputs)
    elif chosen == "chunked":
        out, last_state = selective_scan_chunked(inputs)
    elif needs_autograd(inputs.differentiable):
        out, last_state, _ = differentiably(SelectiveScan, *inputs, chunk_length(state, device.type), chosen)
    else:
        out, last_state, _ = torch.ops.wmkernels.selective_scan_forward(*inputs, 0, chosen)
    if out.dtype != u.dtype and not is_autocast(device):  # u was widened beside others
        out = out.to(u.dtype)
    if channel_last:
        out = out.transpose(1, 2)
    return (out, last_state) if return_last_state else out


_SIGNATURE = Signature(selective_scan)
