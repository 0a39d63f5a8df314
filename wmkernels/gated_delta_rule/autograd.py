"""The gated delta rule's ops and autograd.Functions.

The forward op keeps the states at chunks' starts and the residuals ``v_t - exp(gate_t) S_{t-1}^T k_t``, of which the
backward op needs no v.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wmkernels.checks import require_sequences
from wmkernels.dispatch import kernels
from wmkernels.gated_delta_rule.flops import backward_flops, forward_flops
from wmkernels.gated_delta_rule.meta import (
    DIFFERENTIABLE,
    TENSORS,
    DeltaRuleInputs,
    backward_outputs,
    forward_outputs,
)
from wmkernels.registration import (
    backward_function,
    define,
    forward_function,
    loop_over_vmap,
    raise_not_kept,
    save_for_backward,
    saved_tensors,
)

OP = "gated_delta_rule"
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor gate, Tensor beta, Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens"
)
FORWARD_SCHEMA = (
    f"({_TENSORS}, float scale, bool channel_last, int chunk, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_last_state, {_TENSORS}, Tensor chunk_states, Tensor residuals, float scale, "
    f"bool channel_last, int chunk, str backend) -> ({', '.join(['Tensor'] * DIFFERENTIABLE)})"
)
OPTIONS = 4
_SAVED = (*DeltaRuleInputs._fields[:TENSORS], "chunk_states", "residuals")


def _forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, chunk, backend = DeltaRuleInputs(*args[:-2]), args[-2], args[-1]
    if inputs.cu_seqlens is not None and inputs.q.device.type == "cpu":
        require_sequences(OP, inputs.cu_seqlens, inputs.q.shape[3])
    if inputs.is_empty:
        out, last_state, chunk_states, residuals = forward_outputs(inputs, chunk)
        last_state.zero_() if inputs.initial_state is None else last_state.copy_(inputs.initial_state)
        return out, last_state, chunk_states, residuals
    outputs: tuple[Tensor, ...] = kernels(OP, backend).forward(inputs, chunk)
    return outputs


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    return forward_outputs(DeltaRuleInputs(*args[:-2]), args[-2])


def _backward_inputs(args: Sequence[Any]) -> DeltaRuleInputs:
    return DeltaRuleInputs(*args[:TENSORS], *args[TENSORS + 2 : TENSORS + 4])


def _backward(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, chunk, backend = _backward_inputs(args), args[-2], args[-1]
    if inputs.is_empty:
        gradients = backward_outputs(inputs)
        for gradient in gradients:
            gradient.zero_()
        if grad_last_state is not None and inputs.initial_state is not None:
            gradients[5].copy_(grad_last_state)
        return gradients
    gradients = kernels(OP, backend).backward(grad_out, grad_last_state, inputs, *args[TENSORS : TENSORS + 2], chunk)
    return gradients


def _backward_fake(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return backward_outputs(_backward_inputs(args))


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves inputs, chunk states and residuals."""
    save_for_backward(ctx, _SAVED, (*inputs[:TENSORS], *output[2:]))
    ctx.options = inputs[TENSORS:]  # scale, channel_last, chunk (0: nothing kept), backend
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients by ``function``."""
    *inputs, chunk_states, residuals = saved_tensors(ctx, OP)
    if grad_out is None and grad_last_state is None:
        return (None,) * (TENSORS + OPTIONS)
    if not ctx.options[2]:
        raise_not_kept(OP)
    if grad_out is None:
        grad_out = inputs[2].new_zeros(()).expand(inputs[2].shape)
    gradients = function(grad_out, grad_last_state, *inputs, chunk_states, residuals, *ctx.options)
    present = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=False)]
    return (*present, *(None,) * (TENSORS - DIFFERENTIABLE + OPTIONS))


def _forward_flops(*args: Any) -> int:
    return forward_flops(DeltaRuleInputs(*args[:-2]))


def _backward_flops(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> int:
    return backward_flops(_backward_inputs(args))


define("gated_delta_rule_forward", FORWARD_SCHEMA, _forward, _forward_fake, _forward_flops)
define("gated_delta_rule_backward", BACKWARD_SCHEMA, _backward, _backward_fake, _backward_flops)
GatedDeltaRuleBackward = backward_function("gated_delta_rule_backward", OP, loop_over_vmap)
GatedDeltaRule = forward_function(
    "gated_delta_rule_forward", GatedDeltaRuleBackward, gradients_of, setup_context, 2, loop_over_vmap
)
