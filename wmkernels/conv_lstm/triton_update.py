"""ConvLSTM cell update in Triton; memory-bound.

Arithmetic as in ``conv_lstm_update_kernel.cuh``. At a reset the old state is not loaded, so NaN does not cross.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.checks import state_dtype
from wmkernels.conv_lstm.per_step import Backward, Parameters, Step
from wmkernels.triton_device import exponential, sigmoid

BLOCK, WARPS = 512, 4  # 8- or 16-byte loads per thread


@triton.jit
def hyperbolic_tangent(x):
    """A series near zero in float32, where the quotient cancels."""
    e = exponential(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    result = tl.where(x < 0.0, -quotient, quotient)
    if x.dtype == tl.float32:
        s = x * x
        series = s * (62.0 / 2835.0) - 17.0 / 315.0
        series = series * s + 2.0 / 15.0
        series = series * s - 1.0 / 3.0
        result = tl.where(s < 0.04, x + x * s * series, result)
    return result


@triton.jit
def load_or_zeros(base, offset, mask, dtype: tl.constexpr):
    if base is None:
        values = tl.zeros(offset.shape, dtype)
    else:
        values = tl.load(base + offset, mask=mask, other=0.0).to(dtype)
    return values


@triton.jit
def peephole_term(weight, value):
    # absent weights are zeros; zero times an infinite state or gradient would be NaN
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def update_cells(a_i, a_f, a_g, a_o, before, w_i, w_f, w_o):
    i = sigmoid(a_i + peephole_term(w_i, before))
    f = sigmoid(a_f + peephole_term(w_f, before))
    g = hyperbolic_tangent(a_g)
    c = f * before + i * g
    o = sigmoid(a_o + peephole_term(w_o, c))
    return i, f, g, o, c


@triton.jit
def gate_sum(gates_x, gates_h, bias, gate, channel, inside, not_reset, dtype: tl.constexpr):
    """``gate`` is an offset, ``channel`` an index of 4 * hidden."""
    total = tl.load(gates_x + gate, mask=inside, other=0.0).to(dtype)
    return total + load_or_zeros(gates_h, gate, not_reset, dtype) + load_or_zeros(bias, channel, inside, dtype)


@triton.jit
def update_kernel(
    gates_x,  # (rows, 4 * hidden)
    gates_h,  # same or None
    bias,  # (4 * hidden) or None
    peephole,  # (3, peephole positions, hidden) or None
    c_prev,  # (rows, hidden) or None
    reset,  # (batch) bytes or None
    h,  # (rows, hidden): output
    c,  # (rows, hidden): output, may be c_prev
    gates,  # (rows, 4 * hidden) or None: output
    cells,
    hidden,
    positions,
    peephole_positions,
    reset_stride,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    row, channel = cell // hidden, cell % hidden
    not_reset = inside
    if reset is not None:
        not_reset = inside & (tl.load(reset + row // positions * reset_stride, mask=inside, other=0) == 0)
    gate = 4 * row * hidden + channel
    a_i = gate_sum(gates_x, gates_h, bias, gate, channel, inside, not_reset, dtype)
    a_f = gate_sum(gates_x, gates_h, bias, gate + hidden, channel + hidden, inside, not_reset, dtype)
    a_g = gate_sum(gates_x, gates_h, bias, gate + 2 * hidden, channel + 2 * hidden, inside, not_reset, dtype)
    a_o = gate_sum(gates_x, gates_h, bias, gate + 3 * hidden, channel + 3 * hidden, inside, not_reset, dtype)
    before = load_or_zeros(c_prev, cell, not_reset, dtype)
    weight = row % positions % peephole_positions * hidden + channel
    w_i = load_or_zeros(peephole, weight, inside, dtype)
    w_f = load_or_zeros(peephole, weight + peephole_positions * hidden, inside, dtype)
    w_o = load_or_zeros(peephole, weight + 2 * peephole_positions * hidden, inside, dtype)
    i, f, g, o, new = update_cells(a_i, a_f, a_g, a_o, before, w_i, w_f, w_o)
    tl.store(c + cell, new, mask=inside)
    tl.store(h + cell, (o * hyperbolic_tangent(new)).to(h.dtype.element_ty), mask=inside)
    if gates is not None:
        tl.store(gates + gate, i, mask=inside)
        tl.store(gates + gate + hidden, f, mask=inside)
        tl.store(gates + gate + 2 * hidden, g, mask=inside)
        tl.store(gates + gate + 3 * hidden, o, mask=inside)


@triton.jit
def update_backward_kernel(
    gates_x,  # None with gates
    gates_h,
    bias,
    peephole,
    c_prev,
    reset,
    c,
    gates,  # None: recomputed
    reset_after,  # of the next step
    grad_out,  # (rows, hidden) or None
    grad_h,  # same, of the next step
    grad_c,  # input: of c; output: of c_prev
    grad_gates,  # (rows, 4 * hidden)
    grad_peephole,  # (3, rows, hidden) or None, accumulated
    cells,
    hidden,
    positions,
    peephole_positions,
    reset_stride,
    reset_after_stride,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    row, channel = cell // hidden, cell % hidden
    not_reset, next_not_reset = inside, inside
    if reset is not None:
        not_reset = inside & (tl.load(reset + row // positions * reset_stride, mask=inside, other=0) == 0)
    if reset_after is not None:
        after = tl.load(reset_after + row // positions * reset_after_stride, mask=inside, other=0)
        next_not_reset = inside & (after == 0)
    gate = 4 * row * hidden + channel
    before = load_or_zeros(c_prev, cell, not_reset, dtype)
    weight = row % positions % peephole_positions * hidden + channel
    w_i = load_or_zeros(peephole, weight, inside, dtype)
    w_f = load_or_zeros(peephole, weight + peephole_positions * hidden, inside, dtype)
    w_o = load_or_zeros(peephole, weight + 2 * peephole_positions * hidden, inside, dtype)
    if gates is not None:
        i = tl.load(gates + gate, mask=inside, other=0.0)
        f = tl.load(gates + gate + hidden, mask=inside, other=0.0)
        g = tl.load(gates + gate + 2 * hidden, mask=inside, other=0.0)
        o = tl.load(gates + gate + 3 * hidden, mask=inside, other=0.0)
    else:
        a_i = gate_sum(gates_x, gates_h, bias, gate, channel, inside, not_reset, dtype)
        a_f = gate_sum(gates_x, gates_h, bias, gate + hidden, channel + hidden, inside, not_reset, dtype)
        a_g = gate_sum(gates_x, gates_h, bias, gate + 2 * hidden, channel + 2 * hidden, inside, not_reset, dtype)
        a_o = gate_sum(gates_x, gates_h, bias, gate + 3 * hidden, channel + 3 * hidden, inside, not_reset, dtype)
        i, f, g, o, _ = update_cells(a_i, a_f, a_g, a_o, before, w_i, w_f, w_o)
    new = tl.load(c + cell, mask=inside, other=0.0)
    dh = load_or_zeros(grad_out, cell, inside, dtype) + load_or_zeros(grad_h, cell, next_not_reset, dtype)
    tanh_c = hyperbolic_tangent(new)
    d_o = dh * tanh_c * o * (1.0 - o)
    dc = tl.load(grad_c + cell, mask=inside, other=0.0) + dh * o * (1.0 - tanh_c * tanh_c)
    dc += peephole_term(w_o, d_o)
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * before * f * (1.0 - f)
    d_g = dc * i * (1.0 - g * g)
    grad_c_prev = tl.where(not_reset, dc * f + peephole_term(w_i, d_i) + peephole_term(w_f, d_f), 0.0)
    tl.store(grad_c + cell, grad_c_prev, mask=inside)
    gate_dtype: tl.constexpr = grad_gates.dtype.element_ty
    tl.store(grad_gates + gate, d_i.to(gate_dtype), mask=inside)
    tl.store(grad_gates + gate + hidden, d_f.to(gate_dtype), mask=inside)
    tl.store(grad_gates + gate + 2 * hidden, d_g.to(gate_dtype), mask=inside)
    tl.store(grad_gates + gate + 3 * hidden, d_o.to(gate_dtype), mask=inside)
    if grad_peephole is not None:
        own = grad_peephole + cell
        tl.store(own, tl.load(own, mask=inside) + d_i * before, mask=inside)
        tl.store(own + cells, tl.load(own + cells, mask=inside) + d_f * before, mask=inside)
        tl.store(own + 2 * cells, tl.load(own + 2 * cells, mask=inside) + d_o * new, mask=inside)


def triton_state(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if state_dtype(dtype) == torch.float64 else tl.float32


class Update:
    """Launches the kernels."""

    def forward(self, parameters: Parameters, step: Step, h: Tensor, gates: Tensor | None) -> None:
        sizes, reset, stride = _sizes(parameters, step)
        tensors = (step.gates_x, step.gates_h, parameters.bias, parameters.peephole, step.c_prev, reset, h, step.c)
        self._launch(update_kernel, sizes[0], h, *tensors, gates, *sizes, stride)

    def backward(self, parameters: Parameters, step: Step, back: Backward) -> None:
        sizes, reset, stride = _sizes(parameters, step)
        after = runtime.as_bytes(back.reset_after)
        tensors = (step.gates_x, step.gates_h, parameters.bias, parameters.peephole, step.c_prev, reset, step.c)
        grads = (back.grad_out, back.grad_h, back.grad_c, back.grad_gates, back.grad_peephole)
        strides = (stride, runtime.strides(back.reset_after, 1)[0])
        arguments = (*tensors, back.gates, after, *grads, *sizes, *strides)
        self._launch(update_backward_kernel, sizes[0], back.grad_gates, *arguments)

    @staticmethod
    def _launch(kernel, cells: int, gate_dtype: Tensor, *arguments) -> None:
        programs = runtime.ceil_div(cells, BLOCK)
        with runtime.on_device(gate_dtype):
            runtime.launch(kernel, programs, *arguments, triton_state(gate_dtype.dtype), BLOCK, num_warps=WARPS)


def _sizes(parameters: Parameters, step: Step) -> tuple[tuple[int, int, int, int], Tensor | None, int]:
    """((cells, hidden, positions, peephole positions), reset bytes, reset stride)."""
    _, positions, hidden = step.c.shape
    peephole_positions = 1 if parameters.peephole is None else parameters.peephole.shape[1]
    stride = runtime.strides(step.reset, 1)[0]
    return (step.c.numel(), hidden, positions, peephole_positions), runtime.as_bytes(step.reset), stride
