"""The place memory's ops and autograd.Functions."""

from typing import Any

from torch import Tensor

from wmkernels.checks import require_sequences
from wmkernels.dispatch import kernels
from wmkernels.place_memory.flops import backward_flops, forward_flops
from wmkernels.place_memory.meta import DIFFERENTIABLE, TENSORS, PlaceMemoryInputs, backward_outputs, forward_outputs
from wmkernels.registration import (
    backward_function,
    define,
    forward_function,
    loop_over_vmap,
    raise_not_kept,
    save_for_backward,
    saved_tensors,
)

OP = "place_memory"
_TENSORS = (
    "Tensor values, Tensor phase, Tensor keys, Tensor? inverse, Tensor? gate, Tensor? initial_state, "
    "Tensor? initial_phase, Tensor? reset, Tensor? cu_seqlens"
)
FORWARD_SCHEMA = f"({_TENSORS}, bool keep, str backend) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor? grad_out, Tensor? grad_last_state, {_TENSORS}, Tensor residual, bool phase_gradient, "
    f"bool key_gradient, str backend) -> ({', '.join(['Tensor'] * DIFFERENTIABLE)})"
)
OPTIONS = 2
PHASES, KEYS = (1, 6), (2, 3)
_SAVED = (*PlaceMemoryInputs._fields, "residual")


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, keep, backend = PlaceMemoryInputs(*args[:TENSORS]), args[-2], args[-1]
    values, initial_state = inputs.values, inputs.initial_state
    if inputs.cu_seqlens is not None and values.device.type == "cpu":
        require_sequences(OP, inputs.cu_seqlens, values.shape[1])
    if values.numel() == 0:
        outputs = forward_outputs(inputs, keep)
        outputs[1].zero_() if initial_state is None else outputs[1].copy_(initial_state)
        return outputs
    return kernels(OP, backend).forward(inputs, keep)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward_outputs(PlaceMemoryInputs(*args[:TENSORS]), args[-2])


def _backward(grad_out: Tensor | None, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, residual, wanted, backend = PlaceMemoryInputs(*args[:TENSORS]), args[TENSORS], args[-3:-1], args[-1]
    if inputs.values.numel() == 0:
        gradients = backward_outputs(inputs, *wanted)
        for gradient in gradients:
            gradient.zero_()
        if grad_last_state is not None and inputs.initial_state is not None:
            gradients[5].copy_(grad_last_state)
        return gradients
    return kernels(OP, backend).backward(grad_out, grad_last_state, inputs, residual, wanted)


def _backward_fake(grad_out: Tensor | None, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return backward_outputs(PlaceMemoryInputs(*args[:TENSORS]), *args[-3:-1])


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves inputs, and what writes changed."""
    save_for_backward(ctx, _SAVED, (*inputs[:TENSORS], output[2]))
    ctx.keep, ctx.backend = inputs[TENSORS:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """In forward argument order."""
    if grad_out is None and grad_last_state is None:
        return (None,) * (TENSORS + OPTIONS)
    if not ctx.keep:
        raise_not_kept(OP)
    saved = saved_tensors(ctx, OP)
    phase_gradient, key_gradient = (any(ctx.needs_input_grad[i] for i in which) for which in (PHASES, KEYS))
    gradients = list(function(grad_out, grad_last_state, *saved, phase_gradient, key_gradient, ctx.backend))
    for i in range(DIFFERENTIABLE):
        if saved[i] is None or (i in PHASES and not phase_gradient) or (i in KEYS and not key_gradient):
            gradients[i] = None
    return (*gradients, *(None,) * (TENSORS - DIFFERENTIABLE + OPTIONS))


def _forward_flops(*args: Any) -> int:
    return forward_flops(PlaceMemoryInputs(*args[:TENSORS]))


def _backward_flops(grad_out: Any, grad_last_state: Any, *args: Any) -> int:
    return backward_flops(PlaceMemoryInputs(*args[:TENSORS]), *args[-3:-1])


define("place_memory_forward", FORWARD_SCHEMA, _forward, _forward_fake, _forward_flops)
define("place_memory_backward", BACKWARD_SCHEMA, _backward, _backward_fake, _backward_flops)
PlaceMemoryBackward = backward_function("place_memory_backward", OP, loop_over_vmap)
PlaceMemoryFunction = forward_function(
    "place_memory_forward", PlaceMemoryBackward, gradients_of, setup_context, outputs=2, vmap=loop_over_vmap
)
