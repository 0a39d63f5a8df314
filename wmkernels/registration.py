"""Registers torch.library ops, their autograd and vmap."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils.flop_counter import register_flop_formula

from wmkernels.modes import FORWARD_MODE, has_tangent, is_jit_trace

LIBRARY = torch.library.Library("wmkernels", "DEF")


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Registers an op, its fake and the number of its floating-point operations, a function of its arguments."""

    def run(*args: Any) -> Any:
        # PyTorch's autograd kernel drops tangents in silence where no input requires grad.
        if forward_ad._current_level >= 0 and has_tangent(args):
            raise_forward_mode(name)
        return implementation(*args)

    LIBRARY.define(f"{name}{schema}")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"wmkernels::{name}", fake, lib=LIBRARY)

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return flops(*args)

    register_flop_formula(getattr(torch.ops.wmkernels, name), get_raw=True)(count)


Vmap = Callable[..., tuple[Any, Any]]
"""vmap rule: ``(apply, batch size, in_dims, *args) -> (outputs, out_dims)``."""


def backward_function(op: str, public_name: str, vmap: Vmap) -> Any:
    """The Function of a backward op. Its derivative raises; unregistered, it would be zero."""
    forbid_double_backward(op, public_name)
    return _function(op, vmap, lambda ctx, inputs, output: None, lambda ctx, *grads: raise_double_backward(public_name))


def forward_function(
    op: str,
    backward: Any,
    gradients: Callable[..., Any],
    setup_context: Callable[..., None],
    outputs: int,
    vmap: Vmap,
) -> Any:
    """Registers an op's autograd formula; returns its Function for autograd, torch.func and vmap.

    ``gradients(backward op, context, *output gradients)`` returns input gradients. The first ``outputs`` outputs are
    differentiable.
    """
    backward_op = backward.op

    def backward_of_op(ctx: Any, *grads: Tensor | None) -> Any:
        return gradients(backward_op, ctx, *grads[:outputs])

    def backward_of_function(ctx: Any, *grads: Tensor | None) -> Any:
        # Dynamo adds the context to the arguments of a ``*args`` forward. The op's derivative raises as well.
        return gradients(backward_op if torch.compiler.is_compiling() else backward.apply, ctx, *grads[:outputs])

    torch.library.register_autograd(f"wmkernels::{op}", backward_of_op, setup_context=setup_context, lib=LIBRARY)
    return _function(op, vmap, setup_context, backward_of_function)


def _function(name: str, vmap: Vmap, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    op = getattr(torch.ops.wmkernels, name)

    def forward(*args: Any) -> Any:
        return op(*args)

    def vmap_rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return vmap(cls.apply, info.batch_size, in_dims, *args)

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap_rule}
    attributes: dict[str, Any] = {key: staticmethod(method) for key, method in methods.items()}
    cls: Any = type(name, (Function,), {**attributes, "op": op, "__module__": __name__})
    return cls


def differentiably(function: Any, *args: Any) -> Any:
    """Calls the op of ``function`` so that its outputs have gradients.

    A tracer records the op, whose own formula differentiates it: a graph with a Function cannot be saved.
    """
    return function.op(*args) if is_jit_trace() else function.apply(*args)


def forbid_double_backward(name: str, public_name: str) -> None:
    """Makes a backward op's derivative raise."""
    torch.library.register_autograd(
        f"wmkernels::{name}",
        lambda ctx, *grads: raise_double_backward(public_name),
        setup_context=lambda ctx, inputs, output: None,
        lib=LIBRARY,
    )


def raise_double_backward(public_name: str) -> None:
    """Raises RuntimeError."""
    raise RuntimeError(
        f"{public_name}: the gradient of its gradient is not implemented by the compiled kernels; "
        'use backend="reference" where a second derivative is needed'
    )


def raise_forward_mode(name: str) -> None:
    """Raises RuntimeError."""
    raise RuntimeError(
        f"{name}: {FORWARD_MODE} is not implemented by the compiled kernels; "
        'use backend="reference", or none, which then runs plain PyTorch'
    )


def save_for_backward(ctx: Any, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Saves tensors, and what each of them is, for ``saved_tensors``."""
    ctx.save_for_backward(*tensors)
    ctx.saved_as = [
        (n, None if x is None else (x.shape, x.dtype, x.device)) for n, x in zip(names, tensors, strict=True)
    ]


def saved_tensors(ctx: Any, public_name: str) -> tuple[Any, ...]:
    """Tensors of ``save_for_backward``. Raises RuntimeError where a saved-tensor hook made others of them."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    for (name, expected), x in zip(ctx.saved_as, tensors, strict=True):
        if (None if x is None else (x.shape, x.dtype, x.device)) != expected:
            held = "None" if x is None else f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            was = "None" if expected is None else f"{expected[1]} of shape {tuple(expected[0])} on {expected[2]}"
            raise RuntimeError(
                f"{public_name}: {name}, saved for the backward pass, came back as {held}, expected {was}; a hook of "
                "torch.autograd.graph.saved_tensors_hooks must return what it was given"
            )
    return tensors


def raise_not_kept(public_name: str) -> None:
    """Raises RuntimeError."""
    raise RuntimeError(
        f"{public_name}: this graph was exported or traced without gradients, under torch.no_grad() or with no input "
        "that required them, so its forward pass kept nothing for a backward pass; export or trace it with gradients "
        "to train it"
    )


def loop_over_vmap(
    apply: Callable[..., tuple[Tensor, ...]], batch_size: int, in_dims: Sequence[Any], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """vmap rule by looping."""
    # For an argument that is a list of integers, in_dims holds a list of None.
    in_dims = [dim if isinstance(x, Tensor) else None for dim, x in zip(in_dims, args, strict=True)]
    results = []
    for index in range(batch_size):
        sample = [x if dim is None else x.select(dim, index) for x, dim in zip(args, in_dims, strict=True)]
        results.append(apply(*sample))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
