"""Device functions of the selective scan.

Tiles are (T, NI, D1, NL, DL): T steps, NI * NL states, D1 * DL channels. NL * DL is a warp's lanes (fewer only with
few channels), D1 at least the warps. A thread holds all T steps, so ``tl.associative_scan`` over T is one multiply-add
per element.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from wmkernels.triton_device import LEAST_STEP, decay_rate, last_of, sigmoid, softplus


@triton.jit
def last_step(x, index):
    """x[-1]."""
    return tl.reduce((index, x), 0, last_of)[1]


@triton.jit
def select(x, index, t: tl.constexpr):
    """x[t], without shuffles."""
    return tl.reduce(((index == t).to(tl.int32), x), 0, last_of)[1]


@triton.jit
def reverse_scan(decay, sources, dh, reset_t, index, T: tl.constexpr):
    """dh_t = sources_t + decay_{t+1} dh_{t+1}; returns dh_t and decay_0 dh_0.

    Unrolled: Triton's reversed scan shuffles every element twice.
    """
    dh_t = sources
    for back in tl.static_range(T):
        dh_last = select(sources, index, T - 1 - back) + dh
        dh_t = tl.where(index == T - 1 - back, dh_last[None], dh_t)
        dh = select(decay, index, T - 1 - back) * dh_last
        if reset_t is not None:
            dh = tl.where(select(reset_t + index * 0, index, T - 1 - back) != 0, 0.0, dh)
    return dh_t, dh


@triton.jit
def broadcast_states(x):
    """(T, D1, DL) -> (T, 1, D1, 1, DL)."""
    return x[:, None, :, None, :]


@triton.jit
def broadcast_channels(x):
    """(T, NI, NL) -> (T, NI, 1, NL, 1)."""
    return x[:, :, None, :, None]


@triton.jit
def sum_states(x):
    """(T, D1, DL)."""
    return tl.sum(tl.sum(x, 1), 2)


@triton.jit
def sum_channels(x):
    """(T, NI, NL)."""
    return tl.sum(tl.sum(x, 2), 3)


@triton.jit
def locate_segment(segment, cu_seqlens, sequences, time, length, segments_per_sequence):
    """Bounds of a segment of at most ``length`` steps.

    Bisection finds packed sequence s, which starts at segment cu_seqlens[s] / length + s.

    Returns (sequence, batch row, sequence start, segment start, segment end, is last, number within the sequence).
    """
    if cu_seqlens is None:
        sequence = segment // segments_per_sequence
        row = sequence
        local_segment = segment - sequence * segments_per_sequence
        begin = local_segment * 0
        finish = begin + time
    else:
        low = segment * 0
        high = low + sequences
        while high - low > 1:
            middle = (low + high) // 2
            below = tl.load(cu_seqlens + middle) // length + middle <= segment
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle)
        sequence = low
        row = low * 0
        begin = tl.load(cu_seqlens + low)
        finish = tl.load(cu_seqlens + low + 1)
        local_segment = segment - (begin // length + low)
    start = tl.minimum(begin + local_segment * length, finish)
    end = tl.minimum(start + length, finish)
    # An empty sequence has one empty segment.
    last = (end == finish) & ((start < finish) | (local_segment == 0))
    return sequence, row, begin, start, end, last, local_segment


@triton.jit
def tile_channels(tiles, group_tiles, group_channels, D1: tl.constexpr, DL: tl.constexpr):
    """(tile, segment, group, channels (D1, DL), channel mask)."""
    tile = tl.program_id(0) % tiles
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    group = (tile // group_tiles).to(tl.int64)
    local = (tile % group_tiles) * (D1 * DL) + tl.arange(0, D1)[:, None] * DL + tl.arange(0, DL)[None, :]
    return tile, segment, group, group * group_channels + local, local < group_channels


@triton.jit
def state_indices(NI: tl.constexpr, NL: tl.constexpr):
    """(NI, NL), contiguous per thread."""
    return tl.arange(0, NI)[:, None] + NI * tl.arange(0, NL)[None, :]


@triton.jit
def load_decay_rates(A, strides, d4, n4, state_in):
    """Decays are exp2."""
    # padding: an infinite step times zero would be NaN
    return decay_rate(tl.load(A + d4 * strides[0] + n4 * strides[1], mask=state_in, other=-LEAST_STEP))


@triton.jit
def first_chunk_index(sequence, begin, cu_seqlens, time, chunk):
    """The sequence's first row of chunk_states (selective_scan.inc)."""
    if cu_seqlens is None:
        segment = sequence * ((time + chunk - 1) // chunk)
    else:
        segment = begin // chunk + sequence
    return segment


@triton.jit
def step_size(delta, bias, inside, SOFTPLUS: tl.constexpr):
    """(step, delta + bias); padding steps are 0."""
    raw = delta
    if bias is not None:
        raw = raw + bias[None]
    if SOFTPLUS:
        step = softplus(raw)
    else:
        step = raw
    return tl.where(inside, step, 0.0), raw


@triton.jit
def load_tile(tile, stride, t0, inside, dtype: tl.constexpr):
    return tl.load(tile + t0 * stride, mask=inside, other=0.0).to(dtype)


@triton.jit
def load_resets(reset, row, strides, t, end):
    flags = tl.load(reset + row * strides[0] + t * strides[1], mask=t < end, other=0)
    return flags.to(tl.int32)[:, None, None, None, None]


@triton.jit
def silu_gate_backward(grad_out, z):
    return grad_out * (z * sigmoid(z))
