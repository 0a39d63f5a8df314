"""What passes between the segments of a sequence that several programs share (Triton).

Forward, forward_kernel finds what each segment adds to the state and how much of the state before it gets through;
backward, outflow_kernel does so for the gradient. chain_kernel then walks the few segments of each sequence in order.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.selective_scan.triton_device import (
    RESET,
    flow_back,
    load_rates,
    load_resets,
    load_steps,
    locate,
    over_channels,
    over_states,
    own_channels,
    state_numbers,
    step_size,
    through_silu,
)
from wmkernels.selective_scan.triton_tiles import Tiles


@triton.jit
def outflow_kernel(
    delta,
    A,
    C,
    z,
    delta_bias,
    reset,
    cu_seqlens,
    grad_out,
    flows,  # (slots, channels, state): output, the gradient a segment sends to the past when none enters it
    decays,  # (slots, channels, state): output, how much of what enters gets through
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
    segment,
    slots_each,
    SOFTPLUS: tl.constexpr,
    C_VARIES: tl.constexpr,
    T: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    D1: tl.constexpr,
    DL: tl.constexpr,
):
    dtype: tl.constexpr = A.dtype.element_ty
    tile, slot, group, d, d_in = own_channels(tiles, group_tiles, group_channels, D1, DL)
    sequence, row, begin, start, end, is_last, piece = locate(slot, cu_seqlens, sequences, time, segment, slots_each)
    n = state_numbers(NI, NL).to(tl.int64)
    t = tl.arange(0, T).to(tl.int64)
    d4, n4 = d[None, :, None, :], n[:, None, :, None]
    state_in = d_in[None, :, None, :] & (n4 < state)
    decay_rate, bias = load_rates(A, A_strides, d4, n4, state_in, delta_bias, bias_stride, d, d_in)
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
    flow = tl.zeros([NI, D1, NL, DL], dtype)
    step_sum = tl.zeros([D1, DL], dtype)
    forgotten = tl.zeros([1], tl.int32)
    count = (end - start + T - 1) // T
    for back in range(count):
        t0 = start + (count - 1 - back) * T
        inside = (t0 + t3 < end) & d_in[None]
        if C_VARIES:
            C_t = over_channels(load_steps(C_tile, C_strides[3], t0, (t0 + t3 < end) & (n3 < state), dtype))
        step = step_size(load_steps(delta_tile, delta_strides[2], t0, inside, dtype), bias, inside, SOFTPLUS)[0]
        gy = load_steps(grad_tile, grad_strides[2], t0, inside, dtype)
        if z is not None:
            gy = through_silu(gy, load_steps(z_tile, z_strides[2], t0, inside, dtype))
        decay = tl.math.exp2(over_states(step) * decay_rate[None])
        step_sum += tl.sum(step, 0)
        forgets = None
        if reset is not None:
            forgets = load_resets(reset, row, reset_strides, t0 + t, end)
            forgotten = tl.maximum(forgotten, tl.max(tl.reshape(forgets, [T]), 0))
        flow = flow_back(decay, over_states(gy) * C_t, flow, forgets, index, T)[1]
    decay = tl.math.exp2(step_sum[None, :, None, :] * decay_rate)
    decay = tl.where(forgotten[:, None, None, None] != 0, RESET, decay)
    place = (slot * channels + d4) * state + n4
    tl.store(decays + place, decay, mask=state_in)
    tl.store(flows + place, flow, mask=state_in)


@triton.jit
def chain_kernel(
    first,  # (sequences, channels, state) or None: what enters each sequence
    first_strides,
    ends,  # (slots, channels, state): what each segment adds
    decays,  # (slots, channels, state): and how much of what enters it gets through; RESET: none
    enters,  # (slots, channels, state): output, what enters each segment
    cu_seqlens,
    channels,
    state,
    time,
    blocks,
    segment,
    slots_each,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    size = tl.full((), state, tl.int64) * channels
    e = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    if cu_seqlens is None:
        slot = sequence * slots_each
        count = (time + segment - 1) // segment
    else:
        begin = tl.load(cu_seqlens + sequence)
        slot = begin // segment + sequence
        count = ((tl.load(cu_seqlens + sequence + 1) - begin + segment - 1) // segment).to(tl.int32)
    count = tl.maximum(count, 1)
    carry = tl.zeros([BLOCK], ends.dtype.element_ty)
    if first is not None:
        place = sequence * first_strides[0] + (e // state) * first_strides[1] + (e % state) * first_strides[2]
        carry = tl.load(first + place, mask=inside, other=0.0)
    advance = size
    if REVERSE:
        slot += count - 1
        advance = -size
    place = slot * size + e
    end = tl.load(ends + place, mask=inside, other=0.0)
    decay = tl.load(decays + place, mask=inside, other=0.0)
    for i in range(count):
        tl.store(enters + place, carry, mask=inside)
        # Nothing times an infinite growth is nothing, as it would be step by step.
        carry = tl.where((decay < 0.0) | (carry == 0.0), end, decay * carry + end)
        place += advance
        more = e < tl.where(i + 1 < count, size, 0)
        end = tl.load(ends + place, mask=more, other=0.0)
        decay = tl.load(decays + place, mask=more, other=0.0)


CHAIN_BLOCK = 128


def chain(
    first: Tensor | None, ends: Tensor, decays: Tensor, cu_seqlens: Tensor | None, tiles: Tiles, reverse: bool
) -> Tensor:
    """(slots, channels, state): what enters each segment."""
    _, channels, state = ends.shape
    enters = torch.empty_like(ends)
    blocks = runtime.ceil_div(channels * state, CHAIN_BLOCK)
    runtime.launch(
        chain_kernel,
        blocks * tiles.sequences,
        first,
        runtime.strides(first, 3),
        ends,
        decays,
        enters,
        cu_seqlens,
        channels,
        state,
        tiles.time,
        blocks,
        tiles.segment,
        tiles.slots_each,
        REVERSE=reverse,
        BLOCK=CHAIN_BLOCK,
        num_warps=CHAIN_BLOCK // 32,
    )
    return enters
