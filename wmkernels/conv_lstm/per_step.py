"""A ConvLSTM on a GPU: convolutions by cuDNN, channels last, and between them one kernel a step that updates the cells.

Forward, the input convolution runs over as many steps at once as leave its result in the level-2 cache; then a step
is a convolution of h and an update. Backward, over stretches of time that bound the scratch: the gates, where they were
not kept, come from two convolutions over the stretch, since every h is known; a step is an update backwards and a
convolution with the turned weights; then one weight gradient over time x batch. h is rounded to its dtype before it
recurs; so are the convolutions' sums, since cuDNN answers in the dtype it is given.

The update comes from outside (CUDA C++ or Triton): this file holds what both share. Nothing here waits for the GPU or
depends on a number that is on it, so a call can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.conv_lstm.convolutions import Convolution, merged, no_autocast, rows
from wmkernels.conv_lstm.meta import Sizes, backward_outputs, forward_outputs, sizes_of

# Bytes of the input convolution's result that are made at once: two thirds of an H100's level-2 cache (50 MB).
HOISTED_BYTES = 32 << 20
# Bytes of the sums' gradients that are held at once. A weight gradient over so much takes several hundred microseconds,
# beside which what a stretch costs by itself is nothing.
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Parameters:
    """What every step's update reads. ``peephole``: (3, positions or 1, hidden), contiguous."""

    bias: Tensor | None
    peephole: Tensor | None


@dataclass(frozen=True)
class Step:
    """One step's maps: (batch, positions, hidden), or 4 * hidden where said; contiguous, channels last."""

    gates_x: Tensor | None  # 4 * hidden: the input convolution; backward: None where the gates were kept
    gates_h: Tensor | None  # 4 * hidden: the hidden convolution, None for zeros; does not count where reset
    c_prev: Tensor | None  # None for zeros; does not count where reset
    reset: Tensor | None  # (batch,)
    c: Tensor  # forward: output, may be c_prev


@dataclass(frozen=True)
class Backward:
    """What a step's update reads and writes on the way back."""

    gates: Tensor | None  # 4 * hidden, of the forward pass
    reset_after: Tensor | None  # (batch,): of the next step
    grad_out: Tensor | None
    grad_h: Tensor | None  # from the next step; does not count where reset_after
    grad_c: Tensor  # of c, becomes that of c_prev
    grad_gates: Tensor  # 4 * hidden, output: of the convolutions' sums
    grad_peephole: Tensor | None  # (3, batch, positions, hidden), is added to


class Update(Protocol):
    """The kernels of one backend."""

    def forward(self, parameters: Parameters, step: Step, h: Tensor, gates: Tensor | None) -> None:
        """Writes h, c and the gates."""

    def backward(self, parameters: Parameters, step: Step, back: Backward) -> None:
        """Writes what ``Backward`` says."""


def parameters_of(bias: Tensor | None, peephole: Tensor | None) -> Parameters:
    """In the layout that the updates read."""
    if peephole is not None:
        peephole = peephole.flatten(2).transpose(1, 2) if peephole.dim() == 4 else peephole.unsqueeze(1)
        peephole = peephole.contiguous()  # (3, positions or 1, hidden)
    return Parameters(None if bias is None else bias.contiguous(), peephole)


