"""The causal convolution's ops and autograd.Functions.

The backward op reads what the forward op read: silu's argument is summed again. vmap folds its dimension into the
channels, which parameters have too.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from wmkernels.causal_conv1d.flops import backward_flops, forward_flops
from wmkernels.causal_conv1d.meta import DIFFERENTIABLE, TENSORS, ConvInputs, backward_outputs, forward_outputs
from wmkernels.checks import require_sequences
from wmkernels.dispatch import kernels
from wmkernels.registration import (
    backward_function,
    define,
    forward_function,
    loop_over_vmap,
    save_for_backward,
    saved_tensors,
)
from wmkernels.selective_scan.autograd import fold_channels, unfold_channels

OP = "causal_conv1d"
OPTIONS = 3
_TENSORS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, bool silu, "
    "bool channel_last, str backend"
)
FORWARD_SCHEMA = f"({_TENSORS}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = f"(Tensor grad_out, Tensor? grad_last_state, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)"
_CHANNEL_DIMS = (1, 0, 0, 1)  # of x, weight, bias, initial_state
_STATE = 3


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, backend = ConvInputs(*args[:-1]), args[-1]
    if inputs.cu_seqlens is not None and inputs.x.device.type == "cpu":
        require_sequences(OP, inputs.cu_seqlens, inputs.x.shape[2])
    if inputs.x.numel() == 0:
        out, last_state = forward_outputs(inputs)
        last_state.zero_() if inputs.initial_state is None else last_state.copy_(inputs.initial_state)
        return out, last_state
    outputs: tuple[Tensor, Tensor] = kernels(OP, backend).forward(inputs)
    return outputs


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return forward_outputs(ConvInputs(*args[:-1]))


def _backward(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, backend = ConvInputs(*args[:-1]), args[-1]
    if inputs.x.numel() == 0:
        gradients = backward_outputs(inputs)
        for gradient in gradients:
            gradient.zero_()
        if grad_last_state is not None and inputs.initial_state is not None:
            gradients[_STATE].copy_(grad_last_state)
        return gradients
    gradients = kernels(OP, backend).backward(grad_out, grad_last_state, inputs)
    return gradients


def _backward_fake(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return backward_outputs(ConvInputs(*args[:-1]))


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves inputs."""
    save_for_backward(ctx, ConvInputs._fields[:TENSORS], inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients by ``function``."""
    inputs = saved_tensors(ctx, OP)
    if grad_out is None and grad_last_state is None:
        return (None,) * (TENSORS + OPTIONS)
    if grad_out is None:
        grad_out = inputs[0].new_zeros(()).expand(inputs[0].shape)
    gradients = function(grad_out, grad_last_state, *inputs, *ctx.options)
    present = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=False)]
    return (*present, *(None,) * (TENSORS - DIFFERENTIABLE + OPTIONS))


def _vmap(apply: Callable[..., Any], size: int, in_dims: Sequence[int | None], *args: Any) -> Any:
    if any(dim is not None for dim in in_dims[DIFFERENTIABLE:TENSORS]):  # reset, cu_seqlens
        return loop_over_vmap(apply, size, in_dims, *args)
    inputs = zip(args[:DIFFERENTIABLE], in_dims[:DIFFERENTIABLE], _CHANNEL_DIMS, strict=True)
    outputs = apply(*(fold_channels(*x, size) for x in inputs), *args[DIFFERENTIABLE:])
    return tuple(unfold_channels(x, 1, size) for x in outputs), (1, 1)


def _vmap_backward(apply: Callable[..., Any], size: int, in_dims: Sequence[int | None], *args: Any) -> Any:
    tensors = 2 + DIFFERENTIABLE
    if any(dim is not None for dim in in_dims[tensors : 2 + TENSORS]):
        return loop_over_vmap(apply, size, in_dims, *args)
    inputs = zip(args[:tensors], in_dims[:tensors], (1, 1, *_CHANNEL_DIMS), strict=True)
    gradients = apply(*(fold_channels(*x, size) for x in inputs), *args[tensors:])
    outputs, dims = [], []
    for x, gradient, dim in zip(args[2:tensors], gradients, _CHANNEL_DIMS, strict=True):
        outputs.append(gradient if x is None else unfold_channels(gradient, dim, size))
        dims.append(None if x is None else dim)
    return tuple(outputs), tuple(dims)


def _forward_flops(*args: Any) -> int:
    return forward_flops(ConvInputs(*args[:-1]))


def _backward_flops(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> int:
    return backward_flops(ConvInputs(*args[:-1]))


define("causal_conv1d_forward", FORWARD_SCHEMA, _forward, _forward_fake, _forward_flops)
define("causal_conv1d_backward", BACKWARD_SCHEMA, _backward, _backward_fake, _backward_flops)
CausalConv1dBackward = backward_function("causal_conv1d_backward", OP, _vmap_backward)
CausalConv1dFunction = forward_function(
    "causal_conv1d_forward", CausalConv1dBackward, gradients_of, setup_context, outputs=2, vmap=_vmap
)
