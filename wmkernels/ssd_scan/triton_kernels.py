"""The SSD scan in Triton: a program passes the state of a head, for some of its channels, from chunk to chunk.

A chunk of up to 32 steps is five products of matrices forward and thirteen backward, on tensor cores: float32 in full
precision, 16 bits by three TF32 products. A program reads and writes the state once per chunk, in registers; channels
do not depend on each other, so heads wider than a block are several programs, which compute the scores C_i · B_j anew.

Chunks end at resets, so that no product holds steps of both sides: zero times infinity is NaN. Sums of gates begin anew
at every step, as in the chunked form in PyTorch.

The backward pass takes segments of saved states in reverse: it writes the states before a segment's chunks to scratch
memory and reads them in reverse. Gradients of what heads or programs share are partial sums, added by PyTorch.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.ssd_scan.meta import SSDInputs, backward_outputs, forward_outputs, state_count
from wmkernels.triton_device import sigmoid

STEPS, STEPS64 = 32, 16  # of a chunk, at most
STATE_BYTES, BYTES_PER_WARP = 16384, 2048  # of a program and of a warp
LEAST = 16  # rows and columns of a product


@triton.jit
def sequence_of(cu_seqlens, head_program, heads, time, kept):
    """(sequence, batch row, head, begin, end, first row of chunk_states)."""
    sequence, head = head_program // heads, head_program % heads
    if cu_seqlens is None:
        row, begin, end = sequence, sequence * 0, sequence * 0 + time
        state_row = sequence * tl.cdiv(time, kept)
    else:
        row, begin, end = sequence * 0, tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
        state_row = begin // kept + sequence
    return sequence, row, head, begin, end, state_row


@triton.jit
def vectors_at(x, strides, row, head, t, j):
    """[step, size]."""
    return x + row * strides[0] + t[:, None] * strides[1] + head * strides[2] + j[None, :] * strides[3]


@triton.jit
def scalars_at(x, strides, row, head, t):
    return x + row * strides[0] + t * strides[1] + head * strides[2]


@triton.jit
def is_reset(reset, strides, row, t):
    return tl.load(reset + row * strides[0] + t * strides[1]) != 0


@triton.jit
def steps_from(reset, strides, row, begin, end, first, chunk, i):
    """Steps of the chunk that begins at ``first``."""
    steps = tl.minimum(end, begin + ((first - begin) // chunk + 1) * chunk) - first
    if reset is not None:
        inside = (i > 0) & (i < steps)
        flags = tl.load(reset + row * strides[0] + (first + i) * strides[1], mask=inside, other=0)
        steps = tl.min(tl.where(flags != 0, i.to(tl.int64), steps), 0)
    return steps


@triton.jit
def first_before(reset, strides, row, begin, stop, chunk, i):
    """First step of the chunk that ends before ``stop``."""
    first = begin + (stop - 1 - begin) // chunk * chunk
    if reset is not None:
        flags = tl.load(reset + row * strides[0] + (first + i) * strides[1], mask=first + i < stop, other=0)
        first = tl.max(tl.where(flags != 0, first + i, first), 0)
    return first


@triton.jit
def decays_of(gate, strides, row, head, t, steps, i):
    """From step j to i [i, j], from the start to i, from j to the end, from start to end."""
    valid = i < steps
    gates = tl.load(scalars_at(gate, strides, row, head, t), mask=valid, other=0.0)
    since_step = tl.cumsum(tl.where(i[:, None] > i[None, :], gates[:, None], 0.0), 0)
    between = tl.where((i[:, None] >= i[None, :]) & valid[:, None], tl.exp(since_step), 0.0)
    since_start = tl.exp(tl.cumsum(gates, 0))
    last = i == steps - 1
    to_end = tl.sum(tl.where(last[:, None], between, 0.0), 0)
    return between, since_start, to_end, tl.sum(tl.where(last, since_start, 0.0), 0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def lower_of(scores, between, weight, own, i):
    """What outputs [i] take of the inputs [j]."""
    below = tl.where(i[:, None] > i[None, :], scores * between * weight[None, :], 0.0)
    return tl.where(i[:, None] == i[None, :], scores * own[None, :], below)


@triton.jit
def forward_kernel(
    x,  # (batch, time, heads, d)
    gate,  # (batch, time, heads)
    weight,  # as gate
    B,  # (batch, time, groups, n)
    C,  # as B
    own_weight,  # as gate, or None
    D,  # (heads, d) or None
    z,  # as x, or None
    initial_state,  # (sequences, heads, d, n) or None
    reset,  # (batch, time) bytes or None
    cu_seqlens,  # (sequences + 1,) or None
    out,  # as x
    last_state,  # (sequences, heads, d, n)
    chunk_states,  # (rows, heads, n, d) or None
    x_strides,
    gate_strides,
    weight_strides,
    B_strides,
    C_strides,
    own_strides,
    D_strides,
    z_strides,
    initial_strides,
    reset_strides,
    out_strides,
    heads,
    group_heads,
    d,
    n,
    time,
    chunk,
    kept,
    blocks,
    ROWS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head_program, block = program // blocks, (program % blocks).to(tl.int32)
    sequence, row, head, begin, end, state_row = sequence_of(cu_seqlens, head_program, heads, time, kept)
    group = head // group_heads
    i, k, j = tl.arange(0, ROWS), tl.arange(0, STATES), block * CHANNELS + tl.arange(0, CHANNELS)
    in_n, in_d = k < n, j < d
    in_state = in_n[:, None] & in_d[None, :]
    state = tl.zeros([STATES, CHANNELS], dtype)
    if initial_state is not None:
        given = initial_state + sequence * initial_strides[0] + head * initial_strides[1]
        given += k[:, None] * initial_strides[3] + j[None, :] * initial_strides[2]
        state = tl.load(given, mask=in_state, other=0.0)
    first = begin
    while first < end:
        if chunk_states is not None:  # noqa: SIM102 (one is known when compiled)
            if (first - begin) % kept == 0:
                to = chunk_states + ((state_row + (first - begin) // kept) * heads + head) * n * d
                tl.store(to + k[:, None] * d + j[None, :], state, mask=in_state)
        steps = steps_from(reset, reset_strides, row, begin, end, first, chunk, i)
        has_state = first > begin
        if initial_state is not None:
            has_state = first >= begin
        if reset is not None:
            has_state = has_state & (is_reset(reset, reset_strides, row, first) == 0)
        t, valid = first + i, i < steps
        x_t = tl.load(vectors_at(x, x_strides, row, head, t, j), mask=valid[:, None] & in_d[None, :], other=0.0).to(
            dtype
        )
        in_rows = valid[:, None] & in_n[None, :]
        B_t = tl.load(vectors_at(B, B_strides, row, group, t, k), mask=in_rows, other=0.0).to(dtype)
        C_t = tl.load(vectors_at(C, C_strides, row, group, t, k), mask=in_rows, other=0.0).to(dtype)
        weights = tl.load(scalars_at(weight, weight_strides, row, head, t), mask=valid, other=0.0)
        own = weights
        if own_weight is not None:
            own = tl.load(scalars_at(own_weight, own_strides, row, head, t), mask=valid, other=0.0)
        between, since_start, to_end, whole = decays_of(gate, gate_strides, row, head, t, steps, i)
        scores = product(C_t, tl.trans(B_t), PRECISION)
        y = product(lower_of(scores, between, weights, own, i), x_t, PRECISION)
        y += tl.where(has_state, since_start[:, None] * product(C_t, state, PRECISION), 0.0)
        if D is not None:
            y += tl.load(D + head * D_strides[0] + j * D_strides[1], mask=in_d, other=0.0)[None, :] * x_t
        in_x = valid[:, None] & in_d[None, :]
        if z is not None:
            z_t = tl.load(vectors_at(z, z_strides, row, head, t, j), mask=in_x, other=0.0).to(dtype)
            y *= z_t * sigmoid(z_t)
        tl.store(vectors_at(out, out_strides, row, head, t, j), y.to(out.dtype.element_ty), mask=in_x)
        entering = product(tl.trans(B_t), (to_end * weights)[:, None] * x_t, PRECISION)
        state = tl.where(has_state, whole * state, 0.0) + entering
        first += steps
    to = last_state + head_program * d * n
    tl.store(to + j[None, :] * n + k[:, None], state, mask=in_state)


@triton.jit
def backward_kernel(
    x,  # (batch, time, heads, d)
    gate,  # (batch, time, heads)
    weight,  # as gate
    B,  # (batch, time, groups, n)
    C,  # as B
    own_weight,  # as gate, or None
    D,  # (heads, d) or None
    z,  # as x, or None
    initial_state,  # None: the sequence starts without a state
    reset,  # (batch, time) bytes or None
    cu_seqlens,  # (sequences + 1,) or None
    chunk_states,  # (rows, heads, n, d)
    grad_out,  # as x
    grad_last_state,  # (sequences, heads, d, n) or None
    grad_x,  # as x
    grad_gate,  # (blocks, batch, time, heads), partial, as the next two
    grad_weight,
    grad_own_weight,  # or None
    grad_B,  # (blocks, batch, time, heads, n), partial
    grad_C,
    grad_D,  # (sequences, heads, d), partial, or None
    grad_z,  # as x, or None
    grad_initial_state,  # (sequences, heads, d, n) or None
    scratch,  # (programs, kept / chunk, STATES, CHANNELS): the states before the chunks of a segment
    x_strides,
    gate_strides,
    weight_strides,
    B_strides,
    C_strides,
    own_strides,
    D_strides,
    z_strides,
    reset_strides,
    grad_out_strides,
    grad_last_strides,
    grad_x_strides,
    grad_z_strides,
    rows,  # batch * time
    heads,
    group_heads,
    d,
    n,
    time,
    chunk,
    kept,
    blocks,
    ROWS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head_program, block = program // blocks, (program % blocks).to(tl.int32)
    sequence, row, head, begin, end, state_row = sequence_of(cu_seqlens, head_program, heads, time, kept)
    group = head // group_heads
    i, k, local = tl.arange(0, ROWS), tl.arange(0, STATES), tl.arange(0, CHANNELS)
    j = block * CHANNELS + local
    in_n, in_d = k < n, j < d
    in_state = in_n[:, None] & in_d[None, :]
    below, diagonal = i[:, None] > i[None, :], i[:, None] == i[None, :]
    own_scratch = scratch + program * (kept // chunk) * STATES * CHANNELS
    own_scratch += k[:, None] * CHANNELS + local[None, :]
    d_state = tl.zeros([STATES, CHANNELS], dtype)
    flows = begin < begin  # whether the state has a gradient
    if grad_last_state is not None:
        last = grad_last_state + sequence * grad_last_strides[0] + head * grad_last_strides[1]
        last += k[:, None] * grad_last_strides[3] + j[None, :] * grad_last_strides[2]
        d_state = tl.load(last, mask=in_state, other=0.0)
        flows = begin <= begin
    skip = tl.zeros([CHANNELS], dtype)
    d_skip = tl.zeros([CHANNELS], dtype)
    if D is not None:
        skip = tl.load(D + head * D_strides[0] + j * D_strides[1], mask=in_d, other=0.0)
    segments = tl.cdiv(end - begin, kept)
    for done in range(0, segments):
        index = segments - 1 - done
        segment = begin + index * kept
        segment_end = tl.minimum(segment + kept, end)
        state = tl.load(
            chunk_states + ((state_row + index) * heads + head) * n * d + k[:, None] * d + j[None, :],
            mask=in_state,
            other=0.0,
        )
        first = segment
        while first < segment_end:
            steps = steps_from(reset, reset_strides, row, begin, end, first, chunk, i)
            has_state = first > begin
            if initial_state is not None:
                has_state = first >= begin
            if reset is not None:
                has_state = has_state & (is_reset(reset, reset_strides, row, first) == 0)
            if (first - begin) % chunk == 0:  # elsewhere, chunks begin with resets
                tl.store(own_scratch + (first - segment) // chunk * STATES * CHANNELS, state, mask=in_state)
            t, valid = first + i, i < steps
            in_x = valid[:, None] & in_d[None, :]
            x_t = tl.load(vectors_at(x, x_strides, row, head, t, j), mask=in_x, other=0.0).to(dtype)
            in_rows = valid[:, None] & in_n[None, :]
            B_t = tl.load(vectors_at(B, B_strides, row, group, t, k), mask=in_rows, other=0.0).to(dtype)
            weights = tl.load(scalars_at(weight, weight_strides, row, head, t), mask=valid, other=0.0)
            between, since_start, to_end, whole = decays_of(gate, gate_strides, row, head, t, steps, i)
            entering = product(tl.trans(B_t), (to_end * weights)[:, None] * x_t, PRECISION)
            state = tl.where(has_state, whole * state, 0.0) + entering
            first += steps
        tl.debug_barrier()
        stop = segment_end
        while stop > segment:
            first = first_before(reset, reset_strides, row, begin, stop, chunk, i)
            steps = stop - first
            has_state = first > begin
            if initial_state is not None:
                has_state = first >= begin
            if reset is not None:
                has_state = has_state & (is_reset(reset, reset_strides, row, first) == 0)
            # selected by has_state wherever it is read
            before = own_scratch + (first - segment) // chunk * STATES * CHANNELS
            state = tl.load(before, mask=in_state, other=0.0)
            t, valid = first + i, i < steps
            in_x, in_rows = valid[:, None] & in_d[None, :], valid[:, None] & in_n[None, :]
            x_t = tl.load(vectors_at(x, x_strides, row, head, t, j), mask=in_x, other=0.0).to(dtype)
            dy = tl.load(vectors_at(grad_out, grad_out_strides, row, head, t, j), mask=in_x, other=0.0).to(dtype)
            B_t = tl.load(vectors_at(B, B_strides, row, group, t, k), mask=in_rows, other=0.0).to(dtype)
            C_t = tl.load(vectors_at(C, C_strides, row, group, t, k), mask=in_rows, other=0.0).to(dtype)
            weights = tl.load(scalars_at(weight, weight_strides, row, head, t), mask=valid, other=0.0)
            own = weights
            if own_weight is not None:
                own = tl.load(scalars_at(own_weight, own_strides, row, head, t), mask=valid, other=0.0)
            between, since_start, to_end, whole = decays_of(gate, gate_strides, row, head, t, steps, i)
            scores = product(C_t, tl.trans(B_t), PRECISION)
            if z is not None:
                z_t = tl.load(vectors_at(z, z_strides, row, head, t, j), mask=in_x, other=0.0).to(dtype)
                y = product(lower_of(scores, between, weights, own, i), x_t, PRECISION) + skip[None, :] * x_t
                y += tl.where(has_state, since_start[:, None] * product(C_t, state, PRECISION), 0.0)
                s = sigmoid(z_t)
                dz = dy * y * (s * (1.0 + z_t * (1.0 - s)))
                tl.store(vectors_at(grad_z, grad_z_strides, row, head, t, j), dz.to(grad_z.dtype.element_ty), mask=in_x)
                dy *= z_t * s
            d_skip += tl.sum(dy * x_t, 0)
            by_scores = product(dy, tl.trans(x_t), PRECISION)  # dy_i · x_j
            # x and the weights
            u = product(tl.trans(tl.where(below, scores * between, 0.0)), dy, PRECISION)
            u += tl.where(flows, to_end[:, None] * product(B_t, d_state, PRECISION), 0.0)
            own_scores = tl.sum(tl.where(diagonal, scores, 0.0), 1)
            at = ((block * rows + row * time + t) * heads + head).to(tl.int64)
            if own_weight is None:
                u += own_scores[:, None] * dy
                dx = weights[:, None] * u
            else:
                dx = weights[:, None] * u + (own * own_scores)[:, None] * dy
                d_own = own_scores * tl.sum(tl.where(diagonal, by_scores, 0.0), 1)
                tl.store(grad_own_weight + at, d_own, mask=valid)
            dx += skip[None, :] * dy
            tl.store(vectors_at(grad_x, grad_x_strides, row, head, t, j), dx.to(grad_x.dtype.element_ty), mask=in_x)
            tl.store(grad_weight + at, tl.sum(u * x_t, 1), mask=valid)
            # B and C
            weighted = tl.where(below, between * weights[None, :] * by_scores, 0.0)
            d_scores = tl.where(diagonal, own[None, :] * by_scores, weighted)
            by_state = product(dy, tl.trans(state), PRECISION)  # [step, n]
            by_d_state = product(x_t, tl.trans(d_state), PRECISION)
            entering = weights * to_end
            dC = product(d_scores, B_t, PRECISION) + tl.where(has_state, since_start[:, None] * by_state, 0.0)
            dB = product(tl.trans(d_scores), C_t, PRECISION) + tl.where(flows, entering[:, None] * by_d_state, 0.0)
            tl.store(grad_C + at[:, None] * n + k[None, :], dC, mask=in_rows)
            tl.store(grad_B + at[:, None] * n + k[None, :], dB, mask=in_rows)
            # the gate of a step is part of the decays from before it, or the start, to it and later, or the end
            of_start = tl.where(has_state, since_start * tl.sum(C_t * by_state, 1), 0.0)
            of_end = tl.where(flows, entering * tl.sum(B_t * by_d_state, 1), 0.0)
            passed = tl.cumsum(tl.where(below, scores * weighted, 0.0), 0, reverse=True)
            d_gate = tl.sum(tl.where(below, passed + of_end[None, :], 0.0), 1)
            d_gate += tl.sum(tl.where(below, 0.0, of_start[None, :]), 1)
            d_gate += tl.where(has_state & flows, whole * tl.sum(tl.sum(d_state * state, 1), 0), 0.0)
            tl.store(grad_gate + at, d_gate, mask=valid)
            passing = product(tl.trans(C_t), since_start[:, None] * dy, PRECISION)
            d_state = tl.where(has_state, tl.where(flows, whole * d_state, 0.0) + passing, 0.0)
            flows = has_state
            stop = first
        tl.debug_barrier()
    if grad_D is not None:
        tl.store(grad_D + head_program * d + j, d_skip, mask=in_d)
    if grad_initial_state is not None:
        to = grad_initial_state + head_program * d * n
        tl.store(to + j[None, :] * n + k[:, None], d_state, mask=in_state)


def _tile(inputs: SSDInputs) -> tuple[int, int, int]:
    """(states, channels) of a program, and programs per head."""
    width, d = 8 if inputs.x.dtype == torch.float64 else 4, inputs.x.shape[3]
    states, channels = (max(LEAST, runtime.next_power_of_2(size)) for size in (inputs.B.shape[3], d))
    channels = max(LEAST, min(channels, STATE_BYTES // (width * states)))
    return states, channels, runtime.ceil_div(d, channels)


def _steps(chunk: int, dtype: torch.dtype) -> int:
    """The largest divisor of ``chunk`` that a program holds: saved states are whole chunks apart."""
    most = STEPS64 if dtype == torch.float64 else STEPS
    return next(steps for steps in range(min(chunk, most), 0, -1) if chunk % steps == 0)


def _launch(kernel, inputs: SSDInputs, chunk: int, kept: int, *arguments) -> None:
    _, time, heads, d = inputs.x.shape
    states, channels, blocks = _tile(inputs)
    wide = inputs.x.dtype == torch.float64
    exact = inputs.x.dtype in (torch.float32, torch.float64)
    with runtime.on_device(inputs.x):
        runtime.launch(
            kernel,
            inputs.sequences * heads * blocks,
            *arguments,
            *(heads, heads // inputs.B.shape[2], d, inputs.B.shape[3], time, chunk, kept, blocks),
            ROWS=max(LEAST, runtime.next_power_of_2(chunk)),
            STATES=states,
            CHANNELS=channels,
            PRECISION="ieee" if exact else "tf32x3",
            dtype=tl.float64 if wide else tl.float32,
            num_warps=min(8, max(4, states * channels * (8 if wide else 4) // BYTES_PER_WARP)),
        )


def forward(inputs: SSDInputs, chunk: int, kept: int) -> tuple[Tensor, ...]:
    """As ``meta.forward_outputs``."""
    x, gate, weight, B, C, own_weight, D, z, initial_state, reset, cu_seqlens = inputs
    out, last_state, chunk_states = outputs = forward_outputs(inputs, kept)
    reset, cu_seqlens = runtime.as_bytes(reset), None if cu_seqlens is None else cu_seqlens.contiguous()
    tensors = (x, gate, weight, B, C, own_weight, D, z, initial_state, reset, cu_seqlens)
    strided = (*tensors[:10], out)
    dimensions = zip(strided, (4, 3, 3, 4, 4, 3, 2, 4, 4, 2, 4), strict=True)
    strides = [runtime.strides(v, size) for v, size in dimensions]
    steps = _steps(chunk, x.dtype)
    written = (out, last_state, chunk_states if kept else None)
    _launch(forward_kernel, inputs, steps, kept or steps, *tensors, *written, *strides)
    return outputs


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    inputs: SSDInputs,
    chunk_states: Tensor,
    chunk: int,
    kept: int,
) -> tuple[Tensor, ...]:
    """As ``meta.backward_outputs``."""
    x, gate, weight, B, C, own_weight, D, z, initial_state, reset, cu_seqlens = inputs
    (batch, time, heads, d), (groups, n) = x.shape, B.shape[2:]
    states, channels, blocks = _tile(inputs)
    steps = _steps(chunk, x.dtype)
    gradients = backward_outputs(inputs)
    grad_x, grad_gate, grad_weight, grad_B, grad_C, grad_own_weight, grad_D, grad_z, grad_initial_state = gradients
    per_step = [gate.new_empty((blocks, batch, time, heads)) for _ in range(2 if own_weight is None else 3)]
    per_state = [gate.new_empty((blocks, batch, time, heads, n)) for _ in range(2)]
    of_D = None if D is None else gate.new_empty((inputs.sequences, heads, d))
    reset, cu_seqlens = runtime.as_bytes(reset), None if cu_seqlens is None else cu_seqlens.contiguous()
    scratch = gate.new_empty((inputs.sequences * heads * blocks, kept // steps, states, channels))
    if chunk_states.shape[0] != state_count(inputs, kept):
        raise ValueError(f"ssd_scan: {chunk_states.shape[0]} saved states, expected {state_count(inputs, kept)}")
    tensors = (x, gate, weight, B, C, own_weight, D, z, initial_state, reset, cu_seqlens, chunk_states.contiguous())
    written = (grad_x, *per_step[:2], per_step[2] if own_weight is not None else None, *per_state, of_D)
    written = (*written, None if z is None else grad_z, None if initial_state is None else grad_initial_state)
    strided = (x, gate, weight, B, C, own_weight, D, z, reset, grad_out, grad_last_state, grad_x)
    dimensions = zip(strided, (4, 3, 3, 4, 4, 3, 2, 4, 2, 4, 4, 4), strict=True)
    strides = [runtime.strides(v, size) for v, size in dimensions]
    strides.append(runtime.strides(None if z is None else grad_z, 4))
    given = (grad_out, grad_last_state, *written, scratch)
    _launch(backward_kernel, inputs, steps, kept, *tensors, *given, *strides, batch * time)
    for gradient, parts in zip((grad_gate, grad_weight, grad_own_weight), per_step, strict=False):
        gradient.copy_(parts.sum(0))
    for gradient, parts in zip((grad_B, grad_C), per_state, strict=True):
        gradient.copy_(parts.sum(0).unflatten(2, (groups, -1)).sum(3))
    if of_D is not None:
        grad_D.copy_(of_D.sum(0))
    return gradients