def steps_per_chunk(time: int, step_bytes: int, most: int) -> int:
    """As many as fit, at least one."""
    return max(1, min(time, most // max(step_bytes, 1)))


def gate_bytes(sizes: Sizes, dtype: torch.dtype) -> int:
    """Of one step's sums."""
    return 4 * sizes.batch * sizes.height * sizes.width * sizes.hidden * dtype.itemsize


class StepFn(Protocol):
    """One step forward, from (h, c) before it, None for zeros. It writes c, which may be c before, h and the gates.

    All are (batch, positions, hidden), the gates 4 * hidden; ``h_before`` is (batch, hidden, height, width), channels
    last.
    """

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


def run_steps(
    step_fn: StepFn, outputs: tuple[Tensor, ...], h: Tensor | None, c: Tensor | None, reset: Tensor | None
) -> None:
    """Takes every step and fills the outputs of the forward op."""
    out, hn, cn, cells, gates = outputs
    kept_cells = cells.flatten(2, 3).unbind() if cells.numel() else None
    kept_gates = gates.flatten(2, 3).flatten(3).unbind() if gates.numel() else None
    resets = None if reset is None else reset.unbind()
    running = rows(cn)  # the same memory, and so are the rows of every h: outputs lie channels last
    h_prev = None if h is None else h.contiguous(memory_format=torch.channels_last)
    c_prev = None if c is None else rows(c)
    for t, state in enumerate(out.unbind()):
        target = running if kept_cells is None else kept_cells[t]
        kept = None if kept_gates is None else kept_gates[t]
        step_fn(t, h_prev, c_prev, None if resets is None else resets[t], target, rows(state), kept)
        h_prev, c_prev = state, target
    hn.copy_(out[-1])
    if kept_cells is not None:
        running.copy_(kept_cells[-1])


class UnfusedStep:
    """A step as a convolution of h and an update; the input convolution runs ahead, as far as its result stays near."""

    def __init__(
        self, update: Update, x: Tensor, of_input: Convolution, of_hidden: Convolution, inputs: Parameters, sizes: Sizes
    ) -> None:
        self.update, self.x, self.inputs = update, x, inputs
        self.of_input, self.of_hidden = of_input, of_hidden
        self.sums = (-1, sizes.batch, sizes.height * sizes.width, 4 * sizes.hidden)
        self.at_once = steps_per_chunk(sizes.time, gate_bytes(sizes, x.dtype), HOISTED_BYTES)
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
        """Convolves and updates."""
        if t % self.at_once == 0:
            self.hoisted = self.of_input(merged(self.x[t : t + self.at_once])).view(self.sums).unbind()
        gates_h = None if h_prev is None else self.of_hidden(h_prev)
        step = Step(self.hoisted[t % self.at_once], gates_h, c_prev, reset, c)
        self.update.forward(self.inputs, step, h, gates)


def forward(
    update: Update,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    reset: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    keep: int,
) -> tuple[Tensor, ...]:
    """(out, h, c, cells, gates) of canonical inputs; ``keep`` says which of the last two are kept."""
    sizes = sizes_of(x, weight_ih, weight_hh, stride, padding, dilation)
    outputs = forward_outputs(x, sizes, keep)
    of_input, of_hidden = Convolution(weight_ih, stride, padding, dilation), Convolution.same(weight_hh)
    with no_autocast(x.device):
        run_steps(
            UnfusedStep(update, x, of_input, of_hidden, parameters_of(bias, peephole), sizes), outputs, h, c, reset
        )
    return outputs


def backward(
    update: Update,
    grad_out: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    reset: Tensor | None,
    out: Tensor,
    cells: Tensor,
    gates: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, ...]:
    """Gradients of (x, weight_ih, weight_hh, bias, peephole, h, c)."""
    sizes = sizes_of(x, weight_ih, weight_hh, stride, padding, dilation)
    time, batch, hidden, height, width = sizes
    positions, dtype, state = height * width, x.dtype, state_dtype(x.dtype)
    gradients = backward_outputs(x, weight_ih, weight_hh, bias, peephole, h, c)
    grad_x, grad_weight_ih, grad_weight_hh, grad_bias, grad_peephole, grad_h0, grad_c0 = gradients
    parameters = parameters_of(bias, peephole)
    cell_maps = cells.flatten(2, 3).unbind()
    first_cells = None if c is None else rows(c)
    kept = gates.flatten(2, 3).flatten(3).unbind() if gates.numel() else None
    resets = None if reset is None else reset.unbind()
    running = torch.zeros((batch, positions, hidden), dtype=state, device=x.device)
    if grad_c is not None:
        running.copy_(rows(grad_c))
    later = None if grad_h is None else rows(grad_h)
    partials = None
    if peephole is not None:
        partials = torch.zeros((3, batch, positions, hidden), dtype=state, device=x.device)
    sum_ih, sum_hh, sum_bias = _Accumulator(grad_weight_ih), _Accumulator(grad_weight_hh), _Accumulator(grad_bias)
    at_once = steps_per_chunk(time, gate_bytes(sizes, dtype), CHUNK_BYTES)
    with no_autocast(x.device):
        of_input = Convolution(weight_ih, stride, padding, dilation)
        of_hidden = Convolution.same(weight_hh)
        back = of_hidden.transposed()
        for begin in reversed(range(0, time, at_once)):
            end = min(begin + at_once, time)
            x_maps = merged(x[begin:end])
            # In reset places h counts as zero, but the update knows that by itself.
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
                arguments = (kept_gates, reset_after, given, later, running, steps[t - begin], partials)
                update.backward(parameters, step, Backward(*arguments))
                later = back(_maps(steps[t - begin], sizes)) if t > 0 or h is not None else None
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
    if h is not None and later is not None:
        if reset is not None:
            later = later.masked_fill(reset[0, :, None, None], 0)
        grad_h0.copy_(_maps(later, sizes))
    if c is not None:
        grad_c0.copy_(_maps(running, sizes))
    return gradients


def _maps(values: Tensor, sizes: Sizes) -> Tensor:
    """(count, positions, channels) -> (count, channels, height, width), the same memory."""
    return values.unflatten(1, (sizes.height, sizes.width)).movedim(-1, 1)


def _states_before(out: Tensor, h: Tensor | None, begin: int, end: int) -> tuple[int, Tensor | None]:
    """The first step from ``begin`` that follows an h, and the h before it and each up to ``end``."""
    if begin > 0:
        return begin, out[begin - 1 : end - 1]
    if h is None:
        return 1, out[: end - 1] if end > 1 else None
    return 0, torch.cat((h[None], out[: end - 1]))


def _reduce_peephole(partials: Tensor, target: Tensor) -> None:
    """Sums over the batch, and over the map where the weights do not vary on it."""
    if target.dim() == 4:
        target.copy_(partials.sum(1).transpose(1, 2).reshape(target.shape))
    else:
        target.copy_(partials.sum((1, 2)))


class _Accumulator:
    """Adds the shares of the stretches of time into a gradient, in the state's dtype where there are several."""

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
