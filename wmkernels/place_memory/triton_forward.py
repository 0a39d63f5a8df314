"""Place memory, forward, in Triton.

A program takes 16 channels of a group of a sequence, through all steps. Per step: each block of the state is read, the
view's product by ``mix`` is turned into it, and it is written back; then all blocks are turned to the new angle and
multiplied by the keys, which gives the output and what the next step's delta write finds. So the state is multiplied
twice per step, not three times.

Bytes: from memory a step's values, gates and phases, to it the output and the residual: 4 KB in float32 for 226 rows,
25 places and 16 channels. The state (14 KB, in the last state's memory), the keys and ``mix`` (23 KB each) stay in the
level-1 cache. Multiply-adds: 4 x frequencies x places per value, 180,000 per step or 1,400 cycles of a multiprocessor,
on the float32 units: "ieee", since tensor cores would round to 10 bits. Latency: a step's blocks follow one another, 4
of 32 frequencies twice, each a load, an exchange through shared memory and a product: some 2,500 cycles. So a step
should take 2 us whatever the batch, up to one program per multiprocessor. Predicted, not measured.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from wmkernels.place_memory.triton_device import bounds_of, collect, is_set, load_rows, only_if, store_rows, write_step


@triton.jit
def forward_kernel(
    values,  # (batch, time, places, channels)
    phase,  # (batch, time, groups, 2 frequencies)
    keys,  # (places, 2 frequencies), contiguous
    mix,  # as keys: inverse times keys
    gate,  # (batch, time, places, groups) or None
    initial_state,  # (sequences, groups, 2 frequencies, channels) or None
    initial_phase,  # (sequences, groups, 2 frequencies) or None
    reset,  # (batch, time) bytes or None
    cu_seqlens,  # (sequences + 1,) or None
    out,  # as values, contiguous
    last_state,  # as initial_state, contiguous
    residual,  # as values, contiguous, or None
    views,  # (sequences, groups, places, channels): what the next step writes
    values_strides,
    phase_strides,
    gate_strides,
    state_strides,
    initial_strides,
    reset_strides,
    time,
    places,
    frequencies,
    channels,  # of a group
    groups,
    tiles,
    DELTA: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    dtype: tl.constexpr,
):
    program = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, group = program // groups, program % groups
    row, begin, end = bounds_of(cu_seqlens, sequence, time)
    d = (tl.program_id(0) % tiles) * CHANNELS + tl.arange(0, CHANNELS)
    values += row * values_strides[0] + group * channels * values_strides[3]
    phase += row * phase_strides[0] + group * phase_strides[2]
    if gate is not None:
        gate += row * gate_strides[0] + group * gate_strides[3]
    if initial_phase is not None:
        initial_phase += sequence * initial_strides[0] + group * initial_strides[1]
    if reset is not None:
        reset += row * reset_strides[0]
    state = last_state + program * 2 * frequencies * channels
    views += program * places * channels
    width = groups * channels  # of a place in out
    start = (row * time * places) * width + group * channels

    for first in range(0, frequencies, FREQUENCIES):
        f = first + tl.arange(0, FREQUENCIES)
        x = tl.zeros([FREQUENCIES, CHANNELS], dtype)
        y = tl.zeros([FREQUENCIES, CHANNELS], dtype)
        if initial_state is not None:
            here = initial_state + sequence * state_strides[0] + group * state_strides[1]
            x, y = load_rows(here, f, d, frequencies, channels, state_strides[2], state_strides[3], dtype)
        store_rows(state, x, y, f, d, frequencies, channels)
    tl.debug_barrier()

    # At `now`, step now - 1 has been written; it is read, and the write of step `now` prepared.
    for step in range(end - begin + 1):
        now = begin + step
        if now > begin:
            is_reset = is_set(reset, reset_strides[1], now - 1, now > begin)
            write_step(
                mix,
                views,
                state,
                state,
                None,
                phase,
                initial_phase,
                phase_strides,
                initial_strides[2],
                now - 1,
                begin,
                is_reset,
                d,
                frequencies,
                places,
                channels,
                FREQUENCIES,
                PLACES,
                dtype,
            )
            tl.debug_barrier()
        is_reset = is_set(reset, reset_strides[1], now, now < end)
        for first in range(0, places, PLACES):
            j = first + tl.arange(0, PLACES)
            d_in = (d < channels)[None, :]
            before = (j < only_if(now > begin, places))[:, None] & d_in
            ahead = (j < only_if(now < end, places))[:, None] & d_in
            here = values + now * values_strides[1] + j[:, None] * values_strides[2] + d[None, :] * values_strides[3]
            view = tl.load(here, mask=ahead, other=0.0).to(dtype)
            held = collect(
                keys,
                state,
                phase,
                initial_phase,
                phase_strides,
                initial_strides[2],
                now,
                begin,
                False,
                j,
                d,
                frequencies,
                places,
                channels,
                FREQUENCIES,
                dtype,
            )
            at = start + (now * places + j[:, None]) * width + d[None, :]
            tl.store(out + at - places * width, held.to(out.dtype.element_ty), mask=before)
            if DELTA:
                view -= tl.where(is_reset, 0.0, held)
            if residual is not None:
                tl.store(residual + at, view, mask=ahead)
            if gate is not None:
                here = gate + now * gate_strides[1] + j * gate_strides[2]
                view *= tl.load(here, mask=j < only_if(now < end, places), other=0.0)[:, None]
            tl.store(views + j[:, None] * channels + d[None, :], view, mask=ahead)
        tl.debug_barrier()
