"""ConvLSTM in CUDA: ``per_step.py`` or a persistent kernel."""

import functools

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.conv_lstm import cuda_persistent, per_step
from wmkernels.conv_lstm.meta import ConvLSTMInputs, forward_outputs
from wmkernels.conv_lstm.per_step import Backward, Parameters, Step
from wmkernels.native_call import DTYPE_CODES, Expected, Members, run

OP = "conv_lstm_update"


class Update:
    """Launches the kernels."""

    def forward(self, parameters: Parameters, step: Step, h: Tensor, gates: Tensor | None) -> None:
        members, cells, sums, state = _members(parameters, step, h.dtype)
        members["h"] = (h, cells, h.dtype)
        members["gates"] = (gates, sums, state)
        run(f"{OP}_forward", members, h.device)

    def backward(self, parameters: Parameters, step: Step, back: Backward) -> None:
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
    count = positions if peephole is not None and peephole.shape[1] != 1 else 1
    return peephole, (3, count, hidden), state


backward = functools.partial(per_step.backward, Update())


def forward(inputs: ConvLSTMInputs, keep: int) -> tuple[Tensor, ...]:
    """Fills ``forward_outputs``."""
    tiles = cuda_persistent.tiles_of(inputs.weight_hh, inputs.sizes) if cuda_persistent.ENABLED else 0
    if not tiles:
        return per_step.forward(Update(), inputs, keep)
    outputs = forward_outputs(inputs, keep)
    cuda_persistent.forward(tiles, inputs, outputs)
    return outputs
