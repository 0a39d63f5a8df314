"""ConvLSTM on a GPU: cuDNN convolutions and one CUDA C++ or Triton update kernel per step.

Input convolutions run per chunk. The backward pass knows every h: two convolutions per chunk recompute gates that were
not kept. Convolution sums are rounded to the dtype of h. Nothing synchronises, so a CUDA graph can capture a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wmkernels.checks import no_autocast, state_dtype
from wmkernels.conv_lstm.convolutions import Convolution, merged, rows
from wmkernels.conv_lstm.meta import ConvLSTMInputs, Sizes, backward_outputs, forward_outputs

# Input convolution per chunk: two thirds of an H100's L2 cache (50 MB).
HOISTED_BYTES = 32 << 20
# Gate gradients per chunk: a weight gradient takes hundreds of microseconds, which hides chunk overhead.
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Parameters:
    """``peephole`` is (3, positions or 1, hidden)."""

    bias: Tensor | None
    peephole: Tensor | None


@dataclass(frozen=True)
class Step:
    """Contiguous maps (batch, positions, hidden), unless stated."""

    gates_x: Tensor | None  # (..., 4 * hidden), None with kept gates
    gates_h: Tensor | None  # (..., 4 * hidden), None: zeros; ignored at a reset
    c_prev: Tensor | None  # None: zeros; ignored at a reset
    reset: Tensor | None  # (batch,)
    c: Tensor  # forward output, may be c_prev


@dataclass(frozen=True)
class Backward:
    """Maps as in ``Step``."""

    gates: Tensor | None  # (..., 4 * hidden)
    reset_after: Tensor | None  # (batch,), of the next step
    grad_out: Tensor | None
    grad_h: Tensor | None  # of the next step, ignored at reset_after
    grad_c: Tensor  # input: of c; output: of c_prev
    grad_gates: Tensor  # (..., 4 * hidden): output
    grad_peephole: Tensor | None  # (3, batch, positions, hidden), accumulated


class Update(Protocol):
    """Update kernels."""

    def forward(self, parameters: Parameters, step: Step, h: Tensor, gates: Tensor | None) -> None:
        """Writes h, c, gates."""

    def backward(self, parameters: Parameters, step: Step, back: Backward) -> None:
        """Writes the outputs of ``Backward``."""


def parameters_of(bias: Tensor | None, peephole: Tensor | None) -> Parameters:
    """Parameters in the kernels' layout."""
    if peephole is not None:
        peephole = peephole.flatten(2).transpose(1, 2) if peephole.dim() == 4 else peephole.unsqueeze(1)
        peephole = peephole.contiguous()
    return Parameters(None if bias is None else bias.contiguous(), peephole)


