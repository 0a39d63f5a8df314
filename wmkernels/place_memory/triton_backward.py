"""Place memory, backward, in Triton.

The state's gradient dh runs through the steps in reverse, by the forward pass's two products: keys spread the gradients
of what was read to it, ``mix`` collects those of what was written. States are needed only by gradients of phases, keys.
``states_kernel`` then recomputes them from the residuals, which need no reads, and saves one per STEPS steps; the sweep
recomputes the states of STEPS steps before it reverses them. So a step costs the forward pass's multiply-adds, with
phases twice those, two states written and three read, and four barriers more; with keys twice those again.

Sums over channels, for the gradients of phases and gates, are partial per tile and added in order afterwards; those of
keys and ``mix`` are per program, and the launcher makes gradients of keys and inverse of them.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from wmkernels.place_memory.triton_device import (
    bounds_of,
    collect,
    is_set,
    load_rows,
    only_if,
    phase_of,
    spread,
    store_rows,
    write_step,
)


@triton.jit
def load_view(source, strides, t, exists, j, d, places, channels, dtype: tl.constexpr):
    """(PLACES, CHANNELS) of a step that may not exist; zeros then, or if ``source`` is None."""
    if source is None:
        view = tl.zeros([j.shape[0], d.shape[0]], dtype)
    else:
        inside = (j < only_if(exists, places))[:, None] & (d < channels)[None, :]
        here = source + t * strides[1] + j[:, None] * strides[2] + d[None, :] * strides[3]
        view = tl.load(here, mask=inside, other=0.0).to(dtype)
    return view


@triton.jit
def store_view(views, view, j, d, places, channels):
    inside = (j < places)[:, None] & (d < channels)[None, :]
    tl.store(views + j[:, None] * channels + d[None, :], view, mask=inside)


@triton.jit
def written_view(
    residual, residual_strides, gate, gate_strides, t, exists, j, d, places, channels, dtype: tl.constexpr
):
    """What step t writes; zeros if there is no such step."""
    view = load_view(residual, residual_strides, t, exists, j, d, places, channels, dtype)
    if gate is not None:
        here = gate + t * gate_strides[1] + j * gate_strides[2]
        view *= tl.load(here, mask=j < only_if(exists, places), other=0.0)[:, None]
    return view


@triton.jit
def prepare_write(
    views,
    residual,
    residual_strides,
    gate,
    gate_strides,
    t,
    d,
    places,
    channels,
    PLACES: tl.constexpr,
    dtype: tl.constexpr,
):
    """``views``: what step t writes."""
    for first in range(0, places, PLACES):
        j = first + tl.arange(0, PLACES)
        view = written_view(residual, residual_strides, gate, gate_strides, t, t >= 0, j, d, places, channels, dtype)
        store_view(views, view, j, d, places, channels)


@triton.jit
def states_kernel(
    residual,  # (batch, time, places, channels): of a delta write, else values
    phase,  # inputs as in forward_kernel
    mix,
    gate,
    initial_state,
    initial_phase,
    reset,
    cu_seqlens,
    states,  # (sequences + time // STEPS of each row, groups, 2 frequencies, channels): before steps 0, STEPS, ...
    work,  # (sequences, groups, 2 STEPS, 2 frequencies, channels)
    views,  # (sequences, groups, places, channels)
    residual_strides,
    phase_strides,
    gate_strides,
    state_strides,
    initial_strides,
    reset_strides,
    time,
    places,
    frequencies,
    channels,
    groups,
    tiles,
    STEPS: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    dtype: tl.constexpr,
):
    program = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, group = program // groups, program % groups
    row, begin, end = bounds_of(cu_seqlens, sequence, time)
    d = (tl.program_id(0) % tiles) * CHANNELS + tl.arange(0, CHANNELS)
    residual += row * residual_strides[0] + group * channels * residual_strides[3]
    phase += row * phase_strides[0] + group * phase_strides[2]
    if gate is not None:
        gate += row * gate_strides[0] + group * gate_strides[3]
    if initial_phase is not None:
        initial_phase += sequence * initial_strides[0] + group * initial_strides[1]
    if reset is not None:
        reset += row * reset_strides[0]
    size = 2 * frequencies * channels
    views += program * places * channels
    work += program * 2 * STEPS * size
    slot = row * (time // STEPS + 1)
    if cu_seqlens is not None:
        slot = begin // STEPS + sequence
    states += (slot * groups + group) * size

    for first in range(0, frequencies, FREQUENCIES):
        f = first + tl.arange(0, FREQUENCIES)
        x = tl.zeros([FREQUENCIES, CHANNELS], dtype)
        y = tl.zeros([FREQUENCIES, CHANNELS], dtype)
        if initial_state is not None:
            here = initial_state + sequence * state_strides[0] + group * state_strides[1]
            x, y = load_rows(here, f, d, frequencies, channels, state_strides[2], state_strides[3], dtype)
        store_rows(states, x, y, f, d, frequencies, channels)
    for t in range(begin, end):
        prepare_write(views, residual, residual_strides, gate, gate_strides, t, d, places, channels, PLACES, dtype)
        tl.debug_barrier()
        local = t - begin
        source, target = work, work
        if local % STEPS == 0:
            source = states + local // STEPS * groups * size
        if (local + 1) % STEPS == 0:
            target = states + (local + 1) // STEPS * groups * size
        write_step(
            mix,
            views,
            source,
            target,
            None,
            phase,
            initial_phase,
            phase_strides,
            initial_strides[2],
            t,
            begin,
            is_set(reset, reset_strides[1], t, t < end),
            d,
            frequencies,
            places,
            channels,
            FREQUENCIES,
            PLACES,
            dtype,
        )
        tl.debug_barrier()


@triton.jit
def add_outer(sums, view, u, v, f, j, frequencies, places):
    """``sums`` (places, 2 frequencies) plus ``view`` (places, channels) times u, v, over channels."""
    inside = (j < places)[:, None] & (f < frequencies)[None, :]
    here = sums + j[:, None] * (2 * frequencies) + f[None, :]
    found = tl.dot(view, tl.trans(u), tl.load(here, mask=inside, other=0.0), input_precision="ieee", out_dtype=u.dtype)
    tl.store(here, found, mask=inside)
    here += frequencies
    found = tl.dot(view, tl.trans(v), tl.load(here, mask=inside, other=0.0), input_precision="ieee", out_dtype=u.dtype)
    tl.store(here, found, mask=inside)


@triton.jit
def add_phase_gradient(grad_phase, grad_initial_phase, cos, sin, t, begin, add, f, frequencies, groups):
    """Of the phase of the write of step t; added to what is there, or stored."""
    here = grad_phase + (t - 1) * groups * 2 * frequencies + f
    later = f < only_if(t > begin, frequencies)
    tl.store(here, cos + tl.load(here, mask=f < only_if((t > begin) & add, frequencies), other=0.0), mask=later)
    here += frequencies
    tl.store(here, sin + tl.load(here, mask=f < only_if((t > begin) & add, frequencies), other=0.0), mask=later)
    if grad_initial_phase is not None:
        here = grad_initial_phase + f
        first = f < only_if(t == begin, frequencies)
        tl.store(here, cos + tl.load(here, mask=f < only_if((t == begin) & add, frequencies), other=0.0), mask=first)
        here += frequencies
        tl.store(here, sin + tl.load(here, mask=f < only_if((t == begin) & add, frequencies), other=0.0), mask=first)


@triton.jit
def backward_kernel(
    grad_out,  # (batch, time, places, channels) or None
    grad_last_state,  # (sequences, groups, 2 frequencies, channels) or None
    residual,  # inputs as in states_kernel
    phase,
    keys,
    mix,
    gate,
    initial_phase,
    reset,
    cu_seqlens,
    states,  # None without gradients of phases or keys
    work,
    views,
    grads,  # as views: gradient of what was read last
    grad_values,  # contiguous
    grad_phase,  # (tiles, batch, time, groups, 2 frequencies) or None
    grad_gate,  # (tiles, batch, time, places, groups) or None
    grad_state,  # contiguous; dh meanwhile
    grad_initial_phase,  # (tiles, sequences, groups, 2 frequencies) or None
    key_sums,  # (programs, 2, places, 2 frequencies), zero, or None: gradients of keys as read, and of mix
    grad_out_strides,
    grad_last_strides,
    residual_strides,
    phase_strides,
    gate_strides,
    initial_strides,
    reset_strides,
    rows,  # of the batch
    time,
    places,
    frequencies,
    channels,
    groups,
    sequences,
    tiles,
    DELTA: tl.constexpr,
    STEPS: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    dtype: tl.constexpr,
):
    program = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, group = program // groups, program % groups
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    row, begin, end = bounds_of(cu_seqlens, sequence, time)
    d = tile.to(tl.int32) * CHANNELS + tl.arange(0, CHANNELS)
    residual += row * residual_strides[0] + group * channels * residual_strides[3]
    phase += row * phase_strides[0] + group * phase_strides[2]
    if grad_out is not None:
        grad_out += row * grad_out_strides[0] + group * channels * grad_out_strides[3]
    if gate is not None:
        gate += row * gate_strides[0] + group * gate_strides[3]
        grad_gate += (tile * rows + row) * time * places * groups + group
    if initial_phase is not None:
        initial_phase += sequence * initial_strides[0] + group * initial_strides[1]
    if reset is not None:
        reset += row * reset_strides[0]
    size = 2 * frequencies * channels
    dh = grad_state + program * size
    grads += program * places * channels
    views += program * places * channels
    if states is not None:
        slot = row * (time // STEPS + 1)
        if cu_seqlens is not None:
            slot = begin // STEPS + sequence
        states += (slot * groups + group) * size
        work += program * 2 * STEPS * size
        if grad_phase is not None:
            grad_phase += ((tile * rows + row) * time * groups + group) * 2 * frequencies
        if grad_initial_phase is not None:
            grad_initial_phase += ((tile * sequences + sequence) * groups + group) * 2 * frequencies
    if key_sums is not None:
        key_sums += (program * tiles + tile) * 4 * places * frequencies
    width = groups * channels
    start = row * time * places * width + group * channels

    for first in range(0, frequencies, FREQUENCIES):
        f = first + tl.arange(0, FREQUENCIES)
        x = tl.zeros([FREQUENCIES, CHANNELS], dtype)
        y = tl.zeros([FREQUENCIES, CHANNELS], dtype)
        if grad_last_state is not None:
            here = grad_last_state + sequence * grad_last_strides[0] + group * grad_last_strides[1]
            x, y = load_rows(here, f, d, frequencies, channels, grad_last_strides[2], grad_last_strides[3], dtype)
        store_rows(dh, x, y, f, d, frequencies, channels)

    for first in range(0, places, PLACES):
        j = first + tl.arange(0, PLACES)
        view = load_view(grad_out, grad_out_strides, end - 1, end > begin, j, d, places, channels, dtype)
        store_view(grads, view, j, d, places, channels)
    tl.debug_barrier()

    # At `now`, `grads` is the gradient of what was read after step t, and dh that of the state after step `now`.
    for back in range(0, end - begin + 1):
        now = end - back
        t = now - 1
        exists = now > begin
        local = t - begin
        cut = is_set(reset, reset_strides[1], now, now < end)
        is_reset = is_set(reset, reset_strides[1], t, exists)
        # without a gradient of what was read, its phase and state are in no product: they may be NaN
        was_read = now < begin
        if grad_out is not None:
            was_read = exists
        if DELTA:
            was_read = was_read | ((now < end) & (cut == 0))
        if states is not None:
            ends_chunk = exists & ((now == end) | ((local + 1) % STEPS == 0))
            for s in range(tl.where(ends_chunk, now - 1 - local % STEPS, now), now):
                prepare_write(
                    views, residual, residual_strides, gate, gate_strides, s, d, places, channels, PLACES, dtype
                )
                tl.debug_barrier()
                index = (s - begin) % STEPS
                source = work + (index - 1) * size
                if index == 0:
                    source = states + local // STEPS * groups * size
                write_step(
                    mix,
                    views,
                    source,
                    work + index * size,
                    work + (STEPS + index) * size,
                    phase,
                    initial_phase,
                    phase_strides,
                    initial_strides[2],
                    s,
                    begin,
                    is_set(reset, reset_strides[1], s, s < end),
                    d,
                    frequencies,
                    places,
                    channels,
                    FREQUENCIES,
                    PLACES,
                    dtype,
                )
                tl.debug_barrier()

        for first in range(0, frequencies, FREQUENCIES):
            f = first + tl.arange(0, FREQUENCIES)
            dx, dy = load_rows(dh, f, d, frequencies, channels, channels, 1, dtype)
            dx, dy = tl.where(cut, 0.0, dx), tl.where(cut, 0.0, dy)
            u, v = spread(keys, grads, f, d, frequencies, places, channels, PLACES, dtype)
            cos, sin = phase_of(
                phase, initial_phase, phase_strides, initial_strides[2], now, begin, was_read == 0, f, frequencies
            )
            dx += cos[:, None] * u - sin[:, None] * v
            dy += sin[:, None] * u + cos[:, None] * v
            store_rows(dh, dx, dy, f, d, frequencies, channels)
            if states is not None:
                source = states
                if exists:
                    source = work + local % STEPS * size
                x, y = load_rows(source, f, d, frequencies, channels, channels, 1, dtype)
                x, y = tl.where(was_read, x, 0.0), tl.where(was_read, y, 0.0)
                if key_sums is not None:
                    read_u, read_v = cos[:, None] * x + sin[:, None] * y, cos[:, None] * y - sin[:, None] * x
                    write_cos, write_sin = phase_of(
                        phase, initial_phase, phase_strides, initial_strides[2], t, begin, is_reset, f, frequencies
                    )
                    grad_u = write_cos[:, None] * dx + write_sin[:, None] * dy
                    grad_v = write_cos[:, None] * dy - write_sin[:, None] * dx
                    for first_place in range(0, places, PLACES):
                        j = first_place + tl.arange(0, PLACES)
                        here = grads + j[:, None] * channels + d[None, :]
                        view = tl.load(here, mask=(j < places)[:, None] & (d < channels)[None, :], other=0.0)
                        add_outer(key_sums, view, read_u, read_v, f, j, frequencies, places)
                        view = written_view(
                            residual, residual_strides, gate, gate_strides, t, exists, j, d, places, channels, dtype
                        )
                        add_outer(key_sums + 2 * places * frequencies, view, grad_u, grad_v, f, j, frequencies, places)
                if grad_phase is not None:
                    add_phase_gradient(
                        grad_phase,
                        grad_initial_phase,
                        tl.sum(u * x + v * y, 1),
                        tl.sum(u * y - v * x, 1),
                        now,
                        begin,
                        now < end,
                        f,
                        frequencies,
                        groups,
                    )
                    if exists:
                        written = work + (STEPS + local % STEPS) * size
                        u, v = load_rows(written, f, d, frequencies, channels, channels, 1, dtype)
                        add_phase_gradient(
                            grad_phase,
                            grad_initial_phase,
                            tl.where(is_reset, 0.0, tl.sum(u * dx + v * dy, 1)),
                            tl.where(is_reset, 0.0, tl.sum(u * dy - v * dx, 1)),
                            t,
                            begin,
                            False,
                            f,
                            frequencies,
                            groups,
                        )
        tl.debug_barrier()

        if exists:
            for first in range(0, places, PLACES):
                j = first + tl.arange(0, PLACES)
                inside = (j < places)[:, None] & (d < channels)[None, :]
                grad = collect(
                    mix,
                    dh,
                    phase,
                    initial_phase,
                    phase_strides,
                    initial_strides[2],
                    t,
                    begin,
                    is_reset,
                    j,
                    d,
                    frequencies,
                    places,
                    channels,
                    FREQUENCIES,
                    dtype,
                )
                if gate is not None:
                    written = load_view(residual, residual_strides, t, exists, j, d, places, channels, dtype)
                    here = grad_gate + (t * places + j) * groups
                    tl.store(here, tl.sum(tl.where(inside, grad * written, 0.0), 1), mask=j < places)
                    here = gate + t * gate_strides[1] + j * gate_strides[2]
                    grad *= tl.load(here, mask=j < places, other=0.0)[:, None]
                here = grad_values + start + (t * places + j[:, None]) * width + d[None, :]
                tl.store(here, grad.to(grad_values.dtype.element_ty), mask=inside)
                view = load_view(grad_out, grad_out_strides, t - 1, t > begin, j, d, places, channels, dtype)
                if DELTA:
                    view -= tl.where(is_reset, 0.0, grad)
                store_view(grads, view, j, d, places, channels)
            tl.debug_barrier()
