"""ConvLSTM torch.library ops and autograd.Functions.

The forward pass keeps the gates, or the backward pass recomputes them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wmkernels.conv_lstm.flops import backward_flops, forward_flops
from wmkernels.conv_lstm.meta import (
    DIFFERENTIABLE,
    KEEP_NOTHING,
    SIZES,
    TENSORS,
    ConvLSTMInputs,
    backward_outputs,
    forward_outputs,
)
from wmkernels.dispatch import kernels
from wmkernels.registration import (
    backward_function,
    define,
    forward_function,
    loop_over_vmap,
    raise_not_kept,
    save_for_backward,
    saved_tensors,
)

OP = "conv_lstm"
_INPUTS = (
    "Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor? peephole, Tensor? h, Tensor? c, Tensor? reset"
)
_OPTIONS = (
    "SymInt stride_height, SymInt stride_width, SymInt pad_top, SymInt pad_bottom, SymInt pad_left, SymInt pad_right, "
    "SymInt dilation_height, SymInt dilation_width"
)
FORWARD_SCHEMA = f"({_INPUTS}, {_OPTIONS}, int keep, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor? grad_out, Tensor? grad_h, Tensor? grad_c, {_INPUTS}, Tensor out, Tensor cells, Tensor gates, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_SAVED = (*ConvLSTMInputs._fields[:TENSORS], "out", "cells", "gates")
OPTIONS = SIZES + 2  # sizes, keep, backend


def _is_empty(inputs: ConvLSTMInputs) -> bool:
    return inputs.x.shape[0] == 0 or inputs.x.shape[1] == 0


def forward(*args: Any) -> tuple[Tensor, ...]:
    """(out, h, c, cells, gates)."""
    inputs, keep, backend = ConvLSTMInputs.from_op(args), args[-2], args[-1]
    if _is_empty(inputs):
        outputs = forward_outputs(inputs, keep)
        for last, first in zip(outputs[1:3], (inputs.h, inputs.c), strict=True):
            last.zero_() if first is None else last.copy_(first)
        return outputs
    return kernels(OP, backend).forward(inputs, keep)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    return forward_outputs(ConvLSTMInputs.from_op(args), args[-2])


def _backward_inputs(args: Sequence[Any]) -> ConvLSTMInputs:
    return ConvLSTMInputs.from_op((*args[:TENSORS], *args[TENSORS + 3 :]))


def _backward(grad_out: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs = _backward_inputs(args)
    if _is_empty(inputs):
        gradients = backward_outputs(inputs)
        for gradient in gradients:
            gradient.zero_()
        for gradient, given, first in zip(gradients[5:], (grad_h, grad_c), (inputs.h, inputs.c), strict=True):
            if given is not None and first is not None:
                gradient.copy_(given)
        return gradients
    return kernels(OP, args[-1]).backward((grad_out, grad_h, grad_c), inputs, *args[TENSORS : TENSORS + 3])


def _backward_fake(grad_out: Any, grad_h: Any, grad_c: Any, *args: Any) -> tuple[Tensor, ...]:
    return backward_outputs(_backward_inputs(args))


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves inputs and outputs."""
    out, _, _, cells, gates = output
    save_for_backward(ctx, _SAVED, (*inputs[:TENSORS], out, cells, gates))
    ctx.keep = inputs[-2]
    ctx.options = (*inputs[TENSORS:-2], inputs[-1])
    ctx.mark_non_differentiable(cells, gates)
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
) -> tuple[Tensor | None, ...]:
    """In forward argument order."""
    if grad_out is None and grad_h is None and grad_c is None:
        return (None,) * (TENSORS + OPTIONS)
    if ctx.keep == KEEP_NOTHING:
        raise_not_kept(OP)
    saved = saved_tensors(ctx, OP)
    gradients = function(grad_out, grad_h, grad_c, *saved, *ctx.options)
    present = [None if x is None else gradient for x, gradient in zip(saved, gradients, strict=False)]
    return (*present, *(None,) * (TENSORS - DIFFERENTIABLE + OPTIONS))


def _forward_flops(*args: Any) -> int:
    return forward_flops(ConvLSTMInputs.from_op(args))


def _backward_flops(grad_out: Any, grad_h: Any, grad_c: Any, *args: Any) -> int:
    return backward_flops(_backward_inputs(args), recomputes_gates=args[TENSORS + 2].numel() == 0)


define("conv_lstm_forward", FORWARD_SCHEMA, forward, _forward_fake, _forward_flops)
define("conv_lstm_backward", BACKWARD_SCHEMA, _backward, _backward_fake, _backward_flops)
ConvLSTMBackward = backward_function("conv_lstm_backward", OP, loop_over_vmap)
ConvLSTMFunction = forward_function(
    "conv_lstm_forward", ConvLSTMBackward, gradients_of, setup_context, outputs=3, vmap=loop_over_vmap
)
