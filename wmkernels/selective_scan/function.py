"""The public selective scan."""

import torch
from torch import Tensor

from wmkernels.dispatch import choose
from wmkernels.registration import needs_autograd
from wmkernels.selective_scan.autograd import OP, SelectiveScan
from wmkernels.selective_scan.chunked import selective_scan_chunked
from wmkernels.selective_scan.reference import selective_scan_reference
from wmkernels.selective_scan.validation import canonical


def chunk_length(state: int, device_type: str) -> int:
    """Steps between two states kept for the backward pass.

    On a CPU the saved states take a thirty-second of the memory of one float32 activation for each of up to 128 states
    a channel. On a GPU a chunk is one tile of time in shared memory: a longer one would be replayed for each tile.
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
    """Mamba's selective scan (S6), differentiable in every floating input and through the last state.

    ``h_t = exp(step_t A) h_{t-1} + step_t B_t u_t`` and ``out_t = (C_t · h_t + D u_t) silu(z_t)``, where ``step_t`` is
    ``delta_t + delta_bias``, through softplus if asked for (Gu & Dao 2023, arXiv 2312.00752, algorithm 2).

    Args:
        u: input, (batch, channels, time); (batch, time, channels) with ``channel_last``. Any strides. float32, float64,
            bfloat16 or float16; delta, z and varying B and C have the same dtype.
        delta: step size before bias and softplus, shaped as ``u``.
        A: (channels, state), real; the decay rate, negative for a stable memory. Parameters (A, D, delta_bias, constant
            B and C) and states may be float32 beside 16-bit activations. At most 256 states on the compiled kernels.
        B: input projection: constant (channels, state), or varying (batch, state, time) or
            (batch, groups, state, time); with ``channel_last`` (batch, time, state) or (batch, groups, time, state).
            Channel c reads group ``c // (channels // groups)``.
        C: output projection, in any of the forms of ``B``, not necessarily the same.
        D: skip connection, (channels,).
        z: gate before silu, shaped as ``u``.
        delta_bias: added to ``delta``, (channels,).
        delta_softplus: pass ``delta + delta_bias`` through softplus.
        return_last_state: also return the state after the last step.
        initial_state: the state before the first step, (batch, channels, state), zero if None. With ``cu_seqlens`` one
            per sequence: (sequences, channels, state).
        reset: bool (batch, time); where true the state is forgotten before that step, whatever it held: a new episode.
        cu_seqlens: int32 or int64 (sequences + 1), rising from 0 to time: packed sequences, ``batch`` is then 1. Empty
            sequences are allowed. On a GPU its values are not checked, that would synchronise.
        channel_last: time before channels in u, delta, z, out, and before state in B, C.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"chunked"`` or ``"reference"``; the best trusted one if None.

    Returns:
        The output, shaped as ``u`` in its dtype; with ``return_last_state`` also the last state,
        (batch, channels, state) or (sequences, channels, state), in float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, a device, a backend or cu_seqlens that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch, wmkernels
        >>> u, delta = torch.randn(2, 8, 100), torch.rand(2, 8, 100)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 100), torch.randn(2, 4, 100)
        >>> out, state = wmkernels.selective_scan(u, delta, A, B, C, return_last_state=True)
        >>> more = wmkernels.selective_scan(u, delta, A, B, C, initial_state=state)
        >>> out.shape, state.shape
        (torch.Size([2, 8, 100]), torch.Size([2, 8, 4]))
    """
    inputs = canonical(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, cu_seqlens, channel_last
    )
    state, device = inputs.A.shape[1], inputs.u.device
    chosen = choose(OP, device, backend, state)
    if chosen == "reference":
        out, last_state = selective_scan_reference(inputs)
    elif chosen == "chunked":
        out, last_state = selective_scan_chunked(inputs)
    elif needs_autograd(inputs.differentiable):
        out, last_state, _ = SelectiveScan.apply(*inputs, chunk_length(state, device.type), chosen)
    else:
        out, last_state, _ = torch.ops.wmkernels.selective_scan_forward(*inputs, 0, chosen)
    if channel_last:
        out = out.transpose(1, 2)
    return (out, last_state) if return_last_state else out
