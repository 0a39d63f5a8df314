"""The ConvLSTM on an NVIDIA GPU: ``per_step.py`` with the update in CUDA C++, or all steps in one kernel.

The kernels are in ``csrc/cuda/conv_lstm/conv_lstm_update_kernel.cuh`` and ``conv_lstm_persistent_kernel.cuh``.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.conv_lstm import cuda_persistent, per_step
from wmkernels.conv_lstm.convolutions import Convolution
from wmkernels.conv_lstm.meta import forward_outputs, sizes_of
from wmkernels.conv_lstm.per_step import Backward, Parameters, Step
from wmkernels.native_call import DTYPE_CODES, Expected, Members, run

OP = "conv_lstm_update"


class Update:
    """Hands the maps of a step to the kernels."""

    def forward(self, parameters: Parameters, step: Step, h: Tensor, gates: Tensor | None) -> None:
        """Writes h, c and the gates."""
        members, cells, sums, state = _members(parameters, step, h.dtype)
        members["h"] = (h, cells, h.dtype)
        members["gates"] = (gates, sums, state)
        run(f"{OP}_forward", members, h.device)

    def backward(self, parameters: Parameters, step: Step, back: Backward) -> None:
        """Writes what ``Backward`` says."""
        dtype = back.grad_gates.dtype
        members, cells, sums, state = _members(parameters, step, dtype)
        members["gates"] = (back.gates, sums, state)
        members["reset_after"] = (back.reset_after, cells[:1], torch.bool)
        members["grad_out"] = (back.grad_out, cells, dtype)
        members["grad_h"] = (back.grad_h, cells, dtype)
        members["grad_c"] = (back.grad_c, cells, state)
        members["grad_gates"] = (back.grad_gates, sums, dtype)
        members["grad_peephole"] = (back.grad_peephole, (3, *cells), state)
        run(f"{OP}_backward", members, back.grad_gates.device)


def _members(
    parameters: Parameters, step: Step, dtype: torch.dtype
) -> tuple[Members, tuple[int, int, int], tuple[int, int, int], torch.dtype]:
    """What both directions share, and the shapes of cells and of sums, and the state's dtype."""
    batch, positions, hidden = step.c.shape
    state = state_dtype(dtype)
    cells, sums = (batch, positions, hidden), (batch, positions, 4 * hidden)
    members: Members = {
        "batch": batch,
        "positions": positions,
        "hidden": hidden,
        "dtype": DTYPE_CODES[dtype],
        "gates_x": (step.gates_x, sums, dtype),
        "gates_h": (step.gates_h, sums, dtype),
        "bias": (parameters.bias, (4 * hidden,), state),
        "peephole": _peephole(parameters, hidden, positions, state),
        "c_prev": (step.c_prev, cells, state),
        "reset": (step.reset, (batch,), torch.bool),
        "c": (step.c, cells, state),
    }
    members["peephole_varies"] = int(parameters.peephole is not None and parameters.peephole.shape[1] != 1)
    return members, cells, sums, state


def _peephole(parameters: Parameters, hidden: int, positions: int, state: torch.dtype) -> Expected:
    peephole = parameters.peephole
    places = positions if peephole is not None and peephole.shape[1] != 1 else 1
    return peephole, (3, places, hidden), state


backward = functools.partial(per_step.backward, Update())


def forward(
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
    tiles = cuda_persistent.tiles_of(weight_hh, sizes) if cuda_persistent.WANTED else 0
    if not tiles:
        arguments = (x, weight_ih, weight_hh, bias, peephole, h, c, reset, stride, padding, dilation)
        return per_step.forward(Update(), *arguments, keep)
    outputs = forward_outputs(x, sizes, keep)
    of_input = Convolution(weight_ih, stride, padding, dilation)
    inputs = per_step.parameters_of(bias, peephole)
    cuda_persistent.forward(tiles, x, of_input, weight_hh, inputs, h, c, reset, sizes, outputs)
    return outputs
