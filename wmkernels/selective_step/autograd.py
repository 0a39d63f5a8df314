"""The step as PyTorch sees it: the operators, and their gradient.

The backward pass of a step is the scan's own with one step of time, whose saved state is the state that came in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.dispatch import kernels
from wmkernels.registration import backward_pass, define, loop_over_vmap, register_autograd
from wmkernels.selective_scan.autograd import SelectiveScanBackward, fold_channels, unfold_channels
from wmkernels.selective_scan.reference import per_channel, selective_step_reference

OP = "selective_step"
UPDATE = "selective_state_update"
_TIMED = (0, 1, 3, 4, 6)  # u, delta, B, C and z have a time among the scan's inputs
_CHANNEL_DIMS = (1, 1, 1, 0, 1, 1, 0, 1, 0)  # of state, u, delta, A, B, C, D, z, delta_bias
_TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_STEP_SCHEMA = f"(Tensor state, {_TENSORS}, Tensor? reset, bool delta_softplus, str backend) -> (Tensor, Tensor)"
_UPDATE_SCHEMA = f"(Tensor(a!) state, {_TENSORS}, Tensor? indices, bool delta_softplus, str backend) -> Tensor"


def _run_step(
    state_in: Tensor,
    state_out: Tensor,
    tensors: tuple[Tensor, ...],
    reset: Tensor | None,
    indices: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> Tensor:
    if tensors[0].numel() == 0:
        return torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    if backend == "reference":
        return _reference_update(state_in, state_out, tensors, indices, delta_softplus)
    step: Callable[..., Tensor] = kernels(OP, backend).step
    return step(state_in, state_out, *tensors, reset, indices, delta_softplus)


def _reference_update(
    state_in: Tensor, state_out: Tensor, tensors: tuple[Tensor, ...], indices: Tensor | None, delta_softplus: bool
) -> Tensor:
    """The in-place step where no kernel runs."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    wide_B, wide_C = per_channel(B, u.shape[1]), per_channel(C, u.shape[1])
    if indices is None:
        indices = torch.arange(u.shape[0], device=u.device)
    if bool((indices >= state_in.shape[0]).any()):
        raise ValueError(f"{UPDATE}: state_batch_indices has {int(indices.max())}, state has {state_in.shape[0]} rows")
    held = indices >= 0
    rows = indices.clamp(min=0)
    before = state_in[rows].to(state_dtype(u.dtype))
    out, after = selective_step_reference(before, u, delta, A, wide_B, wide_C, D, z, delta_bias, delta_softplus)
    state_out[rows[held]] = after[held].to(state_out.dtype)
    return out.masked_fill(~held[:, None], 0).to(u.dtype)


def _step(state: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, reset, delta_softplus, backend = args
    new_state = state.new_empty(state.shape)
    out = _run_step(state, new_state, tuple(tensors), reset, None, delta_softplus, backend)
    return out, new_state


def _step_fake(state: Tensor, u: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    new_state = torch.empty(tuple(state.shape), dtype=state.dtype, device=state.device)
    return torch.empty(tuple(u.shape), dtype=u.dtype, device=u.device), new_state


def _update(state: Tensor, *args: Any) -> Tensor:
    *tensors, indices, delta_softplus, backend = args
    torch.autograd.graph.increment_version(state)
    return _run_step(state, state, tuple(tensors), None, indices, delta_softplus, backend)


def _update_fake(state: Tensor, u: Tensor, *args: Any) -> Tensor:
    return torch.empty(tuple(u.shape), dtype=u.dtype, device=u.device)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, delta_softplus, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (delta_softplus, False, 1, backend)
    ctx.set_materialize_grads(False)


def _gradients(function: Any, ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Any, ...]:
    """The scan's backward pass over one step of time, in the order of the step op's arguments."""
    state, u, delta, A, B, C, D, z, delta_bias, reset = ctx.saved_tensors
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


class SelectiveStep(torch.autograd.Function):
    """(out, new_state) of the step op, under autograd, torch.func and vmap."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.wmkernels.selective_step_forward(*args)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> Any:
        function = backward_pass(SelectiveScanBackward, torch.ops.wmkernels.selective_scan_backward)
        return _gradients(function, ctx, grad_out, grad_state)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if in_dims[9] is not None:
            return loop_over_vmap(SelectiveStep.apply, info.batch_size, in_dims, args)
        folded = [fold_channels(*x, info.batch_size) for x in zip(args[:9], in_dims[:9], _CHANNEL_DIMS, strict=True)]
        outputs = SelectiveStep.apply(*folded, *args[9:])
        return tuple(unfold_channels(x, 1, info.batch_size) for x in outputs), (1, 1)


define("selective_step_forward", _STEP_SCHEMA, _step, _step_fake)
define("selective_state_update_", _UPDATE_SCHEMA, _update, _update_fake)
register_autograd("selective_step_forward", "selective_scan_backward", _gradients, _setup_context, outputs=2)
