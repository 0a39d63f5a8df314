"""Mamba-2's scan, and all of its block between the input projection and the output."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.causal_conv1d.function import causal_conv1d
from wmkernels.checks import FLOATS, require_size, require_tensor, shown
from wmkernels.compat.arguments import is_silu, narrowed, reset_of
from wmkernels.compat.mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from wmkernels.compat.packing import padded_bounds
from wmkernels.ssd_scan.function import ssd_scan

SCAN, SPLIT = "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"
_NO_LIMIT = (0.0, math.inf)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``wmkernels.ssd_scan``, differentiable in all tensors and states.

    Args:
        x: (batch, time, heads, headdim).
        dt: (batch, time, heads).
        A: (heads,), real.
        B: (batch, time, groups, state).
        C: as ``B``.
        chunk_size: of mamba_ssm's kernels; the op chooses its own, with the same result up to rounding.
        D: (heads,) or (heads, headdim).
        z: as ``x``.
        dt_bias: (heads,).
        initial_states: (batch, heads, headdim, state), before sequence 0 of a row.
        seq_idx: int (batch, time), the sequence of each step: where it changes, the state starts from zeros.
        cu_seqlens: int32 or int64 (sequences + 1,), nondecreasing from 0, at most to time, with batch 1. Read only with
            ``return_varlen_states``; each sequence then starts from zeros, and the steps after the last are another.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        dt_limit: lowest and highest step size.
        return_final_states: also return the states after the last step, (batch, heads, headdim, state).
        return_varlen_states: also return those after each sequence of ``cu_seqlens``, (sequences, heads, ...).
        state_dtype: of states between mamba_ssm's chunks; here they are float32 (float64 for float64).

    Returns:
        The output, as ``x``, and the states asked for, in this order, float32 (float64 for float64).

    Raises:
        ValueError: invalid shape, device, chunk_size, dt_limit or cu_seqlens.
        TypeError: invalid dtype, chunk_size or dt_limit.

    Example:
        >>> import torch
        >>> from wmkernels.compat.mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        >>> x, dt, A = torch.randn(2, 10, 4, 8), torch.rand(2, 10, 4), -torch.rand(4)
        >>> B, seq_idx = torch.randn(2, 10, 1, 16), torch.arange(10).expand(2, 10) // 5
        >>> out, state = mamba_chunk_scan_combined(x, dt, A, B, B, 64, seq_idx=seq_idx, return_final_states=True)
        >>> out.shape, state.shape
        (torch.Size([2, 10, 4, 8]), torch.Size([2, 4, 8, 16]))
    """
    require_tensor(SCAN, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{SCAN}: x has shape {tuple(x.shape)}, expected (batch, time, heads, headdim)")
    require_chunks(SCAN, chunk_size, state_dtype)
    dt, A, B, C, D, z, dt_bias, initial = narrowed(x, dt, A, B, C, D, z, dt_bias, initial_states)
    bounds = None
    if return_varlen_states:
        if cu_seqlens is None:
            raise ValueError(f"{SCAN}: cu_seqlens is None, expected bounds of sequences with return_varlen_states")
        bounds = padded_bounds(SCAN, cu_seqlens, x.shape[1])
        initial = _before_the_first(initial, x, bounds)
    out, states = ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus=bool(dt_softplus),
        dt_limit=dt_limit,
        initial_state=initial,
        reset=reset_of(SCAN, seq_idx, x, (x.shape[0], x.shape[1])),
        cu_seqlens=bounds,
        return_last_state=True,
    )
    assert isinstance(states, Tensor)
    found = [out]
    if return_final_states:
        found.append(states if bounds is None else _last(states, bounds, x.shape[1]))
    if bounds is not None:
        found.append(states[:-1])
    return found[0] if len(found) == 1 else tuple(found)


def require_chunks(op: str, chunk_size: object, dtype: object) -> None:
    """Raises TypeError, ValueError."""
    require_size(op, "chunk_size", chunk_size, least=1)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{op}: state_dtype is {shown(dtype)}, expected a floating dtype or None")


def _before_the_first(initial: Tensor | None, x: Tensor, bounds: Tensor) -> Tensor | None:
    if initial is None:
        return None
    return torch.cat([initial, initial.new_zeros((bounds.shape[0] - 1 - initial.shape[0], *initial.shape[1:]))])


