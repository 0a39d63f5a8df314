"""The linear scan's ops and autograd.Functions; the output holds the states."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from wmkernels.dispatch import kernels
from wmkernels.linear_scan.flops import backward_flops, forward_flops
from wmkernels.linear_scan.meta import LinearScanInputs, backward_outputs, forward_outputs
from wmkernels.registration import backward_function, define, forward_function, save_for_backward, saved_tensors

OP = "linear_scan"
FORWARD_SCHEMA = (
    "(Tensor gates, Tensor tokens, Tensor? initial_state, Tensor? reset, bool reverse, bool channel_last, str backend)"
    " -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_last_state, Tensor gates, Tensor out, Tensor? initial_state, Tensor? reset, "
    "bool reverse, bool channel_last, str backend) -> (Tensor, Tensor, Tensor)"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, backend = LinearScanInputs(*args[:-1]), args[-1]
    if inputs.gates.numel() == 0:
        out, last_state = forward_outputs(inputs)
        last_state.zero_() if inputs.initial_state is None else last_state.copy_(inputs.initial_state)
        return out, last_state
    return kernels(OP, backend).forward(inputs)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return forward_outputs(LinearScanInputs(*args[:-1]))


def _backward(grad_out: Tensor, grad_last_state: Tensor | None, gates: Tensor, out: Tensor, *args: Any) -> Any:
    inputs, backend = LinearScanInputs(gates, None, *args[:-1]), args[-1]
    if gates.numel() == 0:
        gradients = backward_outputs(inputs)
        gradients[2].zero_()
        if grad_last_state is not None and inputs.initial_state is not None:
            gradients[2].copy_(grad_last_state)
        return gradients
    return kernels(OP, backend).backward(grad_out, grad_last_state, inputs, out)


def _backward_fake(grad_out: Tensor, grad_last_state: Tensor | None, gates: Tensor, out: Tensor, *args: Any) -> Any:
    return backward_outputs(LinearScanInputs(gates, None, *args[:-1]))


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves tensors for backward."""
    gates, _, initial_state, reset, *options = inputs
    save_for_backward(ctx, ("gates", "out", "initial_state", "reset"), (gates, output[0], initial_state, reset))
    ctx.options = tuple(options)
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Input gradients, computed by ``function``."""
    gates, out, initial_state, reset = saved_tensors(ctx, OP)
    if grad_out is None and grad_last_state is None:
        return (None,) * 7
    if grad_out is None:
        grad_out = gates.new_zeros(()).expand(gates.shape)
    grad_gates, grad_tokens, grad_initial_state = function(
        grad_out, grad_last_state, gates, out, initial_state, reset, *ctx.options
    )
    return grad_gates, grad_tokens, None if initial_state is None else grad_initial_state, None, None, None, None


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(batch, ...) -> (size * batch, ...)."""
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _vmap(apply: Callable[..., Any], size: int, in_dims: Sequence[int | None], *args: Any) -> Any:
    folded = [_fold(x, dim, size) for x, dim in zip(args[:4], in_dims[:4], strict=True)]
    return tuple(x.unflatten(0, (size, -1)) for x in apply(*folded, *args[4:])), (0, 0)


def _vmap_backward(apply: Callable[..., Any], size: int, in_dims: Sequence[int | None], *args: Any) -> Any:
    folded = [_fold(x, dim, size) for x, dim in zip(args[:6], in_dims[:6], strict=True)]
    *gradients, grad_initial_state = apply(*folded, *args[6:])
    unfolded = [x.unflatten(0, (size, -1)) for x in gradients]
    if args[4] is None:
        return (*unfolded, grad_initial_state), (0, 0, None)
    return (*unfolded, grad_initial_state.unflatten(0, (size, -1))), (0, 0, 0)


def _forward_flops(*args: Any) -> int:
    return forward_flops(LinearScanInputs(*args[:-1]))


def _backward_flops(grad_out: Tensor, grad_last_state: Tensor | None, gates: Tensor, out: Tensor, *args: Any) -> int:
    return backward_flops(LinearScanInputs(gates, None, *args[:-1]))


define("linear_scan_forward", FORWARD_SCHEMA, _forward, _forward_fake, _forward_flops)
define("linear_scan_backward", BACKWARD_SCHEMA, _backward, _backward_fake, _backward_flops)
LinearScanBackward = backward_function("linear_scan_backward", OP, _vmap_backward)
LinearScan = forward_function("linear_scan_forward", LinearScanBackward, gradients_of, setup_context, 2, _vmap)
