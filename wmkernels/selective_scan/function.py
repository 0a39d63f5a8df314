"""The public selective scan: checks its inputs, brings them to one canonical form, and calls the kernels.

Canonical form: activations as (batch, channels, time) views, varying B and C as (batch, groups, state, time),
parameters and states in the state dtype. It is made with differentiable views and casts, so gradients find their way
back.
"""

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    promote_dtypes,
    require_device,
    require_dtype,
    require_packing,
    require_reset,
    require_shape,
    require_tensor,
    state_dtype,
)
from wmkernels.dispatch import choose
from wmkernels.registration import needs_autograd
from wmkernels.selective_scan.autograd import SelectiveScan
from wmkernels.selective_scan.reference import selective_scan_reference

OP = "selective_scan"


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
            a sequence: (sequences, channels, state).
        reset: bool (batch, time); where true the state is forgotten before that step, whatever it held: a new episode.
        cu_seqlens: int32 or int64 (sequences + 1), rising from 0 to time: packed sequences, ``batch`` is then 1. Empty
            sequences are allowed. On a GPU its values are not checked, that would synchronise.
        channel_last: time before channels in u, delta, z, out, and before state in B, C.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; the best that can run if None.

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
    for name, value in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        require_tensor(OP, name, value)
    require_dtype(OP, "u", u, FLOATS, "")
    if torch.is_autocast_enabled(u.device.type):
        u, delta, z, B, C = _promote(u, delta, z, B, C)
    if channel_last:
        u, delta = _swap_time(u, "u"), _swap_time(delta, "delta")
        z = None if z is None else _swap_time(z, "z")
        B, C = (x if x.dim() == 2 else x.transpose(-1, -2) for x in (B, C))
    _check_activations(u, delta, z, channel_last)
    _check_parameters(u, A, D, delta_bias)
    B, C = _canonical_projection("B", B, u, A, channel_last), _canonical_projection("C", C, u, A, channel_last)
    B, C = _same_groups(B, C)
    cu_seqlens = _canonical_sequences(u, cu_seqlens)
    _check_memory(u, A, initial_state, reset, cu_seqlens)

    dtype = state_dtype(u.dtype)
    A = A.to(dtype)
    D = None if D is None else D.to(dtype)
    delta_bias = None if delta_bias is None else delta_bias.to(dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)

    state = A.shape[1]
    chosen = choose(OP, u.device, backend, state)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens)
    if chosen == "reference":
        out, last_state = selective_scan_reference(*tensors[:8], delta_softplus, *tensors[8:])
    elif needs_autograd(tensors):
        chunk = chunk_length(state, u.device.type)
        out, last_state, _ = SelectiveScan.apply(*tensors, delta_softplus, channel_last, chunk, chosen)
    else:
        out, last_state, _ = torch.ops.wmkernels.selective_scan_forward(
            *tensors, delta_softplus, channel_last, 0, chosen
        )
    if channel_last:
        out = out.transpose(1, 2)
    return (out, last_state) if return_last_state else out


def _promote(*activations: Tensor | None) -> tuple[Tensor, ...]:
    """Under autocast, activations of mixed dtypes take the widest of them, as in PyTorch's own promoting ops."""
    varying = [x.dtype for x in activations if x is not None and x.dim() > 2]
    dtype = promote_dtypes(varying)
    return tuple(x if x is None or x.dim() <= 2 else x.to(dtype) for x in activations)  # type: ignore[misc]


def _swap_time(x: Tensor, name: str) -> Tensor:
    if x.dim() != 3:
        raise ValueError(
            f"{OP}: {name} has shape {tuple(x.shape)}, expected (batch, time, channels) with channel_last=True"
        )
    return x.transpose(1, 2)


def _check_activations(u: Tensor, delta: Tensor, z: Tensor | None, channel_last: bool) -> None:
    if u.dim() != 3:
        raise ValueError(f"{OP}: u has shape {tuple(u.shape)}, expected (batch, channels, time)")
    order = (0, 2, 1) if channel_last else (0, 1, 2)
    labels = ("batch", "channels", "time")
    for name, x in (("delta", delta), ("z", z)):
        if x is None:
            continue
        require_tensor(OP, name, x)
        require_device(OP, name, x, u.device, "u")
        require_dtype(OP, name, x, (u.dtype,), "as u has")
        if x.shape != u.shape:
            shown = x.transpose(1, 2) if channel_last and x.dim() == 3 else x
            require_shape(OP, name, shown, [labels[i] for i in order], [u.shape[i] for i in order], "u")


