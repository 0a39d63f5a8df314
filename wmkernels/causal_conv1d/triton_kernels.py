"""The causal convolution in Triton.

A program computes a tile of channels by steps. Taps are read again for every step, from the cache: nothing depends on
another step, and memory is touched once. How far a tap reaches is followed step by step back, across no reset. The
backward pass first writes the gradient of the sum where silu has a slope, then reads it `width` times; gradients of the
weights are summed per program and then over programs in one order.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.causal_conv1d.meta import ConvInputs, backward_outputs, forward_outputs
from wmkernels.triton_device import sigmoid

CHANNELS, STEPS, WARPS = 32, 64, 4


@triton.jit
def tile_of(program, channels, time, blocks, chunks, CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    """(batch row, channels, steps, and which of both exist)."""
    block, chunk, row = program % blocks, program // blocks % chunks, program // blocks // chunks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    t = chunk * STEPS + tl.arange(0, STEPS)
    return row, channel, t, channel < channels, t < time


@triton.jit
def load_tile(x, strides, row, channel, t, mask, dtype: tl.constexpr):
    at = x + row * strides[0] + channel[:, None] * strides[1] + t[None, :] * strides[2]
    return tl.load(at, mask=mask, other=0).to(dtype)


@triton.jit
def input_before(
    x, initial_state, x_strides, initial_strides, row, sequence, begin, channel, t, k, alive, inside, past, dtype
):
    """Inputs k steps before t, from the window where t - k comes before the sequence; zero where not ``alive``."""
    mask = inside & alive[None, :]
    value = load_tile(x, x_strides, row, channel, t - k, mask & (t - k >= begin)[None, :], dtype)
    if initial_state is not None:
        at = initial_state + channel[:, None] * initial_strides[1]
        at += (sequence * initial_strides[0] + (past + t - k - begin) * initial_strides[2])[None, :]
        value += tl.load(at, mask=mask & (t - k < begin)[None, :], other=0).to(dtype)
    return value


@triton.jit
def sequence_at(owners, cu_seqlens, row, t, exists, time):
    """(sequence, its first step, its end) of every step."""
    if owners is None:
        return row + t * 0, t * 0, t * 0 + time
    sequence = tl.load(owners + t, mask=exists, other=0)
    begin = tl.load(cu_seqlens + sequence, mask=exists, other=0)
    end = tl.load(cu_seqlens + sequence + 1, mask=exists, other=0)
    return sequence, begin, end


@triton.jit
def is_reset(reset, strides, row, t, mask):
    return tl.load(reset + row * strides[0] + t * strides[1], mask=mask, other=0) != 0


@triton.jit
def convolution_kernel(
    x,  # (batch, channels, time)
    weight,  # (channels, width)
    bias,  # (channels,) or None
    initial_state,  # (sequences, channels, width - 1) or None
    reset,  # (batch, time) bytes or None
    owners,  # (time,), sequence of each step, or None
    cu_seqlens,  # (sequences + 1,) or None
    out,  # as x; the sum's gradient if grad_out is given
    grad_out,  # as x or None
    x_strides,
    weight_strides,
    bias_strides,
    initial_strides,
    reset_strides,
    out_strides,
    grad_strides,
    channels,
    time,
    blocks,
    chunks,
    width,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    dtype: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, channel, t, has_channel, exists = tile_of(program, channels, time, blocks, chunks, CHANNELS, STEPS)
    sequence, begin, _ = sequence_at(owners, cu_seqlens, row, t, exists, time)
    inside = has_channel[:, None] & exists[None, :]
    total = tl.zeros((CHANNELS, STEPS), dtype)
    if bias is not None:
        total += tl.load(bias + channel * bias_strides[0], mask=has_channel, other=0).to(dtype)[:, None]
    alive = exists
    for k in range(0, width):
        value = input_before(
            x, initial_state, x_strides, initial_strides, row, sequence, begin, channel, t, k, alive, inside,
            width - 1, dtype,
        )  # fmt: skip
        tap = weight + channel * weight_strides[0] + (width - 1 - k) * weight_strides[1]
        total += tl.load(tap, mask=has_channel, other=0).to(dtype)[:, None] * value
        if reset is not None:
            alive = alive & ~is_reset(reset, reset_strides, row, t - k, exists & (t - k >= begin))
    if SILU:
        slope = sigmoid(total)
        total = total * slope if grad_out is None else slope * (1.0 + total * (1.0 - slope))
        if grad_out is not None:
            total *= load_tile(grad_out, grad_strides, row, channel, t, inside, dtype)
    at = out + row * out_strides[0] + channel[:, None] * out_strides[1] + t[None, :] * out_strides[2]
    tl.store(at, total, mask=inside)


@triton.jit
def gradient_kernel(
    x,  # (batch, channels, time)
    weight,  # (channels, width)
    initial_state,  # (sequences, channels, width - 1) or None
    reset,  # (batch, time) bytes or None
    owners,  # (time,) or None
    cu_seqlens,  # (sequences + 1,) or None
    grad_sum,  # as x
    grad_last_state,  # (sequences, channels, width - 1) or None
    grad_x,  # as x
    partials,  # (programs / blocks, channels, width + 1)
    x_strides,
    weight_strides,
    initial_strides,
    reset_strides,
    grad_sum_strides,
    grad_last_strides,
    grad_x_strides,
    channels,
    time,
    blocks,
    chunks,
    width,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    dtype: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, channel, t, has_channel, exists = tile_of(program, channels, time, blocks, chunks, CHANNELS, STEPS)
    sequence, begin, end = sequence_at(owners, cu_seqlens, row, t, exists, time)
    inside = has_channel[:, None] & exists[None, :]
    g = load_tile(grad_sum, grad_sum_strides, row, channel, t, inside, dtype)
    total = tl.zeros((CHANNELS, STEPS), dtype)
    partial = partials + (program // blocks * channels + channel) * (width + 1)
    tl.store(partial + width, tl.sum(g, 1), mask=has_channel)
    back, ahead = exists, exists
    for k in range(0, width):
        value = input_before(
            x, initial_state, x_strides, initial_strides, row, sequence, begin, channel, t, k, back, inside,
            width - 1, dtype,
        )  # fmt: skip
        tl.store(partial + width - 1 - k, tl.sum(g * value, 1), mask=has_channel)
        if reset is not None:
            back = back & ~is_reset(reset, reset_strides, row, t - k, exists & (t - k >= begin))
            ahead = ahead & ((k == 0) | ~is_reset(reset, reset_strides, row, t + k, exists & (t + k < end)))
        later = load_tile(
            grad_sum, grad_sum_strides, row, channel, t + k, inside & (ahead & (t + k < end))[None, :], dtype
        )
        tap = weight + channel * weight_strides[0] + (width - 1 - k) * weight_strides[1]
        total += tl.load(tap, mask=has_channel, other=0).to(dtype)[:, None] * later
    if grad_last_state is not None:
        # ``ahead``: no reset in the width - 1 steps after t, so up to the end for those near it
        position = width - 1 - end + t
        at = grad_last_state + channel[:, None] * grad_last_strides[1]
        at += (sequence * grad_last_strides[0] + position * grad_last_strides[2])[None, :]
        total += tl.load(at, mask=inside & (ahead & (position >= 0))[None, :], other=0).to(dtype)
    at = grad_x + row * grad_x_strides[0] + channel[:, None] * grad_x_strides[1] + t[None, :] * grad_x_strides[2]
    tl.store(at, total, mask=inside)


@triton.jit
def window_kernel(
    x,  # (batch, channels, time); backward: the sum's gradient
    weight,  # (channels, width); backward only
    state,  # (sequences, channels, width - 1) or None: the initial one; backward: the last one's gradient
    reset,  # (batch, time) bytes or None
    cu_seqlens,  # (sequences + 1,) or None
    out,  # (sequences, channels, width - 1): the last state; backward: the initial one's gradient
    x_strides,
    weight_strides,
    state_strides,
    reset_strides,
    out_strides,
    channels,
    time,
    blocks,
    width,
    BACKWARD: tl.constexpr,
    CHANNELS: tl.constexpr,
    dtype: tl.constexpr,
):
    """One input of a window: a program per sequence, position and tile of channels."""
    program = tl.program_id(0).to(tl.int64)
    past = width - 1
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    position, sequence = program // blocks % past, program // blocks // past
    mask = channel < channels
    row, begin, end = sequence, time * 0, time
    if cu_seqlens is not None:
        row, begin, end = sequence * 0, tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    total = tl.zeros((CHANNELS,), dtype)
    if BACKWARD:
        t = begin - past + position + channel * 0  # of this input, before the sequence
        kept = mask
        for k in range(past - position, width):
            if reset is not None:
                here = (t + k < end) & kept
                kept = kept & ~is_reset(reset, reset_strides, row, t + k, here)
            at = x + row * x_strides[0] + channel * x_strides[1] + (t + k) * x_strides[2]
            later = tl.load(at, mask=mask & kept & (t + k < end), other=0).to(dtype)
            tap = weight + channel * weight_strides[0] + (past - k) * weight_strides[1]
            total += tl.load(tap, mask=mask, other=0).to(dtype) * later
        place = t - (end - past)
        if state is not None:
            at = state + sequence * state_strides[0] + channel * state_strides[1] + place * state_strides[2]
            total += tl.load(at, mask=mask & kept & (place >= 0), other=0).to(dtype)
    else:
        t = end - past + position + channel * 0
        kept = mask
        if reset is not None:
            for k in range(1, past - position):
                kept = kept & ~is_reset(reset, reset_strides, row, t + k, t + k >= begin)
        at = x + row * x_strides[0] + channel * x_strides[1] + t * x_strides[2]
        total += tl.load(at, mask=mask & kept & (t >= begin), other=0).to(dtype)
        if state is not None:
            at = state + sequence * state_strides[0] + channel * state_strides[1]
            at += (past + t - begin) * state_strides[2]
            total += tl.load(at, mask=mask & kept & (t < begin), other=0).to(dtype)
    at = out + sequence * out_strides[0] + channel * out_strides[1] + position * out_strides[2]
    tl.store(at, total, mask=mask)


def _tiles(inputs: ConvInputs) -> tuple[int, int, int]:
    """(programs, blocks of channels, chunks of time)."""
    batch, channels, time = inputs.x.shape
    blocks, chunks = runtime.ceil_div(channels, CHANNELS), runtime.ceil_div(time, STEPS)
    return batch * blocks * chunks, blocks, chunks


def _owners(inputs: ConvInputs) -> Tensor | None:
    """The sequence of each step."""
    if inputs.cu_seqlens is None:
        return None
    steps = torch.arange(inputs.x.shape[2], device=inputs.x.device)
    return torch.searchsorted(inputs.cu_seqlens, steps, right=True) - 1


def _dtype(inputs: ConvInputs) -> tl.dtype:
    return tl.float64 if inputs.x.dtype == torch.float64 else tl.float32


def _convolve(inputs: ConvInputs, owners: Tensor | None, out: Tensor, grad_out: Tensor | None) -> None:
    x, weight, bias, initial_state, reset, cu_seqlens, silu, _ = inputs
    programs, blocks, chunks = _tiles(inputs)
    runtime.launch(
        convolution_kernel,
        programs,
        *(x, weight, bias, initial_state, runtime.as_bytes(reset), owners, cu_seqlens, out, grad_out),
        runtime.strides(x, 3),
        runtime.strides(weight, 2),
        runtime.strides(bias, 1),
        runtime.strides(initial_state, 3),
        runtime.strides(reset, 2),
        runtime.strides(out, 3),
        runtime.strides(grad_out, 3),
        *(x.shape[1], x.shape[2], blocks, chunks, weight.shape[1]),
        SILU=silu,
        CHANNELS=CHANNELS,
        STEPS=STEPS,
        dtype=_dtype(inputs),
        num_warps=WARPS,
    )


def _windows(inputs: ConvInputs, x: Tensor, state: Tensor | None, out: Tensor, backward: bool) -> None:
    weight, reset, blocks = inputs.weight, inputs.reset, runtime.ceil_div(inputs.x.shape[1], CHANNELS)
    runtime.launch(
        window_kernel,
        inputs.sequences * (weight.shape[1] - 1) * blocks,
        *(x, weight, state, runtime.as_bytes(reset), inputs.cu_seqlens, out),
        runtime.strides(x, 3),
        runtime.strides(weight, 2),
        runtime.strides(state, 3),
        runtime.strides(reset, 2),
        runtime.strides(out, 3),
        *(x.shape[1], x.shape[2], blocks, weight.shape[1]),
        BACKWARD=backward,
        CHANNELS=CHANNELS,
        dtype=_dtype(inputs),
        num_warps=1,
    )


def forward(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    out, last_state = forward_outputs(inputs)
    inputs = _packed(inputs)
    with runtime.on_device(inputs.x):
        _convolve(inputs, _owners(inputs), out, None)
        _windows(inputs, inputs.x, inputs.initial_state, last_state, False)
    return out, last_state


def backward(grad_out: Tensor, grad_last_state: Tensor | None, inputs: ConvInputs) -> tuple[Tensor, ...]:
    """As ``meta.backward_outputs``."""
    grad_x, grad_weight, grad_bias, grad_initial_state = backward_outputs(inputs)
    inputs = _packed(inputs)
    x, weight, bias, initial_state, reset, cu_seqlens, silu, _ = inputs
    programs, blocks, chunks = _tiles(inputs)
    shape = (programs // blocks, x.shape[1], weight.shape[1] + 1)
    with runtime.on_device(x):
        owners = _owners(inputs)
        grad_sum = torch.empty(x.shape, dtype=weight.dtype, device=x.device) if silu else grad_out
        if silu:
            _convolve(inputs, owners, grad_sum, grad_out)
        partials = torch.empty(shape, dtype=weight.dtype, device=x.device)
        runtime.launch(
            gradient_kernel,
            programs,
            *(x, weight, initial_state, runtime.as_bytes(reset), owners, cu_seqlens, grad_sum, grad_last_state),
            *(grad_x, partials),
            runtime.strides(x, 3),
            runtime.strides(weight, 2),
            runtime.strides(initial_state, 3),
            runtime.strides(reset, 2),
            runtime.strides(grad_sum, 3),
            runtime.strides(grad_last_state, 3),
            runtime.strides(grad_x, 3),
            *(x.shape[1], x.shape[2], blocks, chunks, weight.shape[1]),
            CHANNELS=CHANNELS,
            STEPS=STEPS,
            dtype=_dtype(inputs),
            num_warps=WARPS,
        )
        sums = partials.sum(0)
        grad_weight.copy_(sums[:, :-1])
        if bias is not None:
            grad_bias.copy_(sums[:, -1])
        if initial_state is not None:
            _windows(inputs, grad_sum, grad_last_state, grad_initial_state, True)
    return grad_x, grad_weight, grad_bias, grad_initial_state


def _packed(inputs: ConvInputs) -> ConvInputs:
    return inputs if inputs.cu_seqlens is None else inputs._replace(cu_seqlens=inputs.cu_seqlens.contiguous())
