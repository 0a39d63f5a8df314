"""Selective scan, forward, in Triton.

A program scans a channel tile (triton_device.py) by T steps, states in registers; bound by `state` exponentials per
element.

If batch x channels cannot fill the GPU, time is cut. A first pass computes each segment's final state from zero and
decay exp(A * sum of steps); `pass_state_kernel` combines them.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.selective_scan.meta import ScanInputs, forward_outputs
from wmkernels.selective_scan.triton_device import (
    broadcast_channels,
    broadcast_states,
    first_chunk_index,
    last_step,
    load_decay_rates,
    locate_segment,
    state_indices,
    step_size,
    sum_states,
    tile_channels,
)
from wmkernels.selective_scan.triton_segments import pass_state
from wmkernels.selective_scan.triton_tiles import Tiles, projection_strides
from wmkernels.triton_device import RESET, combine, combine_mark, sigmoid


@triton.jit
def forward_kernel(
    u,  # inputs as in ScanInputs, reset in bytes
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    incoming_state,  # (sequences or segments, channels, state) or None
    reset,
    cu_seqlens,
    out,  # None in the first pass
    last_state,  # (sequences or segments, channels, state), contiguous
    chunk_states,  # (chunks, channels, state) or None
    decays,  # first pass
    u_strides,
    delta_strides,
    A_strides,
    B_strides,
    C_strides,
    D_stride,
    z_strides,
    bias_stride,
    incoming_strides,
    reset_strides,
    out_strides,
    channels,
    state,
    time,
    sequences,
    group_channels,
    group_tiles,
    tiles,
    segment_length,
    segments_per_sequence,
    chunk,  # multiple of T
    SOFTPLUS: tl.constexpr,
    B_VARIES: tl.constexpr,
    C_VARIES: tl.constexpr,
    INCOMING_PER_SEGMENT: tl.constexpr,
    T: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    D1: tl.constexpr,
    DL: tl.constexpr,
):
    dtype = A.dtype.element_ty
    tile, segment, group, d, d_in = tile_channels(tiles, group_tiles, group_channels, D1, DL)
    sequence, row, begin, start, end, is_last, local_segment = locate_segment(
        segment, cu_seqlens, sequences, time, segment_length, segments_per_sequence
    )
    n = state_indices(NI, NL)
    t = tl.arange(0, T).to(tl.int64)
    # (NI, D1, NL, DL)
    d4, n4 = d[None, :, None, :], n[:, None, :, None].to(tl.int64)
    state_in = d_in[None, :, None, :] & (n < state)[:, None, :, None]
    state_offsets = d4 * state + n4
    states_size = tl.full((), state, tl.int64) * channels

    decay_rate = load_decay_rates(A, A_strides, d4, n4, state_in)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + d * bias_stride, mask=d_in, other=0.0)
    skip = None
    if D is not None:
        skip = tl.load(D + d * D_stride, mask=d_in, other=0.0)
    if not B_VARIES:
        B_all = tl.load(B + d4 * B_strides[0] + n4 * B_strides[1], mask=state_in, other=0.0)[None]
    if not C_VARIES:
        C_all = tl.load(C + d4 * C_strides[0] + n4 * C_strides[1], mask=state_in, other=0.0)[None]
    h = tl.zeros([NI, D1, NL, DL], dtype)
    if incoming_state is not None:
        first = segment if INCOMING_PER_SEGMENT else sequence
        pointers = incoming_state + first * incoming_strides[0] + d4 * incoming_strides[1] + n4 * incoming_strides[2]
        h = tl.load(pointers, mask=state_in, other=0.0)

    t3, d3 = t[:, None, None], d[None]
    tn_in = (n < state)[None]
    u_tile = u + row * u_strides[0] + d3 * u_strides[1] + t3 * u_strides[2]
    delta_tile = delta + row * delta_strides[0] + d3 * delta_strides[1] + t3 * delta_strides[2]
    z_tile = z
    if z is not None:
        z_tile = z + row * z_strides[0] + d3 * z_strides[1] + t3 * z_strides[2]
    out_tile = out
    if out is not None:
        out_tile = out + row * out_strides[0] + d3 * out_strides[1] + t3 * out_strides[2]
    B_tile = B + row * B_strides[0] + group * B_strides[1] + n[None].to(tl.int64) * B_strides[2] + t3 * B_strides[3]
    C_tile = C + row * C_strides[0] + group * C_strides[1] + n[None].to(tl.int64) * C_strides[2] + t3 * C_strides[3]
    index = tl.arange(0, T)[:, None, None, None, None] + tl.zeros([T, NI, D1, NL, DL], tl.int32)
    step_sum = tl.zeros([D1, DL], dtype)
    any_reset = tl.zeros([1], tl.int32)
    first_chunk = first_chunk_index(sequence, begin, cu_seqlens, time, chunk)

    inside = (start + t3 < end) & d_in[None]
    t_in = (start + t3 < end) & tn_in
    u_next = tl.load(u_tile + start * u_strides[2], mask=inside, other=0.0)
    delta_next = tl.load(delta_tile + start * delta_strides[2], mask=inside, other=0.0)
    if B_VARIES:
        B_next = tl.load(B_tile + start * B_strides[3], mask=t_in, other=0.0)
    if out is not None:
        if C_VARIES:
            C_next = tl.load(C_tile + start * C_strides[3], mask=t_in, other=0.0)
        if z is not None:
            z_next = tl.load(z_tile + start * z_strides[2], mask=inside, other=0.0)
    for t0 in range(start, end, T):
        u_t, delta_t, inside_now = u_next.to(dtype), delta_next.to(dtype), inside
        ahead = t0 + T
        inside = (ahead + t3 < end) & d_in[None]
        t_in = (ahead + t3 < end) & tn_in
        u_next = tl.load(u_tile + ahead * u_strides[2], mask=inside, other=0.0)
        delta_next = tl.load(delta_tile + ahead * delta_strides[2], mask=inside, other=0.0)
        if B_VARIES:
            B_t = broadcast_channels(B_next.to(dtype))
            B_next = tl.load(B_tile + ahead * B_strides[3], mask=t_in, other=0.0)
        else:
            B_t = B_all

        if chunk_states is not None and (t0 - begin) % chunk == 0:
            saved = (first_chunk + (t0 - begin) // chunk) * states_size
            tl.store(chunk_states + saved + state_offsets, h, mask=state_in)
        step = step_size(delta_t, bias, inside_now, SOFTPLUS)[0]
        decay = tl.math.exp2(broadcast_states(step) * decay_rate[None])
        inputs = broadcast_states(step * u_t) * B_t
        decayed = decay * h[None]
        if reset is not None:
            flags = tl.load(reset + row * reset_strides[0] + (t0 + t) * reset_strides[1], mask=t0 + t < end, other=0)
            reset_t = (flags != 0)[:, None, None, None, None]
            decay = tl.where(reset_t, RESET, decay)
            decayed = tl.where(reset_t, 0.0, decayed)
            inputs = tl.where(index == 0, inputs + decayed, inputs)
            states = tl.associative_scan((decay, inputs), 0, combine_mark)[1]
            any_reset = tl.maximum(any_reset, tl.max(flags.to(tl.int32), 0))
        else:
            inputs = tl.where(index == 0, inputs + decayed, inputs)
            states = tl.associative_scan((decay, inputs), 0, combine)[1]
        h = last_step(states, index)

        if out is None:
            step_sum += tl.sum(step, 0)
        else:
            if C_VARIES:
                C_t = broadcast_channels(C_next.to(dtype))
                C_next = tl.load(C_tile + ahead * C_strides[3], mask=t_in, other=0.0)
            else:
                C_t = C_all
            y = sum_states(states * C_t)
            if D is not None:
                y += skip[None] * u_t
            if z is not None:
                z_t = z_next.to(dtype)
                z_next = tl.load(z_tile + ahead * z_strides[2], mask=inside, other=0.0)
                y *= z_t * sigmoid(z_t)
            tl.store(out_tile + t0 * out_strides[2], y.to(out.dtype.element_ty), mask=inside_now)

    if out is None:
        decay = tl.math.exp2(step_sum[None, :, None, :] * decay_rate)
        decay = tl.where(any_reset[:, None, None, None] != 0, RESET, decay)
        tl.store(decays + segment * states_size + state_offsets, decay, mask=state_in)
        tl.store(last_state + segment * states_size + state_offsets, h, mask=state_in)
    elif is_last:
        tl.store(last_state + sequence * states_size + state_offsets, h, mask=state_in)


def forward(inputs: ScanInputs, chunk: int, *, segment_length: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``segment_length``, a multiple of chunk and T, forces a cut."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens, delta_softplus, _ = inputs
    out, last_state, chunk_states = forward_outputs(inputs, chunk)
    reset = runtime.as_bytes(reset)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    tiles = Tiles.of(inputs, chunk, segment_length, backward=False)

    def launch_pass(first: Tensor | None, per_segment: bool, outputs: tuple[Tensor | None, ...]) -> None:
        y, last, chunks, decays = outputs
        runtime.launch(
            forward_kernel,
            tiles.programs,
            *(u, delta, A, B, C, D, z, delta_bias, first, reset, cu_seqlens),
            *outputs,
            runtime.strides(u, 3),
            runtime.strides(delta, 3),
            runtime.strides(A, 2),
            projection_strides(B),
            projection_strides(C),
            *runtime.strides(D, 1),
            runtime.strides(z, 3),
            *runtime.strides(delta_bias, 1),
            runtime.strides(first, 3),
            runtime.strides(reset, 2),
            runtime.strides(y, 3),
            *tiles.sizes,
            chunk or tiles.segment_length,
            SOFTPLUS=delta_softplus,
            B_VARIES=B.dim() == 4,
            C_VARIES=C.dim() == 4,
            INCOMING_PER_SEGMENT=per_segment,
            **tiles.shape,
        )

    with runtime.on_device(u):
        chunks = chunk_states if chunk else None
        if tiles.whole:
            launch_pass(initial_state, False, (out, last_state, chunks, None))
        else:
            end_states = torch.empty((tiles.segments, *A.shape), dtype=A.dtype, device=A.device)
            decays = torch.empty_like(end_states)
            launch_pass(None, False, (None, end_states, None, decays))
            incoming = pass_state(initial_state, end_states, decays, cu_seqlens, tiles, reverse=False)
            launch_pass(incoming, True, (out, last_state, chunks, None))
    return out, last_state, chunk_states
