"""Passes states and state gradients between segments, in Triton."""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.selective_scan.triton_device import (
    broadcast_channels,
    broadcast_states,
    load_decay_rates,
    load_resets,
    load_tile,
    locate_segment,
    reverse_scan,
    silu_gate_backward,
    state_indices,
    step_size,
    tile_channels,
)
from wmkernels.selective_scan.triton_tiles import Tiles
from wmkernels.triton_device import RESET
from wmkernels.triton_device import pass_state as carried


@triton.jit
def segment_gradient_kernel(
    delta,
    A,
    C,
    z,
    delta_bias,
    reset,
    cu_seqlens,
    grad_out,
    segment_dh,  # (segments, channels, state)
    decays,  # as segment_dh; RESET at a reset
    delta_strides,
    A_strides,
    C_strides,
    z_strides,
    bias_stride,
    reset_strides,
    grad_strides,
    channels,
    state,
    time,
    sequences,
    group_channels,
    group_tiles,
    tiles,
    segment_length,
    segments_per_sequence,
    SOFTPLUS: tl.constexpr,
    C_VARIES: tl.constexpr,
    T: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    D1: tl.constexpr,
    DL: tl.constexpr,
):
    dtype: tl.constexpr = A.dtype.element_ty
    tile, segment, group, d, d_in = tile_channels(tiles, group_tiles, group_channels, D1, DL)
    sequence, row, begin, start, end, is_last, local_segment = locate_segment(
        segment, cu_seqlens, sequences, time, segment_length, segments_per_sequence
    )
    n = state_indices(NI, NL).to(tl.int64)
    t = tl.arange(0, T).to(tl.int64)
    d4, n4 = d[None, :, None, :], n[:, None, :, None]
    state_in = d_in[None, :, None, :] & (n4 < state)
    decay_rate = load_decay_rates(A, A_strides, d4, n4, state_in)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + d * bias_stride, mask=d_in, other=0.0)
    t3, d3, n3 = t[:, None, None], d[None], n[None]
    delta_tile = delta + row * delta_strides[0] + d3 * delta_strides[1] + t3 * delta_strides[2]
    grad_tile = grad_out + row * grad_strides[0] + d3 * grad_strides[1] + t3 * grad_strides[2]
    z_tile = z
    if z is not None:
        z_tile = z + row * z_strides[0] + d3 * z_strides[1] + t3 * z_strides[2]
    C_tile = C + row * C_strides[0] + group * C_strides[1] + n3 * C_strides[2] + t3 * C_strides[3]
    if not C_VARIES:
        C_t = tl.load(C + d4 * C_strides[0] + n4 * C_strides[1], mask=state_in, other=0.0)[None]
    index = tl.arange(0, T)[:, None, None, None, None] + tl.zeros([T, NI, D1, NL, DL], tl.int32)
    dh = tl.zeros([NI, D1, NL, DL], dtype)
    step_sum = tl.zeros([D1, DL], dtype)
    any_reset = tl.zeros([1], tl.int32)
    count = (end - start + T - 1) // T
    for back in range(count):
        t0 = start + (count - 1 - back) * T
        inside = (t0 + t3 < end) & d_in[None]
        if C_VARIES:
            C_t = broadcast_channels(load_tile(C_tile, C_strides[3], t0, (t0 + t3 < end) & (n3 < state), dtype))
        step = step_size(load_tile(delta_tile, delta_strides[2], t0, inside, dtype), bias, inside, SOFTPLUS)[0]
        dy = load_tile(grad_tile, grad_strides[2], t0, inside, dtype)
        if z is not None:
            dy = silu_gate_backward(dy, load_tile(z_tile, z_strides[2], t0, inside, dtype))
        decay = tl.math.exp2(broadcast_states(step) * decay_rate[None])
        step_sum += tl.sum(step, 0)
        reset_t = None
        if reset is not None:
            reset_t = load_resets(reset, row, reset_strides, t0 + t, end)
            any_reset = tl.maximum(any_reset, tl.max(tl.reshape(reset_t, [T]), 0))
        dh = reverse_scan(decay, broadcast_states(dy) * C_t, dh, reset_t, index, T)[1]
    decay = tl.math.exp2(step_sum[None, :, None, :] * decay_rate)
    decay = tl.where(any_reset[:, None, None, None] != 0, RESET, decay)
    offset = (segment * channels + d4) * state + n4
    tl.store(decays + offset, decay, mask=state_in)
    tl.store(segment_dh + offset, dh, mask=state_in)


@triton.jit
def pass_state_kernel(
    first,  # as ScanInputs.initial_state; in reverse, the last state's gradient
    incoming_strides,  # of first
    end_states,  # (segments, channels, state)
    decays,  # as end_states; RESET at a reset
    incoming,  # as end_states: output
    cu_seqlens,
    channels,
    state,
    time,
    blocks,
    segment_length,
    segments_per_sequence,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    size = tl.full((), state, tl.int64) * channels
    e = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    if cu_seqlens is None:
        segment = sequence * segments_per_sequence
        count = (time + segment_length - 1) // segment_length
    else:
        begin = tl.load(cu_seqlens + sequence)
        segment = begin // segment_length + sequence
        count = ((tl.load(cu_seqlens + sequence + 1) - begin + segment_length - 1) // segment_length).to(tl.int32)
    count = tl.maximum(count, 1)
    h = tl.zeros([BLOCK], end_states.dtype.element_ty)
    if first is not None:
        offset = sequence * incoming_strides[0] + (e // state) * incoming_strides[1] + (e % state) * incoming_strides[2]
        h = tl.load(first + offset, mask=inside, other=0.0)
    advance = size
    if REVERSE:
        segment += count - 1
        advance = -size
    offset = segment * size + e
    end = tl.load(end_states + offset, mask=inside, other=0.0)
    decay = tl.load(decays + offset, mask=inside, other=0.0)
    for i in range(count):
        tl.store(incoming + offset, h, mask=inside)
        h = tl.where(decay < 0.0, end, carried(decay, end, h))
        offset += advance
        more = e < tl.where(i + 1 < count, size, 0)
        end = tl.load(end_states + offset, mask=more, other=0.0)
        decay = tl.load(decays + offset, mask=more, other=0.0)


PASS_BLOCK = 128


def pass_state(
    first: Tensor | None, end_states: Tensor, decays: Tensor, cu_seqlens: Tensor | None, tiles: Tiles, reverse: bool
) -> Tensor:
    """Each segment's incoming state, or dh in reverse: (segments, channels, state)."""
    _, channels, state = end_states.shape
    incoming = torch.empty_like(end_states)
    blocks = runtime.ceil_div(channels * state, PASS_BLOCK)
    runtime.launch(
        pass_state_kernel,
        blocks * tiles.sequences,
        first,
        runtime.strides(first, 3),
        end_states,
        decays,
        incoming,
        cu_seqlens,
        channels,
        state,
        tiles.time,
        blocks,
        tiles.segment_length,
        tiles.segments_per_sequence,
        REVERSE=reverse,
        BLOCK=PASS_BLOCK,
        num_warps=PASS_BLOCK // 32,
    )
    return incoming
