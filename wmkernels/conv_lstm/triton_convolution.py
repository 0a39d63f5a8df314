"""A ConvLSTM step in one Triton kernel: an implicit GEMM for both convolutions, the update as epilogue.

A program accumulates a tile of positions x hidden channels, a channel's four gates in adjacent columns. Neighbours
read the old h, so the new h has its own buffer. This saves one launch and 32 bytes per cell (two 16-bit gate
sums, written and read); the GEMM is slower than cuDNN's.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.conv_lstm.convolutions import merged
from wmkernels.conv_lstm.meta import ConvLSTMInputs, Sizes
from wmkernels.conv_lstm.per_step import parameters_of
from wmkernels.conv_lstm.triton_update import hyperbolic_tangent, load_or_zeros, update_cells

# Predicted, not measured, for an H200 with a CUDA graph.
LAUNCH_SECONDS = 2.5e-6
BYTES_PER_SECOND = 4.2e12
CUDNN_FLOPS, OWN_FLOPS = 600e12, 400e12  # 16-bit convolutions
# Minimum positions: (positions, hidden channels, input channels, warps, stages).
TILES = {8192: (128, 32, 32, 8, 4), 2048: (64, 32, 32, 4, 4), 0: (16, 16, 64, 4, 4)}


def is_profitable(dtype: torch.dtype, weight_ih: Tensor, weight_hh: Tensor, sizes: Sizes) -> bool:
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    cells = sizes.batch * sizes.height * sizes.width * sizes.hidden
    flops = 2 * cells * 4 * (weight_ih[0].numel() + weight_hh[0].numel())
    saved = LAUNCH_SECONDS + 32 * cells / BYTES_PER_SECOND
    return saved > flops * (1 / OWN_FLOPS - 1 / CUDNN_FLOPS)


@triton.jit
def accumulate(
    total,  # (POSITIONS, 4 * CHANNELS)
    maps,  # (batch, height, width, channels)
    weight,  # (taps, channels, columns)
    batch,  # (POSITIONS)
    top,  # (POSITIONS), of the first tap
    left,
    row_mask,  # (POSITIONS): exists and not reset
    height,
    width,
    channels,
    columns,
    column,  # (4 * CHANNELS)
    dilation_height,
    dilation_width,
    TAPS: tl.constexpr,
    TAP_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    blocks = (channels + DEPTH - 1) // DEPTH
    for n in range(TAPS * blocks):
        tap = n // blocks
        k = n % blocks * DEPTH + tl.arange(0, DEPTH)
        y = top + tap // TAP_COLUMNS * dilation_height
        x = left + tap % TAP_COLUMNS * dilation_width
        inside = row_mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        offset = ((batch * height + y) * width + x) * channels
        values = tl.load(maps + offset[:, None] + k[None, :], mask=inside[:, None] & (k < channels)[None, :], other=0.0)
        rows = (tap * channels + k).to(tl.int64) * columns
        inside = (k < channels)[:, None] & (column < columns)[None, :]
        total = tl.dot(values, tl.load(weight + rows[:, None] + column[None, :], mask=inside, other=0.0), total)
    return total


@triton.jit
def add_bias(total, bias, channel, inside):
    return total + load_or_zeros(bias, channel, inside, tl.float32)[None, :]


@triton.jit
def step_kernel(
    x,  # (batch, x_height, x_width, inputs)
    weight_x,  # (taps, inputs, 4 * hidden), column 4 * channel + gate
    h_prev,  # (batch, height, width, hidden) or None
    weight_h,  # (taps, hidden, 4 * hidden)
    bias,  # (4 * hidden) or None
    peephole,  # (3, peephole positions, hidden) or None
    c_prev,  # (batch, height, width, hidden) or None
    reset,  # (batch) bytes or None
    h,  # output
    c,  # output, may be c_prev
    gates,  # (batch, height, width, 4, hidden) or None: output
    batch,
    x_height,
    x_width,
    inputs,
    height,
    width,
    hidden,
    peephole_positions,
    stride_height,
    stride_width,
    pad_top,
    pad_left,
    dilation_height,
    dilation_width,
    reset_stride,
    IH_HEIGHT: tl.constexpr,
    IH_WIDTH: tl.constexpr,
    HH_HEIGHT: tl.constexpr,
    HH_WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = (hidden + CHANNELS - 1) // CHANNELS
    row = (tl.program_id(0) // tiles).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    first = tl.program_id(0) % tiles * CHANNELS
    channel = first + tl.arange(0, CHANNELS)
    column = 4 * first + tl.arange(0, 4 * CHANNELS)
    row_exists = row < batch * height * width
    position = row % (height * width)
    b = row // (height * width)
    not_reset = row_exists
    if reset is not None:
        not_reset = row_exists & (tl.load(reset + b * reset_stride, mask=row_exists, other=0) == 0)
    row_y, row_x = position // width, position % width
    total = tl.zeros([POSITIONS, 4 * CHANNELS], tl.float32)
    total = accumulate(
        total,
        x,
        weight_x,
        b,
        row_y * stride_height - pad_top,
        row_x * stride_width - pad_left,
        row_exists,
        x_height,
        x_width,
        inputs,
        4 * hidden,
        column,
        dilation_height,
        dilation_width,
        IH_HEIGHT * IH_WIDTH,
        IH_WIDTH,
        DEPTH,
    )
    if h_prev is not None:
        total = accumulate(
            total,
            h_prev,
            weight_h,
            b,
            row_y - HH_HEIGHT // 2,
            row_x - HH_WIDTH // 2,
            not_reset,
            height,
            width,
            hidden,
            4 * hidden,
            column,
            1,
            1,
            HH_HEIGHT * HH_WIDTH,
            HH_WIDTH,
            DEPTH,
        )
    even, odd = tl.split(tl.reshape(total, (POSITIONS, CHANNELS, 2, 2)))  # gates (i, g) and (f, o)
    a_i, a_g = tl.split(even)
    a_f, a_o = tl.split(odd)
    channel_exists = channel < hidden
    a_i, a_f = add_bias(a_i, bias, channel, channel_exists), add_bias(a_f, bias, channel + hidden, channel_exists)
    a_g, a_o = (
        add_bias(a_g, bias, channel + 2 * hidden, channel_exists),
        add_bias(a_o, bias, channel + 3 * hidden, channel_exists),
    )
    inside = row_exists[:, None] & channel_exists[None, :]
    cell = row[:, None] * hidden + channel[None, :]
    before = load_or_zeros(c_prev, cell, inside & not_reset[:, None], tl.float32)
    weight = (position % peephole_positions * hidden)[:, None] + channel[None, :]
    w_i = load_or_zeros(peephole, weight, inside, tl.float32)
    w_f = load_or_zeros(peephole, weight + peephole_positions * hidden, inside, tl.float32)
    w_o = load_or_zeros(peephole, weight + 2 * peephole_positions * hidden, inside, tl.float32)
    i, f, g, o, new = update_cells(a_i, a_f, a_g, a_o, before, w_i, w_f, w_o)
    tl.store(c + cell, new, mask=inside)
    tl.store(h + cell, (o * hyperbolic_tangent(new)).to(h.dtype.element_ty), mask=inside)
    if gates is not None:
        gate = gates + 4 * row[:, None] * hidden + channel[None, :]
        tl.store(gate, i, mask=inside)
        tl.store(gate + hidden, f, mask=inside)
        tl.store(gate + 2 * hidden, g, mask=inside)
        tl.store(gate + 3 * hidden, o, mask=inside)


def pack_weight(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (4, -1)).permute(3, 4, 2, 1, 0).flatten(3).flatten(0, 1).contiguous()


def tile_of(positions: int) -> tuple[int, int, int, int, int]:
    return next(tile for least, tile in TILES.items() if positions >= least)


class FusedStep:
    """``StepFn`` of one launch."""

    def __init__(self, inputs: ConvLSTMInputs) -> None:
        x, weight_ih, weight_hh = inputs.x, inputs.weight_ih, inputs.weight_hh
        self.maps = merged(x).unflatten(0, x.shape[:2]).unbind()
        self.weights = pack_weight(weight_ih), pack_weight(weight_hh)
        self.parameters = parameters_of(inputs.bias, inputs.peephole)
        peephole = self.parameters.peephole
        _, batch, hidden, height, width = inputs.sizes
        x_size, positions = (x.shape[3], x.shape[4], x.shape[2]), batch * height * width
        peephole_positions, padding = 1 if peephole is None else peephole.shape[1], inputs.padding
        convolution = (*inputs.stride, padding[0], padding[2], *inputs.dilation)
        self.sizes = (batch, *x_size, height, width, hidden, peephole_positions, *convolution)
        tile_positions, channels, depth, self.warps, self.stages = tile_of(positions)
        self.constants = (*weight_ih.shape[2:], *weight_hh.shape[2:], tile_positions, channels, depth)
        self.programs = runtime.ceil_div(positions, tile_positions) * runtime.ceil_div(hidden, channels)

    def __call__(
        self,
        t: int,
        h_prev: Tensor | None,
        c_prev: Tensor | None,
        reset: Tensor | None,
        c: Tensor,
        h: Tensor,
        gates: Tensor | None,
    ) -> None:
        weight_x, weight_h = self.weights
        maps = (self.maps[t], weight_x, h_prev, weight_h, self.parameters.bias, self.parameters.peephole, c_prev)
        outputs = (runtime.as_bytes(reset), h, c, gates)
        stride = runtime.strides(reset, 1)
        with runtime.on_device(h):
            options = {"num_warps": self.warps, "num_stages": self.stages}
            runtime.launch(
                step_kernel, self.programs, *maps, *outputs, *self.sizes, *stride, *self.constants, **options
            )
