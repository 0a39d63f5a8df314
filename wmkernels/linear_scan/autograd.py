"""The linear scan as torch.library ops and autograd.Functions; laid out like ``wmkernels/selective_scan/autograd.py``.

The backward pass needs no state of its own: the states are the output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wmkernels.dispatch import kernels
from wmkernels.linear_scan.meta import backward_outputs, forward_outputs
from wmkernels.registration import (
    backward_pass,
    define,
    forbid_double_backward,
    raise_double_backward,
    register_autograd,
)

FORWARD_SCHEMA = (
    "(Tensor gates, Tensor tokens, Tensor? initial_state, Tensor? reset, bool reverse, bool channel_last, str backend)"
    " -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_last_state, Tensor gates, Tensor out, Tensor? initial_state, Tensor? reset, "
    "bool reverse, bool channel_last, str backend) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    gates: Tensor,
    tokens: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    channel_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if gates.numel() == 0:
        out, last_state = forward_outputs(gates, channel_last)
        last_state.zero_() if initial_state is None else last_state.copy_(initial_state)
        return out, last_state
    return kernels("linear_scan", backend).forward(gates, tokens, initial_state, reset, reverse, channel_last)


def _forward_fake(gates: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return forward_outputs(gates, args[-2])


def _backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    gates: Tensor,
    out: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    channel_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if gates.numel() == 0:
        gradients = backward_outputs(gates, initial_state, channel_last)
        gradients[2].zero_()
        if grad_last_state is not None and initial_state is not None:
            gradients[2].copy_(grad_last_state)
        return gradients
    return kernels("linear_scan", backend).backward(
        grad_out, grad_last_state, gates, out, initial_state, reset, reverse, channel_last
    )


def _backward_fake(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    gates: Tensor,
    out: Tensor,
    initial_state: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward_outputs(gates, initial_state, args[-2])


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps the gates, the states (the output) and what came in."""
    gates, _, initial_state, reset, *options = inputs
    ctx.save_for_backward(gates, output[0], initial_state, reset)
    ctx.options = tuple(options)
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the forward op's arguments, computed by ``function``."""
    gates, out, initial_state, reset = ctx.saved_tensors
    if grad_out is None and grad_last_state is None:
        return (None,) * 7
    if grad_out is None:
        grad_out = gates.new_zeros(()).expand(gates.shape)
    grad_gates, grad_tokens, grad_initial_state = function(
        grad_out, grad_last_state, gates, out, initial_state, reset, *ctx.options
    )
    return grad_gates, grad_tokens, None if initial_state is None else grad_initial_state, None, None, None, None


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(batch, ...) with ``size`` samples at ``dim`` -> (size * batch, ...): every input has a batch."""
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


class LinearScan(torch.autograd.Function):
    """(out, last_state) of the forward op, under autograd, torch.func and vmap."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.wmkernels.linear_scan_forward(*args)

    setup_context = staticmethod(setup_context)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None) -> Any:
        function = backward_pass(LinearScanBackward, torch.ops.wmkernels.linear_scan_backward)
        return gradients_of(function, ctx, grad_out, grad_last_state)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        folded = [_fold(x, dim, info.batch_size) for x, dim in zip(args[:4], in_dims[:4], strict=True)]
        outputs = LinearScan.apply(*folded, *args[4:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)


class LinearScanBackward(torch.autograd.Function):
    """The backward op under torch.func and vmap; its own backward raises."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.wmkernels.linear_scan_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise_double_backward("linear_scan")

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        size = info.batch_size
        folded = [_fold(x, dim, size) for x, dim in zip(args[:6], in_dims[:6], strict=True)]
        grad_gates, grad_tokens, grad_initial_state = LinearScanBackward.apply(*folded, *args[6:])
        unfolded = (grad_gates.unflatten(0, (size, -1)), grad_tokens.unflatten(0, (size, -1)))
        if args[4] is None:
            return (*unfolded, grad_initial_state), (0, 0, None)
        return (*unfolded, grad_initial_state.unflatten(0, (size, -1))), (0, 0, 0)


define("linear_scan_forward", FORWARD_SCHEMA, _forward, _forward_fake)
define("linear_scan_backward", BACKWARD_SCHEMA, _backward, _backward_fake)
register_autograd("linear_scan_forward", "linear_scan_backward", gradients_of, setup_context, outputs=2)
forbid_double_backward("linear_scan_backward", "linear_scan")
