"""The ConvLSTM as torch.library ops and autograd.Functions; laid out like ``wmkernels/linear_scan/autograd.py``.

The backward pass starts from the outputs (every h) and every c. The gates are kept beside them, or computed again from
what came in: with all h known that is one convolution over the whole sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wmkernels.conv_lstm.meta import Sizes, backward_outputs, forward_outputs, sizes_of
from wmkernels.dispatch import kernels
from wmkernels.registration import (
    backward_pass,
    define,
    forbid_double_backward,
    loop_over_vmap,
    raise_double_backward,
    register_autograd,
)

_INPUTS = (
    "Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor? peephole, Tensor? h, Tensor? c, Tensor? reset"
)
_OPTIONS = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
FORWARD_SCHEMA = f"({_INPUTS}, {_OPTIONS}, int keep, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor? grad_out, Tensor? grad_h, Tensor? grad_c, {_INPUTS}, Tensor out, Tensor cells, Tensor gates, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
DIFFERENTIABLE, INPUT_COUNT, OPTION_COUNT = 7, 8, 5


def _sizes(inputs: Sequence[Any], options: Sequence[Any]) -> Sizes:
    return sizes_of(inputs[0], inputs[1], inputs[2], options[0], options[1], options[2])


def _is_empty(sizes: Sizes) -> bool:
    return sizes.time == 0 or sizes.batch == 0


def forward(*args: Any) -> tuple[Tensor, ...]:
    """(out, h, c, cells, gates) of the forward op's arguments."""
    inputs, options, keep, backend = args[:INPUT_COUNT], args[INPUT_COUNT:-2], args[-2], args[-1]
    sizes = _sizes(inputs, options)
    if _is_empty(sizes):
        outputs = forward_outputs(inputs[0], sizes, keep)
        for last, first in zip(outputs[1:3], inputs[5:7], strict=True):
            last.zero_() if first is None else last.copy_(first)
        return outputs
    return kernels("conv_lstm", backend).forward(*args[:-1])


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, options, keep = args[:INPUT_COUNT], args[INPUT_COUNT:-2], args[-2]
    return forward_outputs(inputs[0], _sizes(inputs, options), keep)


def _backward(grad_out: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, options = args[:INPUT_COUNT], args[INPUT_COUNT + 3 : -1]
    if _is_empty(_sizes(inputs, options)):
        gradients = backward_outputs(*inputs[:DIFFERENTIABLE])
        for gradient in gradients:
            gradient.zero_()
        for gradient, given, first in zip(gradients[5:], (grad_h, grad_c), inputs[5:7], strict=True):
            if given is not None and first is not None:
                gradient.copy_(given)
        return gradients
    return kernels("conv_lstm", args[-1]).backward(grad_out, grad_h, grad_c, *args[:-1])


def _backward_fake(grad_out: Any, grad_h: Any, grad_c: Any, *args: Any) -> tuple[Tensor, ...]:
    return backward_outputs(*args[:DIFFERENTIABLE])


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps what came in, every h (the output), every c, and the gates if they are there."""
    out, _, _, cells, gates = output
    ctx.save_for_backward(*inputs[:INPUT_COUNT], out, cells, gates)
    ctx.options = (*inputs[INPUT_COUNT:-2], inputs[-1])
    ctx.mark_non_differentiable(cells, gates)
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the forward op's arguments, computed by ``function``."""
    if grad_out is None and grad_h is None and grad_c is None:
        return (None,) * (INPUT_COUNT + OPTION_COUNT)
    saved = ctx.saved_tensors
    gradients = function(grad_out, grad_h, grad_c, *saved, *ctx.options)
    present = [None if x is None else gradient for x, gradient in zip(saved, gradients, strict=False)]
    return (*present, *(None,) * (INPUT_COUNT - DIFFERENTIABLE + OPTION_COUNT))


class ConvLSTMFunction(torch.autograd.Function):
    """(out, h, c, cells, gates) of the forward op, under autograd, torch.func and vmap."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.wmkernels.conv_lstm_forward(*args)

    setup_context = staticmethod(setup_context)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        function = backward_pass(ConvLSTMBackward, torch.ops.wmkernels.conv_lstm_backward)
        return gradients_of(function, ctx, *grads[:3])

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        return loop_over_vmap(ConvLSTMFunction.apply, info.batch_size, _flat(in_dims, args), args)


class ConvLSTMBackward(torch.autograd.Function):
    """The backward op under torch.func and vmap; its own backward raises."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.wmkernels.conv_lstm_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise_double_backward("conv_lstm")

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        return loop_over_vmap(ConvLSTMBackward.apply, info.batch_size, _flat(in_dims, args), args)


def _flat(in_dims: Sequence[Any], args: Sequence[Any]) -> list[int | None]:
    """None for a list of integers, for which vmap has a list of None."""
    return [dim if isinstance(x, Tensor) else None for dim, x in zip(in_dims, args, strict=True)]


define("conv_lstm_forward", FORWARD_SCHEMA, forward, _forward_fake)
define("conv_lstm_backward", BACKWARD_SCHEMA, _backward, _backward_fake)
register_autograd("conv_lstm_forward", "conv_lstm_backward", gradients_of, setup_context, outputs=3)
forbid_double_backward("conv_lstm_backward", "conv_lstm")