def steps_per_chunk(time: int, step_bytes: int, most: int) -> int:
    """Steps per ``most`` bytes, at least 1."""
    return max(1, min(time, most // max(step_bytes, 1)))


def gate_bytes(sizes: Sizes, dtype: torch.dtype) -> int:
    """Bytes of a step's gate sums."""
    return 4 * sizes.batch * sizes.height * sizes.width * sizes.hidden * dtype.itemsize


class StepFn(Protocol):
    """Writes c, h and gates as rows; ``h_prev`` is (batch, hidden, height, width)."""

    def __call__(
        self,
        t: int,
        h_prev: Tensor | None,
        c_prev: Tensor | None,
        reset: Tensor | None,
        c: Tensor,
        h: Tensor,
        gates: Tensor | None,
    ) -> None: ...


def run_steps(step_fn: StepFn, outputs: tuple[Tensor, ...], inputs: ConvLSTMInputs) -> None:
    """Fills the forward outputs."""
    h, c, reset = inputs.h, inputs.c, inputs.reset
    out, hn, cn, cells, gates = outputs
    kept_cells = cells.flatten(2, 3).unbind() if cells.numel() else None
    kept_gates = gates.flatten(2, 3).flatten(3).unbind() if gates.numel() else None
    resets = None if reset is None else reset.unbind()
    grad_c_prev = rows(cn)  # the cell, a view of cn: steps update it in place unless cells are kept
    h_prev = None if h is None else h.contiguous(memory_format=torch.channels_last)
    c_prev = None if c is None else rows(c)
    for t, state in enumerate(out.unbind()):
        target = grad_c_prev if kept_cells is None else kept_cells[t]
        kept = None if kept_gates is None else kept_gates[t]
        step_fn(t, h_prev, c_prev, None if resets is None else resets[t], target, rows(state), kept)
        h_prev, c_prev = state, target
    hn.copy_(out[-1])
    if kept_cells is not None:
        grad_c_prev.copy_(kept_cells[-1])


class UnfusedStep:
    """One h convolution and one update kernel."""

    def __init__(self, update: Update, inputs: ConvLSTMInputs) -> None:
        sizes = inputs.sizes
        self.update, self.x, self.parameters = update, inputs.x, parameters_of(inputs.bias, inputs.peephole)
        self.of_input, self.of_hidden = Convolution(inputs.weight_ih, *inputs[8:]), Convolution.same(inputs.weight_hh)
        self.sums = (-1, sizes.batch, sizes.height * sizes.width, 4 * sizes.hidden)
        self.chunk_steps = steps_per_chunk(sizes.time, gate_bytes(sizes, inputs.x.dtype), HOISTED_BYTES)
        self.hoisted: Sequence[Tensor] = ()

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
        if t % self.chunk_steps == 0:
            self.hoisted = self.of_input(merged(self.x[t : t + self.chunk_steps])).view(self.sums).unbind()
        gates_h = None if h_prev is None else self.of_hidden(h_prev)
        step = Step(self.hoisted[t % self.chunk_steps], gates_h, c_prev, reset, c)
        self.update.forward(self.parameters, step, h, gates)


def forward(update: Update, inputs: ConvLSTMInputs, keep: int) -> tuple[Tensor, ...]:
    """Fills ``forward_outputs``."""
    outputs = forward_outputs(inputs, keep)
    with no_autocast(inputs.x.device):
        run_steps(UnfusedStep(update, inputs), outputs, inputs)
    return outputs


def backward(
    update: Update,
    output_grads: Sequence[Tensor | None],
    inputs: ConvLSTMInputs,
    out: Tensor,
    cells: Tensor,
    gates: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the differentiable inputs."""
    grad_out, grad_h, grad_c = output_grads
    x, weight_ih, weight_hh, bias, peephole, h, c, reset = inputs[:8]
    sizes = time, batch, hidden, height, width = inputs.sizes
    positions, dtype, state = height * width, x.dtype, state_dtype(x.dtype)
    gradients = backward_outputs(inputs)
    grad_x, grad_weight_ih, grad_weight_hh, grad_bias, grad_peephole, grad_h0, grad_c0 = gradients
    parameters = parameters_of(bias, peephole)
    cell_maps = cells.flatten(2, 3).unbind()
    first_cells = None if c is None else rows(c)
    kept = gates.flatten(2, 3).flatten(3).unbind() if gates.numel() else None
    resets = None if reset is None else reset.unbind()
    grad_c_prev = torch.zeros((batch, positions, hidden), dtype=state, device=x.device)
    if grad_c is not None:
        grad_c_prev.copy_(rows(grad_c))
    grad_h_next = None if grad_h is None else rows(grad_h)
    partials = None
    if peephole is not None:
        partials = torch.zeros((3, batch, positions, hidden), dtype=state, device=x.device)
    sum_ih, sum_hh, sum_bias = _Accumulator(grad_weight_ih), _Accumulator(grad_weight_hh), _Accumulator(grad_bias)
    chunk_steps = steps_per_chunk(time, gate_bytes(sizes, dtype), CHUNK_BYTES)
    with no_autocast(x.device):
        of_input = Convolution(weight_ih, *inputs[8:])
        of_hidden = Convolution.same(weight_hh)
        of_grad = of_hidden.transposed()
        for begin in reversed(range(0, time, chunk_steps)):
            end = min(begin + chunk_steps, time)
            x_maps = merged(x[begin:end])
            start, before = _states_before(out, h, begin, end)
            gates_x = gates_h = None
            if kept is None:
                gates_x = of_input(x_maps).view(end - begin, batch, positions, 4 * hidden).unbind()
                if before is not None:
                    gates_h = of_hidden(merged(before)).view(end - start, batch, positions, 4 * hidden).unbind()
            grads = torch.empty((end - begin, batch, positions, 4 * hidden), dtype=dtype, device=x.device)
            steps = grads.unbind()
            for t in reversed(range(begin, end)):
                step = Step(
                    None if gates_x is None else gates_x[t - begin],
                    None if gates_h is None or t < start else gates_h[t - start],
                    cell_maps[t - 1] if t > 0 else first_cells,
                    None if resets is None else resets[t],
                    cell_maps[t],
                )
                reset_after = None if resets is None or t + 1 == time else resets[t + 1]
                given = None if grad_out is None else rows(grad_out[t])
                kept_gates = None if kept is None else kept[t]
                arguments = (kept_gates, reset_after, given, grad_h_next, grad_c_prev, steps[t - begin], partials)
                update.backward(parameters, step, Backward(*arguments))
                grad_h_next = of_grad(_maps(steps[t - begin], sizes)) if t > 0 or h is not None else None
            merged_grads = _maps(grads.flatten(0, 1), sizes)
            of_x, of_weight = of_input.gradients(merged_grads, x_maps, True)
            assert of_x is not None
            grad_x[begin:end] = of_x.unflatten(0, (end - begin, batch))
            sum_ih.add(of_weight)
            if bias is not None:
                sum_bias.add(grads.sum((0, 1, 2), dtype=state))
            if before is not None:
                if reset is not None:
                    before = before.masked_fill(reset[start:end, :, None, None, None], 0)
                grads_after_first = _maps(grads[start - begin :].flatten(0, 1), sizes)
                sum_hh.add(of_hidden.gradients(grads_after_first, merged(before), False)[1])
    for total in (sum_ih, sum_hh, sum_bias):
        total.finish()
    if peephole is not None and partials is not None:
        _reduce_peephole(partials, grad_peephole)
    if h is not None and grad_h_next is not None:
        if reset is not None:
            grad_h_next = grad_h_next.masked_fill(reset[0, :, None, None], 0)
        grad_h0.copy_(_maps(grad_h_next, sizes))
    if c is not None:
        grad_c0.copy_(_maps(grad_c_prev, sizes))
    return gradients


def _maps(values: Tensor, sizes: Sizes) -> Tensor:
    """(count, positions, channels) -> (count, channels, height, width)."""
    return values.unflatten(1, (sizes.height, sizes.width)).movedim(-1, 1)


def _states_before(out: Tensor, h: Tensor | None, begin: int, end: int) -> tuple[int, Tensor | None]:
    """First step with a previous h, and every previous h."""
    if begin > 0:
        return begin, out[begin - 1 : end - 1]
    if h is None:
        return 1, out[: end - 1] if end > 1 else None
    return 0, torch.cat((h[None], out[: end - 1]))


def _reduce_peephole(partials: Tensor, target: Tensor) -> None:
    if target.dim() == 4:
        target.copy_(partials.sum(1).transpose(1, 2).reshape(target.shape))
    else:
        target.copy_(partials.sum((1, 2)))


class _Accumulator:
    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.total: Tensor | None = None

    def add(self, partial: Tensor) -> None:
        self.total = partial if self.total is None else self.total.to(state_dtype(partial.dtype)) + partial

    def finish(self) -> None:
        if self.total is None:
            self.target.zero_()
        else:
            self.target.copy_(self.total)
