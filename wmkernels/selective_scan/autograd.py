"""The selective scan's ops and autograd.Functions.

vmap folds its dimension into the channels, which parameters have too.
"""

from collections.abc import Callable, Sequence
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
from wmkernels.selective_scan.flops import backward_flops, forward_flops
from wmkernels.selective_scan.meta import DIFFERENTIABLE, TENSORS, ScanInputs, backward_outputs, forward_outputs

OP = "selective_scan"
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
OPTIONS = 4
_SAVED = (*ScanInputs._fields[:TENSORS], "chunk_states")
UNBATCHED = slice(DIFFERENTIABLE, TENSORS)  # reset, cu_seqlens


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, chunk, backend = ScanInputs(*args[:-2]), args[-2], args[-1]
    u, initial_state, cu_seqlens = inputs.u, inputs.initial_state, inputs.cu_seqlens
    if cu_seqlens is not None and u.device.type == "cpu":
        require_sequences(OP, cu_seqlens, u.shape[2])
    if u.numel() == 0:
        out, last_state, chunk_states = forward_outputs(inputs, chunk)
        last_state.zero_() if initial_state is None else last_state.copy_(initial_state)
        return out, last_state, chunk_states.zero_()
    return kernels(OP, backend).forward(inputs, chunk)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward_outputs(ScanInputs(*args[:-2]), args[-2])


def _backward_inputs(args: Sequence[Any]) -> ScanInputs:
    return ScanInputs(*args[:TENSORS], *args[TENSORS + 1 : TENSORS + 3])


def _backward(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, chunk_states, chunk, backend = _backward_inputs(args), args[TENSORS], args[-2], args[-1]
    if inputs.u.numel() == 0:
        gradients = backward_outputs(inputs)
        for gradient in gradients:
            gradient.zero_()
        if grad_last_state is not None and inputs.initial_state is not None:
            gradients[8].copy_(grad_last_state)
        return gradients
    return kernels(OP, backend).backward(grad_out, grad_last_state, inputs, chunk_states, chunk)


def _backward_fake(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return backward_outputs(_backward_inputs(args))


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves inputs and chunk states."""
    save_for_backward(ctx, _SAVED, (*inputs[:TENSORS], output[2]))
    ctx.options = inputs[TENSORS:]  # delta_softplus, channel_last, chunk (0: no states kept), backend
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def gradients_of(
    function: Any, ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients by ``function``."""
    *inputs, chunk_states = saved_tensors(ctx, OP)
    if grad_out is None and grad_last_state is None:
        return (None,) * (TENSORS + OPTIONS)
    if not ctx.options[2]:
        raise_not_kept(OP)
    if grad_out is None:
        grad_out = inputs[0].new_zeros(()).expand(inputs[0].shape)
    gradients = function(grad_out, grad_last_state, *inputs, chunk_states, *ctx.options)
    present = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=False)]
    return (*present, *(None,) * (TENSORS - DIFFERENTIABLE + OPTIONS))


def _vmap(apply: Callable[..., Any], size: int, in_dims: Sequence[int | None], *args: Any) -> Any:
    if any(dim is not None for dim in in_dims[UNBATCHED]):
        return loop_over_vmap(apply, size, in_dims, *args)
    outputs = apply(*fold_inputs(args[:TENSORS], in_dims, size), *args[TENSORS:])
    return tuple(unfold_channels(x, 1, size) for x in outputs), (1, 1, 1)


def _vmap_backward(apply: Callable[..., Any], size: int, in_dims: Sequence[int | None], *args: Any) -> Any:
    inputs, input_dims, rest = args[2 : 2 + TENSORS], in_dims[2 : 2 + TENSORS], args[3 + TENSORS :]
    if any(dim is not None for dim in input_dims[UNBATCHED]):
        return loop_over_vmap(apply, size, in_dims, *args)
    grad_out, grad_last_state = (fold_channels(x, d, 1, size) for x, d in zip(args[:2], in_dims[:2], strict=True))
    folded = fold_inputs(inputs, input_dims, size)
    chunk_states = fold_channels(args[2 + TENSORS], in_dims[2 + TENSORS], 1, size)
    results = apply(grad_out, grad_last_state, *folded, chunk_states, *rest)
    # None: absent, empty gradient
    dims = [None if x is None else _channel_dim(x) for x in folded[:DIFFERENTIABLE]]
    unfolded = [r if d is None else unfold_channels(r, d, size) for r, d in zip(results, dims, strict=True)]
    return tuple(unfolded), tuple(dims)


def _channel_dim(x: Tensor) -> int:
    """Without vmap's dimension."""
    return 1 if x.dim() >= 3 else 0


def fold_inputs(inputs: Sequence[Tensor | None], in_dims: Sequence[int | None], size: int) -> list[Tensor | None]:
    """Folds vmap's dimension."""
    folded: list[Tensor | None] = []
    for index, (x, dim) in enumerate(zip(inputs, in_dims, strict=False)):
        if x is None or index >= DIFFERENTIABLE:
            folded.append(x)
        else:
            rank = x.dim() - (dim is not None)
            folded.append(fold_channels(x, dim, 1 if rank >= 3 else 0, size))
    return folded


def fold_channels(x: Tensor | None, dim: int | None, channel_dim: int, size: int) -> Tensor | None:
    """(..., channels, ...) -> (..., size * channels, ...)."""
    if x is None:
        return None
    x = x.unsqueeze(channel_dim) if dim is None else x.movedim(dim, channel_dim)
    shape = [*x.shape]
    shape[channel_dim] = size
    return x.expand(shape).flatten(channel_dim, channel_dim + 1)


def unfold_channels(x: Tensor, channel_dim: int, size: int) -> Tensor:
    """Inverse of ``fold_channels``."""
    return x.unflatten(channel_dim, (size, x.shape[channel_dim] // size))


def _forward_flops(*args: Any) -> int:
    return forward_flops(ScanInputs(*args[:-2]))


def _backward_flops(grad_out: Tensor, grad_last_state: Tensor | None, *args: Any) -> int:
    return backward_flops(_backward_inputs(args))


define("selective_scan_forward", FORWARD_SCHEMA, _forward, _forward_fake, _forward_flops)
define("selective_scan_backward", BACKWARD_SCHEMA, _backward, _backward_fake, _backward_flops)
SelectiveScanBackward = backward_function("selective_scan_backward", OP, _vmap_backward)
SelectiveScan = forward_function("selective_scan_forward", SelectiveScanBackward, gradients_of, setup_context, 2, _vmap)
