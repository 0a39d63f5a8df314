"""The SSD scan's ops and autograd.Functions: the forward op keeps a state every few hundred steps."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wmkernels.checks import require_sequences
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
from wmkernels.ssd_scan.flops import backward_flops, forward_flops
from wmkernels.ssd_scan.meta import DIFFERENTIABLE, TENSORS, SSDInputs, backward_outputs, forward_outputs

OP = "ssd_scan"
_TENSORS = (
    "Tensor x, Tensor gate, Tensor weight, Tensor B, Tensor C, Tensor? own_weight, Tensor? D, Tensor? z, "
    "Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens"
)
FORWARD_SCHEMA = f"({_TENSORS}, int chunk, int kept, str backend) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_last_state, {_TENSORS}, Tensor chunk_states, int chunk, int kept, str backend) -> "
    f"({', '.join(['Tensor'] * DIFFERENTIABLE)})"
)
OPTIONS = 3
_SAVED = (*SSDInputs._fields[:TENSORS], "chunk_states")


def _forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, (chunk, kept, backend) = SSDInputs(*args[:TENSORS]), args[TENSORS:]
    if inputs.cu_seqlens is not None and inputs.x.device.type == "cpu":
        require_sequences(OP, inputs.cu_seqlens, inputs.x.shape[1])
    if inputs.is_empty:
        out, last_state, chunk_states = forward_outputs(inputs, kept)
        last_state.zero_() if inputs.initial_state is None else last_state.copy_(inputs.initial_state)
        return out, last_state, chunk_states
    outputs: tuple[Tensor, ...] = kernels(OP, backend).forward(inputs, chunk, kept)
    return outputs


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    return forward_outputs(SSDInputs(*args[:TENSORS]), args[TENSORS + 1])


def _backward(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, (chunk_states, chunk, kept, backend) = SSDInputs(*args[:TENSORS]), args[TENSORS:]
    if inputs.is_empty:
        gradients = backward_outputs(inputs)
        for gradient in gradients:
            gradient.zero_()
        if grad_last_state is not None and inputs.initial_state is not None:
            gradients[8].copy_(grad_last_state)
        return gradients
    gradients = kernels(OP, backend).backward(grad_out, grad_last_state, inputs, chunk_states, chunk, kept)
    return gradients


def _backward_fake(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return backward_outputs(SSDInputs(*args[:TENSORS]))


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves inputs and chunk states."""
    save_for_backward(ctx, _SAVED, (*inputs[:TENSORS], output[2]))
    ctx.options = inputs[TENSORS:]  # chunk, kept (0: nothing kept), backend
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients by ``function``."""
    *inputs, chunk_states = saved_tensors(ctx, OP)
    if grad_out is None and grad_last_state is None:
        return (None,) * (TENSORS + OPTIONS)
    if not ctx.options[1]:
        raise_not_kept(OP)
    if grad_out is None:
        grad_out = inputs[0].new_zeros(()).expand(inputs[0].shape)
    gradients = function(grad_out, grad_last_state, *inputs, chunk_states, *ctx.options)
    present = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=False)]
    return (*present, *(None,) * (TENSORS - DIFFERENTIABLE + OPTIONS))


def _forward_flops(*args: Any) -> int:
    return forward_flops(SSDInputs(*args[:TENSORS]))


def _backward_flops(grad_out: Tensor, grad_last_state: Tensor | None, *args: Sequence[Any]) -> int:
    return backward_flops(SSDInputs(*args[:TENSORS]))  # type: ignore[arg-type]


define("ssd_scan_forward", FORWARD_SCHEMA, _forward, _forward_fake, _forward_flops)
define("ssd_scan_backward", BACKWARD_SCHEMA, _backward, _backward_fake, _backward_flops)
SSDScanBackward = backward_function("ssd_scan_backward", OP, loop_over_vmap)
SSDScan = forward_function("ssd_scan_forward", SSDScanBackward, gradients_of, setup_context, 2, loop_over_vmap)
