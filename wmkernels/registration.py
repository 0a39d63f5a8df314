"""Registers torch.library ops, their autograd and vmap."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

LIBRARY = torch.library.Library("wmkernels", "DEF")


def define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op and its fake."""
    LIBRARY.define(f"{name}{schema}")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"wmkernels::{name}", fake, lib=LIBRARY)


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


def needs_autograd(tensors: Sequence[Tensor | None]) -> bool:
    """Whether to call an autograd.Function, which costs as much as five direct calls."""
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def can_bypass_dispatcher(tensors: Sequence[Tensor | None]) -> bool:
    """Whether to skip dispatch, which costs as much as a step's kernel.

    Needs eager mode and plain tensors without gradient or negative bit.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    differentiates = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or (differentiates and x.requires_grad) or x.is_neg():
            return False
    return True


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
