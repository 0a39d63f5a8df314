"""Runs the causal convolution's native kernels."""

import torch
from torch import Tensor

from wmkernels.causal_conv1d.meta import DIFFERENTIABLE, ConvInputs, backward_outputs, forward_outputs
from wmkernels.checks import state_dtype
from wmkernels.native_call import DTYPE_CODES, Members, native, output, run


def step_fast_path(tensors: tuple[Tensor | None, ...], silu: bool, channel_last: bool) -> bool:
    """One CPU step; False if the extension declines.

    ``tensors``: state_in, state_out, out, x, weight, bias, reset.
    """
    flags = silu + 2 * channel_last
    done: bool = native.cpu_causal_conv1d_step_fast_path(tensors, torch.get_num_threads(), flags)
    return done


def _members(inputs: ConvInputs) -> Members:
    x, weight = inputs.x, inputs.weight
    batch, channels, time = x.shape
    width, dtype, kind = weight.shape[1], x.dtype, state_dtype(x.dtype)
    bounds = None if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous()
    window = inputs.initial_state if width > 1 else None
    return {
        "batch": batch,
        "channels": channels,
        "time": time,
        "width": width,
        "sequences": inputs.sequences,
        "dtype": DTYPE_CODES[dtype],
        "silu": int(inputs.silu),
        "x": (x, x.shape, dtype),
        "weight": (weight, (channels, width), kind),
        "bias": (inputs.bias, (channels,), kind),
        "initial_state": (window, inputs.state_shape, kind),
        "reset": (inputs.reset, (batch, time), torch.bool),
        "cu_seqlens": (bounds, (inputs.sequences + 1,), torch.int64),
    }


def forward(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    outputs = forward_outputs(inputs)
    members = _members(inputs)
    members["out"], members["last_state"] = map(output, outputs)
    run("causal_conv1d_forward", members, inputs.x.device)
    return outputs


def backward(grad_out: Tensor, grad_last_state: Tensor | None, inputs: ConvInputs) -> tuple[Tensor, ...]:
    """As ``meta.backward_outputs``."""
    x = inputs.x
    members = _members(inputs)
    grad_window = grad_last_state if inputs.weight.shape[1] > 1 else None
    members["grad_out"] = (grad_out, x.shape, x.dtype)
    members["grad_last_state"] = (grad_window, inputs.state_shape, state_dtype(x.dtype))
    gradients = backward_outputs(inputs)
    for name, gradient in zip(inputs._fields[:DIFFERENTIABLE], gradients, strict=False):
        members[f"grad_{name}"] = output(gradient)
    run("causal_conv1d_backward", members, x.device)
    return gradients