def _last(states: Tensor, bounds: Tensor, time: int) -> Tensor:
    """The state of the sequence with the row's last step."""
    row = torch.searchsorted(bounds, time - 1, right=True) - 1
    return states.index_select(0, row.clamp(min=0).view(1))


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 block after its input projection: convolution, scan, gated RMS norm, output projection.

    Args:
        zxbcdt: (batch, time, 2 * beside + 2 * channels + 2 * groups * state + heads): gate and values of an MLP beside
            the scan, z, x, B, C and dt, where channels = heads * headdim.
        conv1d_weight: (channels + 2 * groups * state, width).
        conv1d_bias: (channels + 2 * groups * state,).
        dt_bias: (heads,).
        A: (heads,).
        D: (heads,), then with ``headdim``, or (heads, headdim).
        chunk_size: as for ``mamba_chunk_scan_combined``, and so all that is not named here.
        initial_states: (batch, heads, headdim, state).
        seq_idx: int (batch, time).
        dt_limit: lowest and highest step size.
        return_final_states: also return the scan's last states.
        activation: of the convolution, ``"silu"``, ``"swish"`` or None.
        rmsnorm_weight: (channels,), of a gated RMS norm per group; None for the gate alone.
        rmsnorm_eps: added to the mean square.
        outproj_weight: (features, beside + channels); None for no projection.
        outproj_bias: (features,).
        headdim: channels per head.
        ngroups: groups of B and C, and of the norm.
        norm_before_gate: gate the normalised features, not the norm's input.
        state_dtype: as ``chunk_size``.

    Returns:
        (batch, time, features), with ``return_final_states`` also the states.

    Raises:
        ValueError: invalid shape, device, activation, headdim or ngroups.
        TypeError: invalid dtype.
    """
    silu = is_silu(SPLIT, activation)
    require_chunks(SPLIT, chunk_size, state_dtype)
    heads, headdim, sizes = _split_sizes(zxbcdt, conv1d_weight, D, headdim, ngroups)
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError(f"{SPLIT}: outproj_bias is given without outproj_weight, expected both or none")
    beside, z, mixed, dt = zxbcdt.split(sizes, -1)
    channels = heads * headdim
    reset = reset_of(SPLIT, seq_idx, zxbcdt, (zxbcdt.shape[0], zxbcdt.shape[1]))
    convolved = causal_conv1d(
        mixed,
        *narrowed(mixed, conv1d_weight, conv1d_bias),
        activation="silu" if silu else None,
        reset=reset,
        channel_last=True,
    )
    assert isinstance(convolved, Tensor)
    if seq_idx is not None:
        convolved = convolved.masked_fill((seq_idx < 0)[..., None], 0)
    size = (sizes[2] - channels) // 2
    x, B, C = convolved.split([channels, size, size], -1)
    y, states = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D,
        z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    out = y.flatten(-2)
    if rmsnorm_weight is not None:
        group = channels // ngroups
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, group, norm_before_gate)
    if sizes[0]:
        gate, values = beside.chunk(2, -1)
        out = torch.cat([F.silu(gate) * values, out], -1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, states) if return_final_states else out


def _split_sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, D: Tensor, headdim: int | None, ngroups: int
) -> tuple[int, int, list[int]]:
    """(heads, headdim, columns of the MLP, z, x B C and dt)."""
    for name, tensor in (("zxbcdt", zxbcdt), ("conv1d_weight", conv1d_weight), ("D", D)):
        require_tensor(SPLIT, name, tensor)
    if D.dim() not in (1, 2):
        raise ValueError(f"{SPLIT}: D has shape {tuple(D.shape)}, expected (heads,) or (heads, headdim)")
    if D.dim() == 2:
        headdim = D.shape[1]
    elif headdim is None:
        raise ValueError(f"{SPLIT}: headdim is None, expected the channels per head beside D of shape {tuple(D.shape)}")
    heads, columns = D.shape[0], zxbcdt.shape[-1]
    channels, mixed = heads * headdim, conv1d_weight.shape[0]
    least = channels + mixed + heads
    rest = columns - least
    if zxbcdt.dim() != 3 or rest < 0 or rest % 2:
        raise ValueError(
            f"{SPLIT}: zxbcdt has shape {tuple(zxbcdt.shape)}, expected (batch, time, {least} and an even number more) "
            "for z, the convolution's channels, dt, and an MLP beside them"
        )
    require_size(SPLIT, "ngroups", ngroups, least=1)
    if heads % ngroups or mixed <= channels or (mixed - channels) % (2 * ngroups):
        raise ValueError(
            f"{SPLIT}: ngroups is {ngroups}, expected a divisor of the {heads} heads, with B and C of as many groups "
            f"among the convolution's {mixed} channels after the {channels} of x"
        )
    return heads, headdim, [rest, channels, mixed, heads]
