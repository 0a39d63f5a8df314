"""ConvLSTM by C++ or CUDA kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.conv_lstm import cuda_update
from wmkernels.conv_lstm.meta import ConvLSTMInputs, backward_outputs, forward_outputs
from wmkernels.native_call import DTYPE_CODES, Expected, Members, native, output, run


def runs_on_gpu(inputs: ConvLSTMInputs) -> bool:
    """Whether the call uses CUDA."""
    return inputs.x.is_cuda


def _members(inputs: ConvLSTMInputs) -> Members:
    x, weight_ih, weight_hh, bias, peephole, h, c, reset, stride, padding, dilation = inputs
    time, batch, hidden, height, width = inputs.sizes
    dtype, state = x.dtype, state_dtype(x.dtype)
    positions = height * width
    merged = x.flatten(3)
    members: Members = {
        "time": time,
        "batch": batch,
        "input": x.shape[2],
        "hidden": hidden,
        "x_height": x.shape[3],
        "x_width": x.shape[4],
        "height": height,
        "width": width,
        "ih_height": weight_ih.shape[2],
        "ih_width": weight_ih.shape[3],
        "hh_height": weight_hh.shape[2],
        "hh_width": weight_hh.shape[3],
        "stride_height": stride[0],
        "stride_width": stride[1],
        "pad_top": padding[0],
        "pad_left": padding[2],
        "dilation_height": dilation[0],
        "dilation_width": dilation[1],
        "peephole_varies": int(peephole is not None and peephole.dim() == 4),
        "dtype": DTYPE_CODES[dtype],
        "x": (merged, merged.shape, dtype),
        "weight_ih": (weight_ih, (4 * hidden, x.shape[2], *weight_ih.shape[2:]), dtype),
        "weight_hh": (weight_hh, (4 * hidden, hidden, *weight_hh.shape[2:]), dtype),
        "bias": (bias, (4 * hidden,), state),
        "h0": _merged(h, (batch, hidden, positions), dtype),
        "c0": _merged(c, (batch, hidden, positions), state),
        "reset": (reset, (time, batch), torch.bool),
    }
    if peephole is not None:
        shape = (3, hidden, positions if peephole.dim() == 4 else 1)
        members["peephole"] = (peephole.reshape(shape), shape, state)
    return members


def _merged(maps: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Expected:
    return (None if maps is None else maps.flatten(-2), shape, dtype)


def _channels_last(maps: Tensor) -> Tensor:
    return maps.movedim(-3, -1).contiguous().flatten(-3, -2)


def forward(inputs: ConvLSTMInputs, keep: int) -> tuple[Tensor, ...]:
    """Fills ``forward_outputs``."""
    if runs_on_gpu(inputs):
        return cuda_update.forward(inputs, keep)
    members = _members(inputs)
    outputs = forward_outputs(inputs, keep)
    for name, maps in zip(("out", "hn", "cn"), outputs, strict=False):
        members[name] = output(_channels_last(maps))
    members["cells"], members["gates"] = output(outputs[3].view(-1)), output(outputs[4].view(-1))
    run("conv_lstm_forward", members, inputs.x.device)
    return outputs


def backward(
    grads: Sequence[Tensor | None], inputs: ConvLSTMInputs, out: Tensor, cells: Tensor, gates: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the differentiable inputs."""
    if runs_on_gpu(inputs):
        return cuda_update.backward(grads, inputs, out, cells, gates)
    grad_out, grad_h, grad_c = grads
    members = _members(inputs)
    time, batch, hidden, height, width = inputs.sizes
    dtype, state = inputs.x.dtype, state_dtype(inputs.x.dtype)
    shape = (batch, hidden, height * width)
    outputs = _channels_last(out)
    members["out"] = (outputs, (time, batch, height * width, hidden), dtype)
    members["cells"] = (cells.flatten(2, 3).contiguous(), (time, batch, height * width, hidden), state)
    if gates.numel():
        members["gates"] = (
            gates.flatten(2, 3).flatten(3).contiguous(),
            (time, batch, height * width, 4 * hidden),
            state,
        )
    members["grad_out"] = _merged(grad_out, (time, *shape), dtype)
    members["grad_hn"] = _merged(grad_h, shape, dtype)
    members["grad_cn"] = _merged(grad_c, shape, state)
    gradients = backward_outputs(inputs)
    grad_x, grad_weight_ih, grad_weight_hh, grad_bias, grad_peephole, grad_h0, grad_c0 = gradients
    members["grad_x"] = output(_channels_last(grad_x))
    members["grad_weight_ih"], members["grad_weight_hh"] = output(grad_weight_ih), output(grad_weight_hh)
    members["grad_bias"], members["grad_peephole"] = output(grad_bias), output(grad_peephole.view(-1))
    if inputs.h is not None:
        members["grad_h0"] = output(_channels_last(grad_h0))
    if inputs.c is not None:
        members["grad_c0"] = output(_channels_last(grad_c0))
    run("conv_lstm_backward", members, inputs.x.device)
    return gradients


def step_fast_path(tensors: tuple[Tensor | None, ...]) -> bool:
    """False if the extension declines.

    ``tensors``: h, c, new h, new c, x, weight_ih, weight_hh, bias, peephole, reset.
    """
    done: bool = native.cpu_conv_lstm_step_fast_path(tensors, torch.get_num_threads())
    return done
