"""The torch.library namespace of the ops, and what every op's registration shares."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("wmkernels", "DEF")


def define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op for tensors on a CPU and on a GPU, with its fake."""
    LIBRARY.define(f"{name}{schema}")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"wmkernels::{name}", fake, lib=LIBRARY)


def register_autograd(
    forward: str, backward: str, gradients: Callable[..., Any], setup_context: Callable[..., None], outputs: int
) -> None:
    """Gives an op its autograd formula.

    Args:
        forward: name of the op.
        backward: name of the op that computes its gradients.
        gradients: ``(backward op, context, *gradients of outputs) -> gradients of inputs``.
        setup_context: as for ``torch.library.register_autograd``.
        outputs: of the op that have a gradient; those behind them are kept for the backward pass.
    """
    torch.library.register_autograd(
        f"wmkernels::{forward}",
        lambda ctx, *grads: gradients(getattr(torch.ops.wmkernels, backward), ctx, *grads[:outputs]),
        setup_context=setup_context,
        lib=LIBRARY,
    )


def forbid_double_backward(name: str, public_name: str) -> None:
    """Gives the backward op an autograd formula that raises: differentiating it again would otherwise be silent."""
    torch.library.register_autograd(
        f"wmkernels::{name}",
        lambda ctx, *grads: raise_double_backward(public_name),
        setup_context=lambda ctx, inputs, output: None,
        lib=LIBRARY,
    )


def raise_double_backward(public_name: str) -> None:
    """A second derivative that raises is found; one that is silently zero is not."""
    raise RuntimeError(
        f"{public_name}: the gradient of its gradient is not implemented by the compiled kernels; "
        'use backend="reference" where a second derivative is needed'
    )


def needs_autograd(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call must go through an autograd.Function: it costs five times a direct call of the op."""
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def backward_pass(function: Any, op: Any) -> Any:
    """What a Function's backward calls: the backward op's own Function, or under torch.compile the op.

    Tracing a backward, Dynamo hands a Function whose forward takes ``*args`` its context as one argument too many. The
    op alone will do there: its autograd formula raises, too.
    """
    return op if torch.compiler.is_compiling() else function.apply


_PLAIN = (Tensor, torch.nn.Parameter)


def can_bypass_dispatcher(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an op's implementation may be called by itself: the dispatcher costs a step as much as its kernel.

    So it is in eager mode, on plain tensors of which none needs a gradient or has its sign yet to be turned (the
    imaginary part of a conjugate), where no mode (fake tensors, functorch, tracing) wants to see the call.
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
    function: Callable[..., tuple[Tensor, ...]], batch_size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A vmap rule that runs the samples one by one, for inputs that cannot be folded into one call."""
    results = []
    for index in range(batch_size):
        sample = [x if dim is None else x.select(dim, index) for x, dim in zip(args, in_dims, strict=True)]
        results.append(function(*sample))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
