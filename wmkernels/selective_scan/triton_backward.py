"""Selective scan, backward, in Triton.

A program takes a tile of channels through one sequence, or a segment of it, from the end, chunk by chunk. It first
runs each chunk forward from its saved state and parks the state before every T steps in scratch that stays in cache;
then, T steps at a time and backwards, it has the states and their gradients side by side in registers
(triton_device.py says how a tile lies in the threads). With lam_t = dL/dh_t = C_t gy_t + exp(step_{t+1} A) lam_{t+1},
all gradients are sums:

    over states    du_t    = D gy_t + step_t lam_t . B_t        dstep_t = u_t lam_t . B_t + (lam_t kept_t) . A
    over channels  dB_t    = lam_t step_t u_t                   dC_t    = gy_t h_t
    over time      dA      = lam_t kept_t step_t                kept_t  = exp(step_t A) h_{t-1}

Sums over channels go to one partial result a tile, sums over time to one a segment, both added up in a fixed order by
a second kernel: no atomics, the same result every time. An element costs two exponentials a state and some forty
other instructions, which bound it. Where batch x channels is too small to fill the chip, sequences are cut into
segments as in the forward pass, the gradient that leaves each found first.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from wmkernels.selective_scan.triton_device import (
    LN2,
    RESET,
    first_chunk_slot,
    flow_back,
    follow,
    follow_kept,
    follow_kept_reset,
    follow_reset,
    last_step,
    load_rates,
    load_resets,
    load_steps,
    locate,
    over_channels,
    over_states,
    own_channels,
    sigmoid,
    state_numbers,
    step_size,
    sum_channels,
    sum_states,
)


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
    entering,  # (sequences or slots, channels, state) or None: the gradient that comes from after the segment
    scratch,  # (programs, chunk / T, NI, D1, NL, DL): the state before every tile of a chunk
    grad_u,
    grad_delta,
    grad_z,
    A_parts,  # (slots, channels, state)
    B_parts,  # (group_tiles, batch, groups, time, state), or (slots, channels, state) where B is constant
    C_parts,  # likewise
    D_parts,  # (slots, channels) or None
    bias_parts,  # (slots, channels) or None
    grad_initial_state,  # (sequences, channels, state) or None
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
    entering_strides,
    output_strides,  # of grad_u, grad_delta and grad_z alike
    batch,
    channels,
    state,
    time,
    sequences,
    group_channels,
    group_tiles,
    tiles,
    segment,
    slots_each,
    chunk,
    SOFTPLUS: tl.constexpr,
    B_VARIES: tl.constexpr,
    C_VARIES: tl.constexpr,
    ENTERING_BY_SLOT: tl.constexpr,
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
    state_offsets = d4 * state + n4
    states_size = tl.full((), state, tl.int64) * channels
    decay_rate, bias = load_rates(A, A_strides, d4, n4, state_in, delta_bias, bias_stride, d, d_in)
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
    # One partial result of dB and dC a tile of the group, (time, state).
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

    flow = tl.zeros([NI, D1, NL, DL], dtype)
    if entering is not None:
        place = slot if ENTERING_BY_SLOT else sequence
        pointers = entering + place * entering_strides[0] + d4 * entering_strides[1] + n4 * entering_strides[2]
        flow = tl.load(pointers, mask=state_in, other=0.0)
    index = tl.arange(0, T)[:, None, None, None, None] + tl.zeros([T, NI, D1, NL, DL], tl.int32)
    A_sum = tl.zeros([NI, D1, NL, DL], dtype)
    if not B_VARIES:
        B_sum = tl.zeros([NI, D1, NL, DL], dtype)
    if not C_VARIES:
        C_sum = tl.zeros([NI, D1, NL, DL], dtype)
    D_sum = tl.zeros([D1, DL], dtype)
    bias_sum = tl.zeros([D1, DL], dtype)
    slot_before = first_chunk_slot(sequence, begin, cu_seqlens, time, chunk)

    chunks = (end - start + chunk - 1) // chunk
    for chunk_back in range(chunks):
        chunk_start = start + (chunks - 1 - chunk_back) * chunk
        chunk_end = tl.minimum(chunk_start + chunk, end)
        saved = (slot_before + (chunk_start - begin) // chunk) * states_size
        h = tl.load(chunk_states + saved + state_offsets, mask=state_in, other=0.0)
        # Forward through all but the last tile, which is whole, keeping the state before each.
        last_tile = (chunk_end - chunk_start - 1) // T
        for i in range(last_tile):
            t0 = chunk_start + i * T
            tl.store(scratch_tile + i * scratch_step, h)
            inside = d_in[None] & (t3 < T)
            u_t = load_steps(u_tile, u_strides[2], t0, inside, dtype)
            step = step_size(load_steps(delta_tile, delta_strides[2], t0, inside, dtype), bias, inside, SOFTPLUS)[0]
            if B_VARIES:
                B_t = over_channels(load_steps(B_tile, B_strides[3], t0, (n3 < state) & (t3 < T), dtype))
            decay = tl.math.exp2(over_states(step) * decay_rate[None])
            inputs = over_states(step * u_t) * B_t
            carried = tl.where(index == 0, decay * h[None], 0.0)
            if reset is not None:
                forgets = load_resets(reset, row, reset_strides, t0 + t, chunk_end)
                carried = tl.where(forgets != 0, 0.0, carried)
                decay = tl.where(forgets != 0, RESET, decay)
                states = tl.associative_scan((decay, inputs + carried), 0, follow_reset)[1]
            else:
                states = tl.associative_scan((decay, inputs + carried), 0, follow)[1]
            h = last_step(states, index)
        # Another thread may read what this one wrote.
        tl.debug_barrier()

        for i_back in range(last_tile + 1):
            i = last_tile - i_back
            t0 = chunk_start + i * T
            if i_back > 0:
                h = tl.load(scratch_tile + i * scratch_step)
            inside = (t0 + t3 < chunk_end) & d_in[None]
            t_in = (t0 + t3 < chunk_end) & (n3 < state)
            u_t = load_steps(u_tile, u_strides[2], t0, inside, dtype)
            gy = load_steps(grad_tile, grad_strides[2], t0, inside, dtype)
            step, raw = step_size(load_steps(delta_tile, delta_strides[2], t0, inside, dtype), bias, inside, SOFTPLUS)
            if B_VARIES:
                B_t = over_channels(load_steps(B_tile, B_strides[3], t0, t_in, dtype))
            if C_VARIES:
                C_t = over_channels(load_steps(C_tile, C_strides[3], t0, t_in, dtype))
            if z is not None:
                z_t = load_steps(z_tile, z_strides[2], t0, inside, dtype)
                open_t = sigmoid(z_t)
                gate_slope = gy * (open_t * (1.0 + z_t * (1.0 - open_t)))
                gy = gy * (z_t * open_t)
            decay = tl.math.exp2(over_states(step) * decay_rate[None])  # (T, NI, D1, NL, DL)
            inputs = over_states(step * u_t) * B_t
            carried = tl.where(index == 0, decay * h[None], 0.0)
            marked = decay
            forgets = None
            if reset is not None:
                forgets = load_resets(reset, row, reset_strides, t0 + t, chunk_end)
                carried = tl.where(forgets != 0, 0.0, carried)
                marked = tl.where(forgets != 0, RESET, decay)
                scanned = tl.associative_scan((marked, inputs + carried, carried), 0, follow_kept_reset)
            else:
                scanned = tl.associative_scan((marked, inputs + carried, carried), 0, follow_kept)
            states, kept = scanned[1], scanned[2]
            # The states are used up before their gradients come, for the sake of registers.
            grad_C = over_states(gy) * states
            if C_VARIES:
                tl.store(C_parts + partial_offsets + t0 * state, sum_channels(grad_C), mask=t_in)
            else:
                C_sum += tl.sum(grad_C, 0)
            if z is not None:
                y = sum_states(states * C_t)
                if D is not None:
                    y += skip * u_t
                grad_z_t = (gate_slope * y).to(grad_z.dtype.element_ty)
                tl.store(grad_z + output_offsets + t0 * output_strides[2], grad_z_t, mask=inside)

            lam, flow = flow_back(decay, over_states(gy) * C_t, flow, forgets, index, T)
            grad_B = lam * over_states(step * u_t)
            if B_VARIES:
                tl.store(B_parts + partial_offsets + t0 * state, sum_channels(grad_B), mask=t_in)
            else:
                B_sum += tl.sum(grad_B, 0)
            lam_kept = lam * kept
            A_sum += tl.sum(lam_kept * over_states(step), 0)
            through_input = sum_states(lam * B_t)  # (T, D1, DL)
            grad_step = u_t * through_input + LN2 * sum_states(lam_kept * decay_rate[None])
            if SOFTPLUS:
                grad_step = tl.where(raw > 20.0, grad_step, grad_step * sigmoid(raw))
            grad_step = tl.where(inside, grad_step, 0.0)
            bias_sum += tl.sum(grad_step, 0)
            D_sum += tl.sum(gy * u_t, 0)
            grad_u_t = step * through_input
            if D is not None:
                grad_u_t += gy * skip
            places = output_offsets + t0 * output_strides[2]
            tl.store(grad_u + places, grad_u_t.to(grad_u.dtype.element_ty), mask=inside)
            tl.store(grad_delta + places, grad_step.to(grad_delta.dtype.element_ty), mask=inside)
        tl.debug_barrier()

    part = slot * states_size + state_offsets
    tl.store(A_parts + part, A_sum, mask=state_in)
    if not B_VARIES:
        tl.store(B_parts + part, B_sum, mask=state_in)
    if not C_VARIES:
        tl.store(C_parts + part, C_sum, mask=state_in)
    if D_parts is not None:
        tl.store(D_parts + slot * channels + d, D_sum, mask=d_in)
    if bias_parts is not None:
        tl.store(bias_parts + slot * channels + d, bias_sum, mask=d_in)
    if grad_initial_state is not None and piece == 0:
        tl.store(grad_initial_state + sequence * states_size + state_offsets, flow, mask=state_in)
