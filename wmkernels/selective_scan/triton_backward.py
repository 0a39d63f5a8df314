"""Selective scan, backward, in Triton.

A program sweeps a channel tile (triton_device.py) backwards. Per chunk it recomputes states from the saved one, storing
one per T steps in scratch. With dh_t = dL/dh_t = C_t dy_t + exp(step_{t+1} A) dh_{t+1}:

    over states    du_t    = D dy_t + step_t dh_t . B_t         dstep_t   = u_t dh_t . B_t + (dh_t decayed_t) . A
    over channels  dB_t    = dh_t step_t u_t                    dC_t      = dy_t h_t
    over time      dA      = dh_t decayed_t step_t              decayed_t = exp(step_t A) h_{t-1}

Partials are summed in fixed order. An element costs two exponentials per state and about forty other instructions.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from wmkernels.selective_scan.triton_device import (
    broadcast_channels,
    broadcast_states,
    first_chunk_index,
    last_step,
    load_decay_rates,
    load_resets,
    load_tile,
    locate_segment,
    reverse_scan,
    state_indices,
    step_size,
    sum_channels,
    sum_states,
    tile_channels,
)
from wmkernels.triton_device import LN2, RESET, combine, combine_decayed, combine_decayed_mark, combine_mark, sigmoid


@triton.jit
def backward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    reset,
    cu_seqlens,
    chunk_states,
    grad_out,
    incoming,  # dh after the last step, shaped as forward_kernel's incoming_state
    scratch,  # (programs, chunk / T, tile states)
    grad_u,
    grad_delta,
    grad_z,
    A_partials,  # (segments, channels, state)
    B_partials,  # (group_tiles, batch, groups, time, state) or as A_partials
    C_partials,
    D_partials,  # (segments, channels) or None
    bias_partials,  # (segments, channels) or None
    grad_initial_state,  # or None
    u_strides,
    delta_strides,
    A_strides,
    B_strides,
    C_strides,
    D_stride,
    z_strides,
    bias_stride,
    reset_strides,
    grad_strides,
    incoming_strides,
    output_strides,
    batch,
    channels,
    state,
    time,
    sequences,
    group_channels,
    group_tiles,
    tiles,
    segment_length,
    segments_per_sequence,
    chunk,
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
    dtype: tl.constexpr = A.dtype.element_ty
    tile, segment, group, d, d_in = tile_channels(tiles, group_tiles, group_channels, D1, DL)
    sequence, row, begin, start, end, is_last, local_segment = locate_segment(
        segment, cu_seqlens, sequences, time, segment_length, segments_per_sequence
    )
    n = state_indices(NI, NL).to(tl.int64)
    t = tl.arange(0, T).to(tl.int64)
    d4, n4 = d[None, :, None, :], n[:, None, :, None]
    state_in = d_in[None, :, None, :] & (n4 < state)
    state_offsets = d4 * state + n4
    states_size = tl.full((), state, tl.int64) * channels
    decay_rate = load_decay_rates(A, A_strides, d4, n4, state_in)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + d * bias_stride, mask=d_in, other=0.0)
    if D is not None:
        skip = tl.load(D + d * D_stride, mask=d_in, other=0.0)[None]
    if not B_VARIES:
        B_t = tl.load(B + d4 * B_strides[0] + n4 * B_strides[1], mask=state_in, other=0.0)[None]
    if not C_VARIES:
        C_t = tl.load(C + d4 * C_strides[0] + n4 * C_strides[1], mask=state_in, other=0.0)[None]

    t3, d3, n3 = t[:, None, None], d[None], n[None]
    u_tile = u + row * u_strides[0] + d3 * u_strides[1] + t3 * u_strides[2]
    delta_tile = delta + row * delta_strides[0] + d3 * delta_strides[1] + t3 * delta_strides[2]
    grad_tile = grad_out + row * grad_strides[0] + d3 * grad_strides[1] + t3 * grad_strides[2]
    output_offsets = row * output_strides[0] + d3 * output_strides[1] + t3 * output_strides[2]
    B_tile = B + row * B_strides[0] + group * B_strides[1] + n3 * B_strides[2] + t3 * B_strides[3]
    C_tile = C + row * C_strides[0] + group * C_strides[1] + n3 * C_strides[2] + t3 * C_strides[3]
    if z is not None:
        z_tile = z + row * z_strides[0] + d3 * z_strides[1] + t3 * z_strides[2]
    partial_row = (row + (tile % group_tiles) * tl.full((), batch, tl.int64)) * (tiles // group_tiles) + group
    partial_offsets = (partial_row * time + t3) * state + n3
    scratch_step = NI * D1 * NL * DL
    scratch_tile = (
        scratch
        + tl.program_id(0).to(tl.int64) * (chunk // T) * scratch_step
        + tl.arange(0, NI)[:, None, None, None] * (D1 * NL * DL)
        + tl.arange(0, D1)[None, :, None, None] * (NL * DL)
        + tl.arange(0, NL)[None, None, :, None] * DL
        + tl.arange(0, DL)[None, None, None, :]
    )

    dh = tl.zeros([NI, D1, NL, DL], dtype)
    if incoming is not None:
        incoming_row = segment if INCOMING_PER_SEGMENT else sequence
        pointers = incoming + incoming_row * incoming_strides[0] + d4 * incoming_strides[1] + n4 * incoming_strides[2]
        dh = tl.load(pointers, mask=state_in, other=0.0)
    index = tl.arange(0, T)[:, None, None, None, None] + tl.zeros([T, NI, D1, NL, DL], tl.int32)
    A_sum = tl.zeros([NI, D1, NL, DL], dtype)
    if not B_VARIES:
        B_sum = tl.zeros([NI, D1, NL, DL], dtype)
    if not C_VARIES:
        C_sum = tl.zeros([NI, D1, NL, DL], dtype)
    D_sum = tl.zeros([D1, DL], dtype)
    bias_sum = tl.zeros([D1, DL], dtype)
    first_chunk = first_chunk_index(sequence, begin, cu_seqlens, time, chunk)

    chunks = (end - start + chunk - 1) // chunk
    for chunk_back in range(chunks):
        chunk_start = start + (chunks - 1 - chunk_back) * chunk
        chunk_end = tl.minimum(chunk_start + chunk, end)
        saved = (first_chunk + (chunk_start - begin) // chunk) * states_size
        h = tl.load(chunk_states + saved + state_offsets, mask=state_in, other=0.0)
        last_tile = (chunk_end - chunk_start - 1) // T
        for i in range(last_tile):
            t0 = chunk_start + i * T
            tl.store(scratch_tile + i * scratch_step, h)
            inside = d_in[None] & (t3 < T)
            u_t = load_tile(u_tile, u_strides[2], t0, inside, dtype)
            step = step_size(load_tile(delta_tile, delta_strides[2], t0, inside, dtype), bias, inside, SOFTPLUS)[0]
            if B_VARIES:
                B_t = broadcast_channels(load_tile(B_tile, B_strides[3], t0, (n3 < state) & (t3 < T), dtype))
            decay = tl.math.exp2(broadcast_states(step) * decay_rate[None])
            inputs = broadcast_states(step * u_t) * B_t
            decayed = tl.where(index == 0, decay * h[None], 0.0)
            if reset is not None:
                reset_t = load_resets(reset, row, reset_strides, t0 + t, chunk_end)
                decayed = tl.where(reset_t != 0, 0.0, decayed)
                decay = tl.where(reset_t != 0, RESET, decay)
                states = tl.associative_scan((decay, inputs + decayed), 0, combine_mark)[1]
            else:
                states = tl.associative_scan((decay, inputs + decayed), 0, combine)[1]
            h = last_step(states, index)
        # Scratch: a load's layout may differ from the store's, so threads read what others wrote.
        tl.debug_barrier()

        for i_back in range(last_tile + 1):
            i = last_tile - i_back
            t0 = chunk_start + i * T
            if i_back > 0:
                h = tl.load(scratch_tile + i * scratch_step)
            inside = (t0 + t3 < chunk_end) & d_in[None]
            t_in = (t0 + t3 < chunk_end) & (n3 < state)
            u_t = load_tile(u_tile, u_strides[2], t0, inside, dtype)
            dy = load_tile(grad_tile, grad_strides[2], t0, inside, dtype)
            step, raw = step_size(load_tile(delta_tile, delta_strides[2], t0, inside, dtype), bias, inside, SOFTPLUS)
            if B_VARIES:
                B_t = broadcast_channels(load_tile(B_tile, B_strides[3], t0, t_in, dtype))
            if C_VARIES:
                C_t = broadcast_channels(load_tile(C_tile, C_strides[3], t0, t_in, dtype))
            if z is not None:
                z_t = load_tile(z_tile, z_strides[2], t0, inside, dtype)
                open_t = sigmoid(z_t)
                gate_slope = dy * (open_t * (1.0 + z_t * (1.0 - open_t)))
                dy = dy * (z_t * open_t)
            decay = tl.math.exp2(broadcast_states(step) * decay_rate[None])
            inputs = broadcast_states(step * u_t) * B_t
            decayed = tl.where(index == 0, decay * h[None], 0.0)
            marked_decay = decay
            reset_t = None
            if reset is not None:
                reset_t = load_resets(reset, row, reset_strides, t0 + t, chunk_end)
                decayed = tl.where(reset_t != 0, 0.0, decayed)
                marked_decay = tl.where(reset_t != 0, RESET, decay)
                scanned = tl.associative_scan((marked_decay, inputs + decayed, decayed), 0, combine_decayed_mark)
            else:
                scanned = tl.associative_scan((marked_decay, inputs + decayed, decayed), 0, combine_decayed)
            states, decayed_t = scanned[1], scanned[2]
            # dC first, to free registers
            grad_C = broadcast_states(dy) * states
            if C_VARIES:
                tl.store(C_partials + partial_offsets + t0 * state, sum_channels(grad_C), mask=t_in)
            else:
                C_sum += tl.sum(grad_C, 0)
            if z is not None:
                y = sum_states(states * C_t)
                if D is not None:
                    y += skip * u_t
                grad_z_t = (gate_slope * y).to(grad_z.dtype.element_ty)
                tl.store(grad_z + output_offsets + t0 * output_strides[2], grad_z_t, mask=inside)

            dh_t, dh = reverse_scan(decay, broadcast_states(dy) * C_t, dh, reset_t, index, T)
            grad_B = dh_t * broadcast_states(step * u_t)
            if B_VARIES:
                tl.store(B_partials + partial_offsets + t0 * state, sum_channels(grad_B), mask=t_in)
            else:
                B_sum += tl.sum(grad_B, 0)
            dh_decayed = dh_t * decayed_t
            if reset is not None:
                dh_decayed = tl.where(reset_t != 0, 0.0, dh_decayed)
            A_sum += tl.sum(dh_decayed * broadcast_states(step), 0)
            through_input = sum_states(dh_t * B_t)
            grad_step = u_t * through_input + LN2 * sum_states(dh_decayed * decay_rate[None])
            if SOFTPLUS:
                grad_step = tl.where(raw > 20.0, grad_step, grad_step * sigmoid(raw))
            grad_step = tl.where(inside, grad_step, 0.0)
            bias_sum += tl.sum(grad_step, 0)
            D_sum += tl.sum(dy * u_t, 0)
            grad_u_t = step * through_input
            if D is not None:
                grad_u_t += dy * skip
            offsets = output_offsets + t0 * output_strides[2]
            tl.store(grad_u + offsets, grad_u_t.to(grad_u.dtype.element_ty), mask=inside)
            tl.store(grad_delta + offsets, grad_step.to(grad_delta.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # before the next chunk overwrites scratch

    partial_h_offsets = segment * states_size + state_offsets
    tl.store(A_partials + partial_h_offsets, A_sum, mask=state_in)
    if not B_VARIES:
        tl.store(B_partials + partial_h_offsets, B_sum, mask=state_in)
    if not C_VARIES:
        tl.store(C_partials + partial_h_offsets, C_sum, mask=state_in)
    if D_partials is not None:
        tl.store(D_partials + segment * channels + d, D_sum, mask=d_in)
    if bias_partials is not None:
        tl.store(bias_partials + segment * channels + d, bias_sum, mask=d_in)
    if grad_initial_state is not None and local_segment == 0:
        tl.store(grad_initial_state + sequence * states_size + state_offsets, dh, mask=state_in)