def _check_parameters(u: Tensor, A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> None:
    if A.is_complex():
        raise TypeError(
            f"{OP}: A is complex ({A.dtype}), expected a real A; a complex memory can be had by rotating B and C"
        )
    channels = u.shape[1]
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(f"{OP}: A has shape {tuple(A.shape)}, expected (channels={channels}, state) to match u")
    for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        if x is None:
            continue
        require_tensor(OP, name, x)
        require_device(OP, name, x, u.device, "u")
        require_dtype(OP, name, x, (u.dtype, state_dtype(u.dtype)), f"beside u of {u.dtype}")
        if name != "A":
            require_shape(OP, name, x, ("channels",), (channels,), "u")


def _canonical_projection(name: str, x: Tensor, u: Tensor, A: Tensor, channel_last: bool) -> Tensor:
    """(channels, state) in the state dtype, or (batch, groups, state, time)."""
    batch, channels, time = u.shape
    state = A.shape[1]
    require_device(OP, name, x, u.device, "u")
    if x.dim() == 2:
        require_dtype(OP, name, x, (u.dtype, state_dtype(u.dtype)), f"beside u of {u.dtype}")
        require_shape(OP, name, x, ("channels", "state"), (channels, state), "u and A")
        return x.to(state_dtype(u.dtype))
    require_dtype(OP, name, x, (u.dtype,), "as u has")
    if x.dim() == 3:
        x = x.unsqueeze(1)
    elif x.dim() != 4:
        raise ValueError(
            f"{OP}: {name} has shape {tuple(x.shape)}, expected (channels, state), (batch, state, time) or "
            "(batch, groups, state, time)"
        )
    groups = x.shape[1]
    if x.shape[0] != batch or x.shape[2] != state or x.shape[3] != time:
        labels, sizes = ["batch", "groups", "state", "time"], [batch, groups, state, time]
        shown, hint = x, ""
        if channel_last:
            labels[2:], sizes[2:], shown = labels[:1:-1], sizes[:1:-1], x.transpose(2, 3)
        if groups == 1:
            labels, sizes, shown = labels[:1] + labels[2:], sizes[:1] + sizes[2:], shown.squeeze(1)
        if x.shape[2] == time and x.shape[3] == state:
            hint = f"channel_last={not channel_last} takes this order"
        require_shape(OP, name, shown, labels, sizes, "u and A", hint)
    if groups < 1 or channels % groups:
        raise ValueError(f"{OP}: {name} has {groups} groups, expected a divisor of channels={channels}")
    return x


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One group beside several serves all of them."""
    if B.dim() == 4 and C.dim() == 4 and B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        if 1 not in (B.shape[1], C.shape[1]):
            raise ValueError(
                f"{OP}: B has {B.shape[1]} groups and C has {C.shape[1]}, expected as many in both, or one"
            )
        B, C = (x.expand(-1, groups, -1, -1) for x in (B, C))
    return B, C


def _canonical_sequences(u: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None:
        return None
    require_packing(OP, cu_seqlens, u, "u")
    return cu_seqlens.to(torch.int64)


def _check_memory(
    u: Tensor, A: Tensor, initial_state: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    batch, channels, time = u.shape
    if initial_state is not None:
        require_tensor(OP, "initial_state", initial_state)
        require_device(OP, "initial_state", initial_state, u.device, "u")
        require_dtype(OP, "initial_state", initial_state, (u.dtype, state_dtype(u.dtype)), f"beside u of {u.dtype}")
        first = ("batch", batch) if cu_seqlens is None else ("sequences", cu_seqlens.shape[0] - 1)
        sizes = (first[1], channels, A.shape[1])
        require_shape(OP, "initial_state", initial_state, (first[0], "channels", "state"), sizes, "u and A")
    require_reset(OP, reset, ("batch", "time"), (batch, time), u, "u")
