"""Linear scan in Triton, both directions and their gradients.

The gradient of h_t = g_t h_{t-1} + x_t is a reverse scan, dh_t = dL/dout_t + g_{t+1} dh_{t+1}, with dx_t = dh_t and
dg_t = dh_t h_{t-1}: one kernel serves both, with shifted gates and resets.

If batch x channels cannot fill the GPU, time is cut. Passes compute segments' final states from zero, then incoming
states, then outputs.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.linear_scan.meta import LinearScanInputs, backward_outputs, forward_outputs
from wmkernels.triton_device import combine_range, combine_range_flag, last_of, pass_state

# programs per SM: minimum uncut, target cut
MIN_PROGRAMS, TARGET_PROGRAMS = 1.5, 8
# (channels, steps, warps) of a tile
TIME_CONTIGUOUS, CHANNELS_CONTIGUOUS = (4, 256, 4), (32, 32, 1)


@triton.jit
def scan_kernel(
    gates,  # (batch, channels, time)
    tokens,  # as gates: x or dL/dout
    incoming,  # (batch or segments, channels) or None
    reset,  # (batch, time) bytes or None
    states,  # as gates or None: output, h or dh
    past,  # as gates or None: forward h
    initial_state,  # (batch, channels) or None
    grad_gates,  # as gates or None
    last,  # as incoming, contiguous; backward: of initial_state
    products,  # (segments, channels): gate products
    any_reset,  # as products, bytes
    gates_strides,
    tokens_strides,
    incoming_strides,
    reset_strides,
    states_strides,
    past_strides,
    initial_strides,
    grad_strides,
    channels,
    time,
    tiles,
    segment_length,
    segments_per_sequence,
    REVERSE: tl.constexpr,
    GATE_SHIFT: tl.constexpr,  # step t uses gates[t + GATE_SHIFT]
    RESET_SHIFT: tl.constexpr,  # reset[t + RESET_SHIFT] cuts step t from the step before it in scan order
    INCOMING_PER_SEGMENT: tl.constexpr,
    TIME_FIRST: tl.constexpr,  # (STEPS, CHANNELS) tile
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    dtype: tl.constexpr,
):
    axis: tl.constexpr = 0 if TIME_FIRST else 1
    other: tl.constexpr = 1 if TIME_FIRST else 0
    tile = tl.program_id(0) % tiles
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    row = segment // segments_per_sequence
    local_segment = segment % segments_per_sequence
    begin = local_segment * segment_length
    end = tl.minimum(begin + segment_length, time)
    d1 = tile.to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    d_in1 = d1 < channels
    d, d_in = tl.expand_dims(d1, axis), tl.expand_dims(d_in1, axis)
    steps = tl.expand_dims(tl.arange(0, STEPS).to(tl.int64), other)
    index = steps + d * 0
    if REVERSE:
        index = -index
    gates_tile = gates + row * gates_strides[0] + d * gates_strides[1] + (steps + GATE_SHIFT) * gates_strides[2]
    tokens_tile = tokens + row * tokens_strides[0] + d * tokens_strides[1] + steps * tokens_strides[2]
    state = tl.zeros([CHANNELS], dtype)
    if incoming is not None:
        incoming_row = segment if INCOMING_PER_SEGMENT else row
        state = tl.load(
            incoming + incoming_row * incoming_strides[0] + d1 * incoming_strides[1], mask=d_in1, other=0.0
        ).to(dtype)
    product = tl.full([CHANNELS], 1.0, dtype)
    any_reset_d = tl.zeros([CHANNELS], tl.int32)

    count = (end - begin + STEPS - 1) // STEPS
    t0 = begin
    advance = STEPS
    if REVERSE:
        t0 = begin + (count - 1) * STEPS
        advance = -STEPS
    t = t0 + steps
    gate_in = (t < end) & (t + GATE_SHIFT < time) & (t + GATE_SHIFT >= 0) & d_in
    gate_next = tl.load(gates_tile + t0 * gates_strides[2], mask=gate_in, other=1.0)
    token_next = tl.load(tokens_tile + t0 * tokens_strides[2], mask=(t < end) & d_in, other=0.0)
    for _ in range(count):
        gate, token = gate_next.to(dtype), token_next.to(dtype)
        t = t0 + steps
        inside = (t < end) & d_in
        now = t0
        t0 += advance
        ahead = t0 + steps
        # The last prefetch in reverse precedes the segment.
        ahead_in = (ahead < end) & (ahead >= begin) & d_in
        gate_in = ahead_in & (ahead + GATE_SHIFT < time) & (ahead + GATE_SHIFT >= 0)
        gate_next = tl.load(gates_tile + t0 * gates_strides[2], mask=gate_in, other=1.0)
        token_next = tl.load(tokens_tile + t0 * tokens_strides[2], mask=ahead_in, other=0.0)

        before = tl.expand_dims(state, axis)
        if reset is not None:
            r = t + RESET_SHIFT
            flags = tl.load(reset + row * reset_strides[0] + r * reset_strides[1], mask=(t < end) & (r < time), other=0)
            reset_t = flags.to(tl.int32) + tl.zeros_like(index).to(tl.int32)
            # An infinite gate turns zero into NaN, as in a loop.
            token = tl.where(reset_t != 0, token, token + gate * 0.0)
            scanned = tl.associative_scan((gate, token, reset_t), axis, combine_range_flag, reverse=REVERSE)
            result = tl.where(scanned[2] != 0, scanned[1], pass_state(scanned[0], scanned[1], before))
        else:
            token += gate * 0.0
            scanned = tl.associative_scan((gate, token), axis, combine_range, reverse=REVERSE)
            result = pass_state(scanned[0], scanned[1], before)
        state = tl.reduce((index, result), axis, last_of)[1]
        if states is None:
            product *= tl.reduce((index, scanned[0]), axis, last_of)[1]
            if reset is not None:
                any_reset_d = any_reset_d | tl.max(reset_t, axis)
        else:
            out_pointers = states + row * states_strides[0] + d * states_strides[1] + (now + steps) * states_strides[2]
            tl.store(out_pointers, result.to(states.dtype.element_ty), mask=inside)
        if grad_gates is not None:
            neighbour = t - GATE_SHIFT
            known = inside & (neighbour >= 0) & (neighbour < time)
            past_pointers = past + row * past_strides[0] + d * past_strides[1] + neighbour * past_strides[2]
            h = tl.load(past_pointers, mask=known, other=0.0).to(dtype)
            if initial_state is not None:
                h0 = tl.load(
                    initial_state + row * initial_strides[0] + d * initial_strides[1], mask=d_in, other=0.0
                ).to(dtype)
                h = tl.where(known, h, h0)
            grad = result * h
            if reset is not None:
                r = t + (1 - RESET_SHIFT)
                reset_pointers = reset + row * reset_strides[0] + r * reset_strides[1]
                reset_next = tl.load(reset_pointers, mask=(t < end) & (r < time), other=0)
                grad = tl.where(reset_next + tl.zeros_like(index).to(tl.int32) != 0, 0.0, grad)
            grad_pointers = grad_gates + row * grad_strides[0] + d * grad_strides[1] + (now + steps) * grad_strides[2]
            tl.store(grad_pointers, grad.to(grad_gates.dtype.element_ty), mask=inside)

    if states is None:
        tl.store(products + segment * channels + d1, product, mask=d_in1)
        tl.store(any_reset + segment * channels + d1, any_reset_d.to(tl.uint8), mask=d_in1)
        tl.store(last + segment * channels + d1, state, mask=d_in1)
    elif last is not None and local_segment == (0 if REVERSE else segments_per_sequence - 1):
        if GATE_SHIFT != 0:
            edge = 0 if REVERSE else time - 1
            at_edge = gates + row * gates_strides[0] + d1 * gates_strides[1] + edge * gates_strides[2]
            state *= tl.load(at_edge, mask=d_in1, other=0.0).to(dtype)
        if REVERSE and reset is not None:
            state = tl.where(tl.load(reset + row * reset_strides[0] + d1 * 0) != 0, 0.0, state)
        tl.store(last + row * channels + d1, state, mask=d_in1)


@triton.jit
def pass_state_kernel(
    incoming,  # (batch, channels) or None
    incoming_strides,
    end_states,  # (segments, channels), as below
    products,
    any_reset,
    incoming_states,
    channels,
    blocks,
    segments_per_sequence,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = d < channels
    h = tl.zeros([BLOCK], end_states.dtype.element_ty)
    if incoming is not None:
        h = tl.load(incoming + row * incoming_strides[0] + d * incoming_strides[1], mask=inside, other=0.0)
    incoming_row = row * segments_per_sequence * channels + d
    advance = tl.full((), channels, tl.int64)
    if REVERSE:
        incoming_row += advance * (segments_per_sequence - 1)
        advance = -advance
    for _ in range(segments_per_sequence):
        tl.store(incoming_states + incoming_row, h, mask=inside)
        end = tl.load(end_states + incoming_row, mask=inside, other=0.0)
        product = tl.load(products + incoming_row, mask=inside, other=0.0)
        reset_t = tl.load(any_reset + incoming_row, mask=inside, other=0)
        h = tl.where(reset_t != 0, end, pass_state(product, end, h))
        incoming_row += advance


def _scan(
    gates: Tensor,
    tokens: Tensor,
    incoming: Tensor | None,
    reset: Tensor | None,
    states: Tensor,
    last: Tensor | None,
    reverse: bool,
    shifts: tuple[int, int],
    segment_length: int,
    past: Tensor | None = None,
    initial_state: Tensor | None = None,
    grad_gates: Tensor | None = None,
) -> None:
    batch, channels, time = gates.shape
    dtype = torch.float64 if gates.dtype == torch.float64 else torch.float32
    time_first = gates.stride(1) == 1 and gates.stride(2) != 1
    channels_tile, steps, warps = CHANNELS_CONTIGUOUS if time_first else TIME_CONTIGUOUS
    steps = min(steps, runtime.next_power_of_2(time))
    tiles = runtime.ceil_div(channels, channels_tile)
    chip = runtime.processors(gates.device)
    if not segment_length:
        segment_length = runtime.choose_segment_length(
            time, tiles * batch, steps, int(MIN_PROGRAMS * chip), TARGET_PROGRAMS * chip
        )
    segments_per_sequence = runtime.ceil_div(time, segment_length)
    segments = batch * segments_per_sequence
    reset = runtime.as_bytes(reset)

    def launch_pass(incoming: Tensor | None, per_segment: bool, outputs: tuple[Tensor | None, ...]) -> None:
        states, past, initial_state, grad_gates, last, products, any_reset = outputs
        runtime.launch(
            scan_kernel,
            tiles * segments,
            *(gates, tokens, incoming, reset, *outputs),
            runtime.strides(gates, 3),
            runtime.strides(tokens, 3),
            runtime.strides(incoming, 2),
            runtime.strides(reset, 2),
            runtime.strides(states, 3),
            runtime.strides(past, 3),
            runtime.strides(initial_state, 2),
            runtime.strides(grad_gates, 3),
            *(channels, time, tiles, segment_length, segments_per_sequence),
            REVERSE=reverse,
            GATE_SHIFT=shifts[0],
            RESET_SHIFT=shifts[1],
            INCOMING_PER_SEGMENT=per_segment,
            TIME_FIRST=time_first,
            CHANNELS=channels_tile,
            STEPS=steps,
            dtype=tl.float64 if dtype == torch.float64 else tl.float32,
            num_warps=warps,
        )

    outputs = (states, past, initial_state, grad_gates, last, None, None)
    with runtime.on_device(gates):
        if segments_per_sequence == 1:
            launch_pass(incoming, False, outputs)
            return
        end_states = torch.empty((segments, channels), dtype=dtype, device=gates.device)
        products, incoming_states = torch.empty_like(end_states), torch.empty_like(end_states)
        any_reset = torch.empty((segments, channels), dtype=torch.uint8, device=gates.device)
        launch_pass(None, False, (None, None, None, None, end_states, products, any_reset))
        block = 128
        blocks = runtime.ceil_div(channels, block)
        runtime.launch(
            pass_state_kernel,
            blocks * batch,
            incoming,
            runtime.strides(incoming, 2),
            *(end_states, products, any_reset, incoming_states, channels, blocks, segments_per_sequence),
            REVERSE=reverse,
            BLOCK=block,
            num_warps=4,
        )
        launch_pass(incoming_states, True, outputs)


def forward(inputs: LinearScanInputs, *, segment_length: int = 0) -> tuple[Tensor, Tensor]:
    """(out, last_state); ``segment_length`` forces a cut."""
    gates, tokens, initial_state, reset, reverse, _ = inputs
    out, last_state = forward_outputs(inputs)
    _scan(gates, tokens, initial_state, reset, out, last_state, reverse, (0, 1 if reverse else 0), segment_length)
    return out, last_state


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    inputs: LinearScanInputs,
    out: Tensor,
    *,
    segment_length: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``meta.backward_outputs``."""
    gates, _, initial_state, reset, reverse, _ = inputs
    grad_gates, grad_tokens, grad_initial = backward_outputs(inputs)
    shifts = (-1, 0) if reverse else (1, 1)
    last = None if initial_state is None else grad_initial
    neighbours = (out, initial_state, grad_gates)
    _scan(gates, grad_out, grad_last_state, reset, grad_tokens, last, not reverse, shifts, segment_length, *neighbours)
    return grad_gates, grad_tokens, grad_initial
