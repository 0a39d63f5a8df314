"""The selective scan as torch.library ops and autograd.Functions.

The forward and the backward pass are an op each, so that torch.compile sees both and neither breaks its graph. Both ops
have an autograd formula; the backward op's raises, since a missing one would drop terms in silence. The Functions add
what ops alone do not offer: torch.func.grad and vmap. vmap folds its dimension into the channels, which are independent
of each other, parameters included: one call then serves a whole ensemble, and per-sample gradients of A come out right.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import require_sequences
from wmkernels.dispatch import kernels
from wmkernels.registration import (
    backward_pass,
    define,
    forbid_double_backward,
    loop_over_vmap,
    raise_double_backward,
    register_autograd,
)
from wmkernels.selective_scan.meta import backward_outputs, forward_outputs

Inputs = Sequence[Tensor | None]
INPUT_COUNT = 11  # u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens
DIFFERENTIABLE = 9  # the first nine of them

_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens"
)
FORWARD_SCHEMA = (
    f"({_TENSORS}, bool delta_softplus, bool channel_last, int chunk, str backend) -> (Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_last_state, {_TENSORS}, Tensor chunk_states, bool delta_softplus, "
    f"bool channel_last, int chunk, str backend) -> ({', '.join(['Tensor'] * DIFFERENTIABLE)})"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, delta_softplus, channel_last, chunk, backend = args
    u, A, initial_state, cu_seqlens = inputs[0], inputs[2], inputs[8], inputs[10]
    if cu_seqlens is not None and u.device.type == "cpu":
        require_sequences("selective_scan", cu_seqlens, u.shape[2])
    if u.numel() == 0:
        out, last_state, chunk_states = forward_outputs(u, A, cu_seqlens, channel_last, chunk)
        last_state.zero_() if initial_state is None else last_state.copy_(initial_state)
        return out, last_state, chunk_states.zero_()
    return kernels("selective_scan", backend).forward(*inputs, delta_softplus, channel_last, chunk)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, _, channel_last, chunk, _ = args
    return forward_outputs(inputs[0], inputs[2], inputs[10], channel_last, chunk)


def _backward(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, channel_last, _, backend = args
    u = inputs[0]
    if u.numel() == 0:
        gradients = _empty_gradients(inputs, channel_last)
        for gradient in gradients:
            gradient.zero_()
        if grad_last_state is not None and inputs[8] is not None:
            gradients[8].copy_(grad_last_state)
        return gradients
    return kernels("selective_scan", backend).backward(grad_out, grad_last_state, *args[:-1])


def _empty_gradients(inputs: Inputs, channel_last: bool) -> tuple[Tensor, ...]:
    u, _, A, B, C, D, z, delta_bias, initial_state = inputs[:DIFFERENTIABLE]
    return backward_outputs(u, A, B, C, D, z, delta_bias, initial_state, channel_last)  # type: ignore[arg-type]


def _backward_fake(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, channel_last, _, _ = args
    return _empty_gradients(inputs, channel_last)


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps the inputs and one state a chunk."""
    *tensors, delta_softplus, channel_last, chunk, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = (delta_softplus, channel_last, chunk, backend)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the forward op's arguments, computed by ``function``."""
    *inputs, chunk_states = ctx.saved_tensors
    if grad_out is None and grad_last_state is None:
        return (None,) * (INPUT_COUNT + 4)
    if grad_out is None:
        grad_out = inputs[0].new_zeros(()).expand(inputs[0].shape)
    gradients = function(grad_out, grad_last_state, *inputs, chunk_states, *ctx.options)
    present = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=False)]
    return (*present, *(None,) * (INPUT_COUNT - DIFFERENTIABLE + 4))


class SelectiveScan(torch.autograd.Function):
    """(out, last_state, chunk_states) of the forward op, under autograd, torch.func and vmap."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.wmkernels.selective_scan_forward(*args)

    setup_context = staticmethod(setup_context)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None, _: Any) -> Any:
        function = backward_pass(SelectiveScanBackward, torch.ops.wmkernels.selective_scan_backward)
        return gradients_of(function, ctx, grad_out, grad_last_state)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        if in_dims[9] is not None or in_dims[10] is not None:
            return loop_over_vmap(SelectiveScan.apply, info.batch_size, in_dims, args)
        folded = fold_inputs(args[:INPUT_COUNT], in_dims, info.batch_size)
        outputs = SelectiveScan.apply(*folded, *args[INPUT_COUNT:])
        return tuple(unfold_channels(x, 1, info.batch_size) for x in outputs), (1, 1, 1)


class SelectiveScanBackward(torch.autograd.Function):
    """The backward op under torch.func and vmap; its own backward raises."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.wmkernels.selective_scan_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise_double_backward("selective_scan")

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        size = info.batch_size
        first, last = 2, 2 + INPUT_COUNT
        if in_dims[first + 9] is not None or in_dims[first + 10] is not None:
            return loop_over_vmap(SelectiveScanBackward.apply, size, in_dims, args)
        grad_out, grad_last_state = (fold_channels(x, d, 1, size) for x, d in zip(args[:2], in_dims[:2], strict=True))
        inputs = args[first:last]
        folded = fold_inputs(inputs, in_dims[first:last], size)
        chunk_states = fold_channels(args[last], in_dims[last], 1, size)
        results = SelectiveScanBackward.apply(grad_out, grad_last_state, *folded, chunk_states, *args[last + 1 :])
        # An absent gradient has no elements; the others keep their channels (or groups) where they were.
        where = [None if x is None else _channel_dim(x) for x in folded[:DIFFERENTIABLE]]
        unfolded = [r if d is None else unfold_channels(r, d, size) for r, d in zip(results, where, strict=True)]
        return tuple(unfolded), tuple(where)


def _channel_dim(x: Tensor) -> int:
    """Where the channels (or groups) of an unbatched, canonical input are: parameters lead with them."""
    return 1 if x.dim() >= 3 else 0


def fold_inputs(inputs: Inputs, in_dims: Sequence[int | None], size: int) -> list[Tensor | None]:
    """All inputs with the vmapped dimension folded into their channels; reset and cu_seqlens have none."""
    folded: list[Tensor | None] = []
    for index, (x, dim) in enumerate(zip(inputs, in_dims, strict=False)):
        if x is None or index >= DIFFERENTIABLE:
            folded.append(x)
        else:
            rank = x.dim() - (dim is not None)
            folded.append(fold_channels(x, dim, 1 if rank >= 3 else 0, size))
    return folded


def fold_channels(x: Tensor | None, dim: int | None, channel_dim: int, size: int) -> Tensor | None:
    """(..., channels, ...) with ``size`` samples at ``dim`` -> (..., size * channels, ...)."""
    if x is None:
        return None
    x = x.unsqueeze(channel_dim) if dim is None else x.movedim(dim, channel_dim)
    shape = [*x.shape]
    shape[channel_dim] = size
    return x.expand(shape).flatten(channel_dim, channel_dim + 1)


def unfold_channels(x: Tensor, channel_dim: int, size: int) -> Tensor:
    """The inverse of ``fold_channels``: the samples come to stand at ``channel_dim``."""
    return x.unflatten(channel_dim, (size, x.shape[channel_dim] // size))


define("selective_scan_forward", FORWARD_SCHEMA, _forward, _forward_fake)
define("selective_scan_backward", BACKWARD_SCHEMA, _backward, _backward_fake)
register_autograd("selective_scan_forward", "selective_scan_backward", gradients_of, setup_context, outputs=2)
forbid_double_backward("selective_scan_backward", "selective_scan")
