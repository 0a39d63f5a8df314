"""Device functions of the place memory: the two products of a step, over blocks of frequencies and of places.

``x`` and ``y`` are the state's cosine and sine rows, (FREQUENCIES, CHANNELS) blocks in the world's frame; ``u`` and
``v`` the same rows in the observer's frame. Memory that one step writes and the next reads needs a barrier between the
two: blocks are distributed over threads as the compiler likes.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def bounds_of(cu_seqlens, sequence, time):
    """(row of the batch, first step, end) of a sequence."""
    if cu_seqlens is None:
        row, begin = sequence, sequence * 0
        end = begin + time
    else:
        row, begin = sequence * 0, tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
    return row, begin, end


@triton.jit
def only_if(condition, size):
    """The bound of a mask: ``size``, or 0."""
    return tl.where(condition, size, 0)


@triton.jit
def is_set(reset, stride, t, exists):
    """Whether ``reset`` is set at a step that may not exist."""
    if reset is None:
        found = t < 0
    else:
        found = tl.load(reset + t * stride, mask=exists, other=0) != 0
    return found & exists


@triton.jit
def phase_of(phase, initial_phase, strides, initial_stride, t, begin, is_reset, f, frequencies):
    """(cos, sin), (FREQUENCIES,), of the write of step ``t``: what the step before read at."""
    turned = f < only_if((t > begin) & (is_reset == 0), frequencies)
    here = phase + (t - 1) * strides[1] + f * strides[3]
    cos = tl.load(here, mask=turned, other=1.0)
    sin = tl.load(here + frequencies * strides[3], mask=turned, other=0.0)
    if initial_phase is not None:
        first = f < only_if((t == begin) & (is_reset == 0), frequencies)
        here = initial_phase + f * initial_stride
        cos = tl.where(first, tl.load(here, mask=first, other=1.0), cos)
        sin = tl.where(first, tl.load(here + frequencies * initial_stride, mask=first, other=0.0), sin)
    return cos, sin


@triton.jit
def load_rows(state, f, d, frequencies, channels, stride, channel_stride, dtype: tl.constexpr):
    """x, y."""
    inside = (f < frequencies)[:, None] & (d < channels)[None, :]
    here = state + f[:, None] * stride + d[None, :] * channel_stride
    x = tl.load(here, mask=inside, other=0.0)
    y = tl.load(here + frequencies * stride, mask=inside, other=0.0)
    return x.to(dtype), y.to(dtype)


@triton.jit
def store_rows(state, x, y, f, d, frequencies, channels):
    inside = (f < frequencies)[:, None] & (d < channels)[None, :]
    here = state + f[:, None] * channels + d[None, :]
    tl.store(here, x, mask=inside)
    tl.store(here + frequencies * channels, y, mask=inside)


@triton.jit
def spread(matrix, views, f, d, frequencies, places, channels, PLACES: tl.constexpr, dtype: tl.constexpr):
    """u, v: ``matrix`` (places, 2 frequencies), transposed, times ``views`` (places, channels)."""
    u = tl.zeros([f.shape[0], d.shape[0]], dtype)
    v = tl.zeros([f.shape[0], d.shape[0]], dtype)
    for first in range(0, places, PLACES):
        j = first + tl.arange(0, PLACES)
        inside = (f < frequencies)[:, None] & (j < places)[None, :]
        here = matrix + j[None, :] * (2 * frequencies) + f[:, None]
        cosines = tl.load(here, mask=inside, other=0.0)
        sines = tl.load(here + frequencies, mask=inside, other=0.0)
        view = tl.load(
            views + j[:, None] * channels + d[None, :],
            mask=(j < places)[:, None] & (d < channels)[None, :],
            other=0.0,
        )
        u = tl.dot(cosines, view, u, input_precision="ieee", out_dtype=dtype)
        v = tl.dot(sines, view, v, input_precision="ieee", out_dtype=dtype)
    return u, v


@triton.jit
def collect(
    matrix,
    state,
    phase,
    initial_phase,
    strides,
    initial_stride,
    t,
    begin,
    is_reset,
    j,
    d,
    frequencies,
    places,
    channels,
    FREQUENCIES: tl.constexpr,
    dtype: tl.constexpr,
):
    """(PLACES, CHANNELS): ``matrix`` (places, 2 frequencies) times the state at the phase of the write of step t."""
    views = tl.zeros([j.shape[0], d.shape[0]], dtype)
    for first in range(0, frequencies, FREQUENCIES):
        f = first + tl.arange(0, FREQUENCIES)
        x, y = load_rows(state, f, d, frequencies, channels, channels, 1, dtype)
        cos, sin = phase_of(phase, initial_phase, strides, initial_stride, t, begin, is_reset, f, frequencies)
        u = cos[:, None] * x + sin[:, None] * y
        v = cos[:, None] * y - sin[:, None] * x
        inside = (j < places)[:, None] & (f < frequencies)[None, :]
        here = matrix + j[:, None] * (2 * frequencies) + f[None, :]
        views = tl.dot(tl.load(here, mask=inside, other=0.0), u, views, input_precision="ieee", out_dtype=dtype)
        views = tl.dot(
            tl.load(here + frequencies, mask=inside, other=0.0), v, views, input_precision="ieee", out_dtype=dtype
        )
    return views


@triton.jit
def add_turned(x, y, u, v, cos, sin):
    """x, y with u, v turned back to the world's frame; where nothing is added, bit for bit."""
    nothing = (u == 0.0) & (v == 0.0)
    x = tl.where(nothing, x, x + (cos[:, None] * u - sin[:, None] * v))
    return x, tl.where(nothing, y, y + (sin[:, None] * u + cos[:, None] * v))


@triton.jit
def write_step(
    mix,
    views,
    source,  # state before the step; 0 after a reset
    target,  # state after the step, may be ``source``
    written,  # as a state, or None: u, v
    phase,
    initial_phase,
    strides,
    initial_stride,
    t,
    begin,
    is_reset,
    d,
    frequencies,
    places,
    channels,
    FREQUENCIES: tl.constexpr,
    PLACES: tl.constexpr,
    dtype: tl.constexpr,
):
    """h_t from h_{t-1} and what step t writes."""
    for first in range(0, frequencies, FREQUENCIES):
        f = first + tl.arange(0, FREQUENCIES)
        u, v = spread(mix, views, f, d, frequencies, places, channels, PLACES, dtype)
        x, y = load_rows(source, f, d, frequencies, channels, channels, 1, dtype)
        x, y = tl.where(is_reset, 0.0, x), tl.where(is_reset, 0.0, y)
        cos, sin = phase_of(phase, initial_phase, strides, initial_stride, t, begin, is_reset, f, frequencies)
        x, y = add_turned(x, y, u, v, cos, sin)
        store_rows(target, x, y, f, d, frequencies, channels)
        if written is not None:
            store_rows(written, u, v, f, d, frequencies, channels)
