"""Linear scan in Triton: forward and backward, either direction.

One kernel runs all four, since the gradient of a scan is a scan the other way: with h_t = g_t h_{t-1} + x_t, dL/dh_t
= lam_t = dL/dout_t + g_{t+1} lam_{t+1}, where dx_t = lam_t and dg_t = lam_t h_{t-1}. Only the step whose gate and
reset are read, and the direction, differ.

A program takes a tile of channels along time, a block of steps at once through `tl.associative_scan`, and loads the
next block before it computes: every number is read and written once, and memory is the bound. Where batch x channels
is too small to fill the chip, time is cut into segments: a first pass finds each segment's end from zero and its
product of gates, a second chains them, a third repeats them from their true starts.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.linear_scan.meta import backward_outputs, forward_outputs

# Programs an SM below which time is cut, and those wanted then.
ENOUGH, WANTED = 1.5, 8
# (channels, steps, warps) of a tile, where time is contiguous and where channels are.
TIME_CONTIGUOUS, CHANNELS_CONTIGUOUS = (4, 256, 4), (32, 32, 1)


@triton.jit
def follow(gate1, state1, gate2, state2):
    """The second stretch of time after the first."""
    return gate1 * gate2, gate2 * state1 + state2


@triton.jit
def follow_reset(gate1, state1, forgets1, gate2, state2, forgets2):
    """Where the second forgets, nothing of the first, NaN included, gets past it."""
    return gate1 * gate2, tl.where(forgets2 != 0, state2, gate2 * state1 + state2), forgets1 | forgets2


@triton.jit
def nearer_end(index1, value1, index2, value2):
    second = index2 > index1
    return tl.where(second, index2, index1), tl.where(second, value2, value1)


@triton.jit
def scan_kernel(
    gates,  # (batch, channels, time)
    tokens,  # (batch, channels, time): what is added, x or dL/dout
    first,  # (batch or slots, channels) or None: the state that enters
    reset,  # (batch, time) bytes or None
    states,  # (batch, channels, time) or None: output, h or lam; None in the first pass over segments
    past,  # (batch, channels, time) or None: backward, the forward pass's h
    initial_state,  # (batch, channels) or None: what stands in for h beyond its end
    grad_gates,  # (batch, channels, time) or None: backward output
    last,  # (batch or, in the first pass, slots; channels), contiguous, or None
    products,  # (slots, channels): the first pass's other outputs, the product of the gates
    forgotten,  # (slots, channels) bytes: and whether nothing gets through
    gates_strides,
    tokens_strides,
    first_strides,
    reset_strides,
    states_strides,
    past_strides,
    initial_strides,
    grad_strides,
    channels,
    time,
    tiles,
    segment,
    segments,
    REVERSE: tl.constexpr,  # direction of this scan
    GATE_SHIFT: tl.constexpr,  # step t's gate is gates[t + GATE_SHIFT], and 1 beyond the ends
    RESET_SHIFT: tl.constexpr,
    FIRST_BY_SLOT: tl.constexpr,
    TIME_FIRST: tl.constexpr,  # tile is (STEPS, CHANNELS), else (CHANNELS, STEPS)
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    dtype: tl.constexpr,
):
    axis: tl.constexpr = 0 if TIME_FIRST else 1
    other: tl.constexpr = 1 if TIME_FIRST else 0
    tile = tl.program_id(0) % tiles
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    row = slot // segments
    piece = slot % segments
    begin = piece * segment
    end = tl.minimum(begin + segment, time)
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
    if first is not None:
        place = slot if FIRST_BY_SLOT else row
        state = tl.load(first + place * first_strides[0] + d1 * first_strides[1], mask=d_in1, other=0.0).to(dtype)
    product = tl.full([CHANNELS], 1.0, dtype)
    forgot = tl.zeros([CHANNELS], tl.int32)

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
        # The last of a reversed scan looks before the segment, and finds nothing to load.
        ahead_in = (ahead < end) & (ahead >= begin) & d_in
        gate_in = ahead_in & (ahead + GATE_SHIFT < time) & (ahead + GATE_SHIFT >= 0)
        gate_next = tl.load(gates_tile + t0 * gates_strides[2], mask=gate_in, other=1.0)
        token_next = tl.load(tokens_tile + t0 * tokens_strides[2], mask=ahead_in, other=0.0)

        before = tl.expand_dims(state, axis)
        if reset is not None:
            r = t + RESET_SHIFT
            flags = tl.load(reset + row * reset_strides[0] + r * reset_strides[1], mask=(t < end) & (r < time), other=0)
            forgets = flags.to(tl.int32) + tl.zeros_like(index).to(tl.int32)
            scanned = tl.associative_scan((gate, token, forgets), axis, follow_reset, reverse=REVERSE)
            result = tl.where(scanned[2] != 0, scanned[1], scanned[0] * before + scanned[1])
        else:
            scanned = tl.associative_scan((gate, token), axis, follow, reverse=REVERSE)
            result = scanned[0] * before + scanned[1]
        state = tl.reduce((index, result), axis, nearer_end)[1]
        if states is None:
            product *= tl.reduce((index, scanned[0]), axis, nearer_end)[1]
            if reset is not None:
                forgot = forgot | tl.max(forgets, axis)
        else:
            out_place = states + row * states_strides[0] + d * states_strides[1] + (now + steps) * states_strides[2]
            tl.store(out_place, result.to(states.dtype.element_ty), mask=inside)
        if grad_gates is not None:
            neighbour = t - GATE_SHIFT
            known = inside & (neighbour >= 0) & (neighbour < time)
            past_place = past + row * past_strides[0] + d * past_strides[1] + neighbour * past_strides[2]
            h = tl.load(past_place, mask=known, other=0.0).to(dtype)
            if initial_state is not None:
                entered = tl.load(
                    initial_state + row * initial_strides[0] + d * initial_strides[1], mask=d_in, other=0.0
                ).to(dtype)
                h = tl.where(known, h, entered)
            grad = result * h
            if reset is not None:
                r = t + (1 - RESET_SHIFT)
                cuts = reset + row * reset_strides[0] + r * reset_strides[1]
                cut = tl.load(cuts, mask=(t < end) & (r < time), other=0)
                grad = tl.where(cut + tl.zeros_like(index).to(tl.int32) != 0, 0.0, grad)
            grad_place = grad_gates + row * grad_strides[0] + d * grad_strides[1] + (now + steps) * grad_strides[2]
            tl.store(grad_place, grad.to(grad_gates.dtype.element_ty), mask=inside)

    if states is None:
        tl.store(products + slot * channels + d1, product, mask=d_in1)
        tl.store(forgotten + slot * channels + d1, forgot.to(tl.uint8), mask=d_in1)
        tl.store(last + slot * channels + d1, state, mask=d_in1)
    elif last is not None and piece == (0 if REVERSE else segments - 1):
        if GATE_SHIFT != 0:
            edge = 0 if REVERSE else time - 1
            at_edge = gates + row * gates_strides[0] + d1 * gates_strides[1] + edge * gates_strides[2]
            state *= tl.load(at_edge, mask=d_in1, other=0.0).to(dtype)
        if REVERSE and reset is not None:
            state = tl.where(tl.load(reset + row * reset_strides[0] + d1 * 0) != 0, 0.0, state)
        tl.store(last + row * channels + d1, state, mask=d_in1)


@triton.jit
def chain_kernel(
    first,  # (batch, channels) or None
    first_strides,
    ends,  # (slots, channels), as are the others
    products,
    forgotten,
    enters,  # output: the state that enters each segment
    channels,
    blocks,
    segments,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = d < channels
    carry = tl.zeros([BLOCK], ends.dtype.element_ty)
    if first is not None:
        carry = tl.load(first + row * first_strides[0] + d * first_strides[1], mask=inside, other=0.0)
    place = row * segments * channels + d
    advance = tl.full((), channels, tl.int64)
    if REVERSE:
        place += advance * (segments - 1)
        advance = -advance
    for _ in range(segments):
        tl.store(enters + place, carry, mask=inside)
        end = tl.load(ends + place, mask=inside, other=0.0)
        product = tl.load(products + place, mask=inside, other=0.0)
        forgets = tl.load(forgotten + place, mask=inside, other=0)
        carry = tl.where(forgets != 0, end, product * carry + end)
        place += advance


def _scan(
    gates: Tensor,
    tokens: Tensor,
    first: Tensor | None,
    reset: Tensor | None,
    states: Tensor,
    last: Tensor | None,
    reverse: bool,
    shifts: tuple[int, int],
    segment: int,
    past: Tensor | None = None,
    initial_state: Tensor | None = None,
    grad_gates: Tensor | None = None,
) -> None:
    """Runs scan_kernel, once or, where time is cut, in three passes."""
    batch, channels, time = gates.shape
    dtype = torch.float64 if gates.dtype == torch.float64 else torch.float32
    time_first = gates.stride(1) == 1 and gates.stride(2) != 1
    channels_tile, steps, warps = CHANNELS_CONTIGUOUS if time_first else TIME_CONTIGUOUS
    steps = min(steps, runtime.power_of_two_at_least(time))
    tiles = runtime.ceil_div(channels, channels_tile)
    chip = runtime.processors(gates.device)
    if not segment:
        segment = runtime.segment_length(time, tiles * batch, steps, int(ENOUGH * chip), WANTED * chip)
    segments = runtime.ceil_div(time, segment)
    slots = batch * segments
    reset = runtime.as_bytes(reset)

    def walk(first: Tensor | None, by_slot: bool, outputs: tuple[Tensor | None, ...]) -> None:
        states, past, initial_state, grad_gates, last, products, forgotten = outputs
        runtime.launch(
            scan_kernel,
            tiles * slots,
            *(gates, tokens, first, reset, *outputs),
            runtime.strides(gates, 3),
            runtime.strides(tokens, 3),
            runtime.strides(first, 2),
            runtime.strides(reset, 2),
            runtime.strides(states, 3),
            runtime.strides(past, 3),
            runtime.strides(initial_state, 2),
            runtime.strides(grad_gates, 3),
            *(channels, time, tiles, segment, segments),
            REVERSE=reverse,
            GATE_SHIFT=shifts[0],
            RESET_SHIFT=shifts[1],
            FIRST_BY_SLOT=by_slot,
            TIME_FIRST=time_first,
            CHANNELS=channels_tile,
            STEPS=steps,
            dtype=tl.float64 if dtype == torch.float64 else tl.float32,
            num_warps=warps,
        )

    outputs = (states, past, initial_state, grad_gates, last, None, None)
    with runtime.on_device(gates):
        if segments == 1:
            walk(first, False, outputs)
            return
        ends = torch.empty((slots, channels), dtype=dtype, device=gates.device)
        products, enters = torch.empty_like(ends), torch.empty_like(ends)
        forgotten = torch.empty((slots, channels), dtype=torch.uint8, device=gates.device)
        walk(None, False, (None, None, None, None, ends, products, forgotten))
        block = 128
        blocks = runtime.ceil_div(channels, block)
        runtime.launch(
            chain_kernel,
            blocks * batch,
            first,
            runtime.strides(first, 2),
            *(ends, products, forgotten, enters, channels, blocks, segments),
            REVERSE=reverse,
            BLOCK=block,
            num_warps=4,
        )
        walk(enters, True, outputs)


def forward(
    gates: Tensor,
    tokens: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    channel_last: bool,
    *,
    segment: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, last_state) of gates and tokens (batch, channels, time); ``segment`` forces a cut into so many steps."""
    out, last_state = forward_outputs(gates, channel_last)
    # In reverse, the reset at t + 1 keeps h_{t+1} from h_t.
    _scan(gates, tokens, initial_state, reset, out, last_state, reverse, (0, 1 if reverse else 0), segment)
    return out, last_state


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    gates: Tensor,
    out: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    channel_last: bool,
    *,
    segment: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (gates, tokens, initial_state)."""
    grad_gates, grad_tokens, grad_initial = backward_outputs(gates, initial_state, channel_last)
    shifts = (-1, 0) if reverse else (1, 1)
    last = None if initial_state is None else grad_initial
    neighbours = (out, initial_state, grad_gates)
    _scan(gates, grad_out, grad_last_state, reset, grad_tokens, last, not reverse, shifts, segment, *neighbours)
    return grad_gates, grad_tokens, grad_initial
