"""Step ops. The gradient is the scan's backward over one step, with ``state`` as its saved state."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.dispatch import PYTORCH_BACKENDS, kernels
from wmkernels.registration import define, forward_function, loop_over_vmap, save_for_backward, saved_tensors
from wmkernels.selective_scan.autograd import SelectiveScanBackward, fold_channels, unfold_channels
from wmkernels.selective_step.flops import step_flops
from wmkernels.selective_step.meta import DIFFERENTIABLE, StepInputs, step_outputs, update_outputs
from wmkernels.selective_step.reference import per_channel, selective_step_reference

OP = "selective_step"
UPDATE = "selective_state_update"
_TIMED = (0, 1, 3, 4, 6)  # u, delta, B, C, z
_CHANNEL_DIMS = (1, 1, 1, 0, 1, 1, 0, 1, 0)  # of state, u, delta, A, B, C, D, z, delta_bias
_TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_STEP_SCHEMA = f"(Tensor state, {_TENSORS}, Tensor? reset, bool delta_softplus, str backend) -> (Tensor, Tensor)"
_UPDATE_SCHEMA = f"(Tensor(a!) state, {_TENSORS}, Tensor? indices, bool delta_softplus, str backend) -> Tensor"


def _run_step(inputs: StepInputs, state_out: Tensor, indices: Tensor | None, backend: str) -> Tensor:
    if inputs.u.numel() == 0:
        return torch.empty_like(inputs.u, memory_format=torch.contiguous_format)
    if backend in PYTORCH_BACKENDS:
        return update_in_pytorch(inputs, state_out, indices)
    step: Callable[..., Tensor] = kernels(OP, backend).step
    return step(inputs, state_out, indices)


def update_in_pytorch(inputs: StepInputs, state_out: Tensor, indices: Tensor | None) -> Tensor:
    """Writes ``state_out``, which may be ``inputs.state``; returns the output."""
    state, u = inputs.state, inputs.u
    B, C = per_channel(inputs.B, u.shape[1]), per_channel(inputs.C, u.shape[1])
    if indices is None:
        before = state.to(state_dtype(u.dtype))
        out, after = selective_step_reference(inputs._replace(state=before, B=B, C=C))
        state_out.copy_(after)
        return out.to(u.dtype)
    if bool((indices >= state.shape[0]).any()):
        raise ValueError(f"{UPDATE}: state_batch_indices has {int(indices.max())}, state has {state.shape[0]} rows")
    written = indices >= 0
    rows = indices.clamp(min=0)
    before = state[rows].to(state_dtype(u.dtype))
    out, after = selective_step_reference(inputs._replace(state=before, B=B, C=C))
    state_out[rows[written]] = after[written].to(state_out.dtype)
    return out.masked_fill(~written[:, None], 0).to(u.dtype)


def _step(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, backend = StepInputs(*args[:-1]), args[-1]
    new_state = inputs.state.new_empty(inputs.state.shape)
    return _run_step(inputs, new_state, None, backend), new_state


def _update(state: Tensor, *args: Any) -> Tensor:
    *tensors, indices, delta_softplus, backend = args
    torch.autograd.graph.increment_version(state)
    inputs = StepInputs(*(state, *tensors, None, delta_softplus))
    return _run_step(inputs, state, indices, backend)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, delta_softplus, backend = inputs
    save_for_backward(ctx, StepInputs._fields[: len(tensors)], tensors)
    ctx.options = (delta_softplus, False, 1, backend)
    ctx.set_materialize_grads(False)


def _gradients(function: Any, ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Any, ...]:
    state, u, delta, A, B, C, D, z, delta_bias, reset = saved_tensors(ctx, OP)
    if grad_out is None and grad_state is None:
        return (None,) * 12
    if grad_out is None:
        grad_out = u.new_zeros(()).expand(u.shape)

    def timed(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unsqueeze(-1)

    inputs = (timed(u), timed(delta), A, timed(B), timed(C), D, timed(z), delta_bias, state, timed(reset), None)
    gradients = function(timed(grad_out), grad_state, *inputs, state.contiguous(), *ctx.options)
    grad_u, *others, grad_initial_state = (
        None if x is None else g.squeeze(-1) if index in _TIMED else g
        for index, (x, g) in enumerate(zip(inputs, gradients, strict=False))
    )
    return (grad_initial_state, grad_u, *others, None, None, None)


def _vmap(apply: Callable[..., Any], size: int, in_dims: Sequence[int | None], *args: Any) -> Any:
    if in_dims[DIFFERENTIABLE] is not None:  # reset
        return loop_over_vmap(apply, size, in_dims, *args)
    inputs = zip(args[:DIFFERENTIABLE], in_dims[:DIFFERENTIABLE], _CHANNEL_DIMS, strict=True)
    outputs = apply(*(fold_channels(*x, size) for x in inputs), *args[DIFFERENTIABLE:])
    return tuple(unfold_channels(x, 1, size) for x in outputs), (1, 1)


def _step_flops(*args: Any) -> int:
    return step_flops(StepInputs(*args[:-1]))


def _update_flops(*args: Any) -> int:
    return step_flops(StepInputs._make((*args[:9], None, args[10])))


define("selective_step_forward", _STEP_SCHEMA, _step, step_outputs, _step_flops)
define("selective_state_update_", _UPDATE_SCHEMA, _update, update_outputs, _update_flops)
SelectiveStep = forward_function("selective_step_forward", SelectiveScanBackward, _gradients, _setup_context, 2, _vmap)
