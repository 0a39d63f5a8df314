"""Device functions that the Triton kernels of the selective scan share.

Tiles are five-dimensional, (T, NI, D1, NL, DL): T steps of time, NI * NL states and D1 * DL channels. Triton deals
the 32 lanes of a warp to the last dimensions, then the warps, then repeats within a thread. NL * DL is 32 and D1 is
at least the number of warps, so a thread holds all T steps of NI states of some channels, and everything along time
happens within one thread: `tl.associative_scan` over T becomes a plain loop over registers, one multiply-add an
element, whose carry is put into the first element and whose running product of decays, unused, is never computed.

A decay of -1 marks a reset. Decays are exponentials, never negative, so the mark is free, and where it stands the
past is dropped by a select: NaN and infinity stay behind it.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RESET = tl.constexpr(-1.0)


@triton.jit
def exponential(x):
    """e to the x; exactly 1 at 0."""
    return tl.math.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exponential(-x))


@triton.jit
def softplus(x):
    """log(1 + e^x), and x itself above 20, as PyTorch has it.

    log(1 + v) for v = e^-|x| in (0, 1] is 2 atanh(s) with s = v / (2 + v), at most 1/3: a short odd series in float32,
    exact to rounding where v is tiny, which log(1 + v) as written is not. In float64 the rounding of 1 + v is divided
    out again (Goldberg 1991, theorem 4).
    """
    v = exponential(-tl.abs(x))
    if x.dtype == tl.float64:
        w = 1.0 + v
        series = tl.where(w == 1.0, v, tl.log(w) * (v / tl.where(w == 1.0, 1.0, w - 1.0)))
    else:
        s = v / (2.0 + v)
        r = s * s
        p = r * (1.0 / 13.0) + 1.0 / 11.0
        p = p * r + 1.0 / 9.0
        p = p * r + 1.0 / 7.0
        p = p * r + 1.0 / 5.0
        p = p * r + 1.0 / 3.0
        series = 2.0 * (s + s * r * p)
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + series)


@triton.jit
def follow(decay1, state1, decay2, state2):
    """The second stretch of time after the first."""
    return decay1 * decay2, decay2 * state1 + state2


@triton.jit
def follow_reset(decay1, state1, decay2, state2):
    forgets = decay2 < 0.0
    decay = tl.where(forgets | (decay1 < 0.0), RESET, decay1 * decay2)
    return decay, tl.where(forgets, state2, decay2 * state1 + state2)


@triton.jit
def follow_kept(decay1, state1, kept1, decay2, state2, kept2):
    """Also what of the state before the last step that step has kept, decay_t h_{t-1}: kept is 0 in a single step."""
    return decay1 * decay2, decay2 * state1 + state2, decay2 * state1 + kept2


@triton.jit
def follow_kept_reset(decay1, state1, kept1, decay2, state2, kept2):
    forgets = decay2 < 0.0
    decay = tl.where(forgets | (decay1 < 0.0), RESET, decay1 * decay2)
    state = tl.where(forgets, state2, decay2 * state1 + state2)
    return decay, state, tl.where(forgets, kept2, decay2 * state1 + kept2)


@triton.jit
def later_of(index1, value1, index2, value2):
    second = index2 > index1
    return tl.where(second, index2, index1), tl.where(second, value2, value1)


@triton.jit
def last_step(x, index):
    """x[-1] along the first dimension: (T, ...) -> (...); ``index`` is 0, 1, ... along it, of the shape of x."""
    return tl.reduce((index, x), 0, later_of)[1]


@triton.jit
def pick(x, index, t: tl.constexpr):
    """x[t] along the first dimension, which costs nothing where a thread holds all of it."""
    return tl.reduce(((index == t).to(tl.int32), x), 0, later_of)[1]


@triton.jit
def flow_back(decay, sources, flow, forgets, index, T: tl.constexpr):
    """Backwards through T steps: lam_t = sources_t + flow_t, flow_{t-1} = decay_t lam_t, and 0 where t forgets.

    A loop over the steps, unrolled, because Triton's reversed scan sends everything through shuffles twice.

    Returns (lam of every step (T, ...), what flows out to before the first (...)).
    """
    lam = sources
    for back in tl.static_range(T):
        lam_t = pick(sources, index, T - 1 - back) + flow
        lam = tl.where(index == T - 1 - back, lam_t[None], lam)
        flow = pick(decay, index, T - 1 - back) * lam_t
        if forgets is not None:
            flow = tl.where(pick(forgets + index * 0, index, T - 1 - back) != 0, 0.0, flow)
    return lam, flow


@triton.jit
def over_states(x):
    """Per channel and step, (T, D1, DL), as (T, 1, D1, 1, DL)."""
    return x[:, None, :, None, :]


@triton.jit
def over_channels(x):
    """Per state and step, (T, NI, NL), as (T, NI, 1, NL, 1)."""
    return x[:, :, None, :, None]


@triton.jit
def sum_states(x):
    """(T, NI, D1, NL, DL) -> (T, D1, DL); within threads first."""
    return tl.sum(tl.sum(x, 1), 2)


@triton.jit
def sum_channels(x):
    """(T, NI, D1, NL, DL) -> (T, NI, NL); within threads first."""
    return tl.sum(tl.sum(x, 2), 3)


@triton.jit
def locate(slot, cu_seqlens, sequences, time, length, slots_each):
    """Which piece of which sequence a slot is, when every sequence is cut into pieces of ``length`` steps.

    Slots count sequence by sequence. Packed, the first slot of sequence s is cu_seqlens[s] / length + s, which leaves
    enough for each, and one at least, whatever the lengths; s is found by bisection.

    Returns (sequence, row of the batch, first step of the sequence, first and past-the-last step of the piece, whether
    it is the sequence's last, slots of the sequence before this).
    """
    if cu_seqlens is None:
        sequence = slot // slots_each
        row = sequence
        piece = slot - sequence * slots_each
        begin = piece * 0
        finish = begin + time
    else:
        low = slot * 0
        high = low + sequences
        while high - low > 1:
            middle = (low + high) // 2
            below = tl.load(cu_seqlens + middle) // length + middle <= slot
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle)
        sequence = low
        row = low * 0
        begin = tl.load(cu_seqlens + low)
        finish = tl.load(cu_seqlens + low + 1)
        piece = slot - (begin // length + low)
    start = tl.minimum(begin + piece * length, finish)
    end = tl.minimum(start + length, finish)
    # An empty sequence has one empty piece, which is its first and its last.
    last = (end == finish) & ((start < finish) | (piece == 0))
    return sequence, row, begin, start, end, last, piece


@triton.jit
def own_channels(tiles, group_tiles, group_channels, D1: tl.constexpr, DL: tl.constexpr):
    """What a program's number says: (tile of channels, slot, group, channels (D1, DL), which of them there are)."""
    tile = tl.program_id(0) % tiles
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    group = (tile // group_tiles).to(tl.int64)
    local = (tile % group_tiles) * (D1 * DL) + tl.arange(0, D1)[:, None] * DL + tl.arange(0, DL)[None, :]
    return tile, slot, group, group * group_channels + local, local < group_channels


@triton.jit
def state_numbers(NI: tl.constexpr, NL: tl.constexpr):
    """(NI, NL); a thread's states are neighbours."""
    return tl.arange(0, NI)[:, None] + NI * tl.arange(0, NL)[None, :]


@triton.jit
def load_rates(A, strides, d4, n4, state_in):
    """A log2 e, of the shape of the state."""
    return tl.load(A + d4 * strides[0] + n4 * strides[1], mask=state_in, other=0.0) * LOG2E


@triton.jit
def first_chunk_slot(sequence, begin, cu_seqlens, time, chunk):
    """Slot of the first saved state of a sequence (csrc/include/wmkernels.h, Chunks)."""
    if cu_seqlens is None:
        slot = sequence * ((time + chunk - 1) // chunk)
    else:
        slot = begin // chunk + sequence
    return slot


@triton.jit
def step_size(delta, bias, inside, SOFTPLUS: tl.constexpr):
    """(step, delta + bias) of a tile (T, D1, DL); steps past the end are 0, which leaves a state as it is."""
    raw = delta
    if bias is not None:
        raw = raw + bias[None]
    if SOFTPLUS:
        step = softplus(raw)
    else:
        step = raw
    return tl.where(inside, step, 0.0), raw


@triton.jit
def load_steps(tile, stride, t0, inside, dtype: tl.constexpr):
    """Steps from t0 on of a tile of pointers, in the dtype of the arithmetic."""
    return tl.load(tile + t0 * stride, mask=inside, other=0.0).to(dtype)


@triton.jit
def load_resets(reset, row, strides, t, end):
    """1 where step t forgets, else 0: (T, 1, 1, 1, 1)."""
    flags = tl.load(reset + row * strides[0] + t * strides[1], mask=t < end, other=0)
    return flags.to(tl.int32)[:, None, None, None, None]


@triton.jit
def through_silu(grad_out, z):
    """The gradient that passes the gate z silu."""
    return grad_out * (z * sigmoid(z))
