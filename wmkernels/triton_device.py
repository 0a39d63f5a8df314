"""Exponentials and associative combine functions for Triton.

A time range is (decay product, final state from zero). A reset drops the incoming state by selection, so NaN does not
cross. ``*_mark`` functions encode a reset as a decay of -1, which no exponential gives; gates can be negative, so
``combine_flag`` takes a flag.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST64 = tl.constexpr(1.7976931348623157e308)
LEAST_STEP = tl.constexpr(2.0**-118)
LEAST_STEP64 = tl.constexpr(2.0**-1013)
RESET = tl.constexpr(-1.0)


@triton.jit
def exponential(x):
    """e^x, exactly 1 at 0."""
    return tl.math.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exponential(-x))


@triton.jit
def softplus(x):
    """log(1 + e^x); x above 20, as in PyTorch.

    With v = e^-|x|, s = v / (2 + v): log(1 + v) = 2 atanh(s), in float32 a short series. float64 corrects the rounding
    of 1 + v (Goldberg 1991, theorem 4).
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
    step = tl.maximum(x, 0.0) + series
    least: tl.constexpr = LEAST_STEP64 if x.dtype == tl.float64 else LEAST_STEP
    return tl.where(x > 20.0, x, tl.where(step < least, least, step))


@triton.jit
def decay_rate(A):
    """A log2(e), made finite: infinity times a padding step or a zero gradient would be NaN. Keeps NaN.

    From a step of 2^-118 (float64: 2^-1013) on, the decay is exact; ``softplus`` returns no smaller step.
    """
    largest: tl.constexpr = LARGEST64 if A.dtype == tl.float64 else LARGEST
    rate = A * LOG2E
    return tl.where(rate < -largest, -largest, tl.where(rate > largest, largest, rate))


@triton.jit
def combine(decay1, state1, decay2, state2):
    return decay1 * decay2, decay2 * state1 + state2


@triton.jit
def pass_state(decay, state, before):
    """The state after a range. Zero stays zero: the range's decay may overflow where no step's does."""
    return tl.where(before == 0.0, state, decay * before + state)


@triton.jit
def combine_range(decay1, state1, decay2, state2):
    """As ``combine``, where threads share the steps."""
    return decay1 * decay2, pass_state(decay2, state2, state1)


@triton.jit
def combine_range_flag(decay1, state1, reset1, decay2, state2, reset2):
    decay, state = combine_range(decay1, state1, decay2, state2)
    return decay, tl.where(reset2 != 0, state2, state), reset1 | reset2


@triton.jit
def combine_mark(decay1, state1, decay2, state2):
    decay, state = combine(decay1, state1, decay2, state2)
    reset = decay2 < 0.0
    return tl.where(reset | (decay1 < 0.0), RESET, decay), tl.where(reset, state2, state)


@triton.jit
def combine_decayed(decay1, state1, decayed1, decay2, state2, decayed2):
    """Also scans decay_t h_{t-1} of the range's last step, which dA and ddelta need."""
    decay, state = combine(decay1, state1, decay2, state2)
    return decay, state, decay2 * state1 + decayed2


@triton.jit
def combine_decayed_mark(decay1, state1, decayed1, decay2, state2, decayed2):
    decay, state = combine_mark(decay1, state1, decay2, state2)
    return decay, state, tl.where(decay2 < 0.0, decayed2, decay2 * state1 + decayed2)


@triton.jit
def last_of(index1, value1, index2, value2):
    """The value at the larger index: a reduction by it selects the last step."""
    second = index2 > index1
    return tl.where(second, index2, index1), tl.where(second, value2, value1)
