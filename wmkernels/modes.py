"""What a call runs under: gradients, transforms, tracers and modes.

A compiled kernel reads memory, so nothing but a plain eager call may skip the dispatcher, and nothing that needs
PyTorch's own operators may reach a kernel. Each question is asked here alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack, is_grad_enabled
from torch._C._functorch import TransformType, get_interpreter_stack, maybe_current_level
from torch.autograd import forward_ad, profiler

FORWARD_MODE = "forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp)"
ONNX = "an ONNX export"

_PLAIN = (Tensor, torch.nn.Parameter)


def can_bypass_dispatcher(tensors: Sequence[Tensor | None]) -> bool:
    """Whether to skip dispatch, which costs as much as a step's kernel.

    Needs eager mode with nothing that must see the call, and plain tensors without gradient or negative bit.
    """
    if (
        torch.compiler.is_compiling()
        or maybe_current_level() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    ):
        return False
    differentiates = is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or (differentiates and x.requires_grad) or x.is_neg():
            return False
    return True


def needs_autograd(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call needs a backward pass: its Function costs as much as five direct calls."""
    if maybe_current_level() is not None:
        return True
    return is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_jit_trace() -> bool:
    """Whether ``torch.jit.trace`` records this call."""
    return not torch.compiler.is_compiling() and _get_tracing_state() is not None


def can_checkpoint() -> bool:
    """Whether ``torch.utils.checkpoint`` works: not under transforms, forward-mode levels, compilers and tracers."""
    if torch.compiler.is_compiling() or maybe_current_level() is not None:
        return False
    return forward_ad._current_level < 0 and _get_tracing_state() is None


def can_read_values(x: Tensor, on_gpu: bool = False) -> bool:
    """Whether Python may branch on the values of ``x``, where nothing transforms or records the call.

    ``on_gpu``: also on a GPU, which then waits.
    """
    if torch.compiler.is_compiling() or maybe_current_level() is not None:
        return False
    if x.device.type != "cpu" and not (on_gpu and x.is_cuda and not torch.cuda.is_current_stream_capturing()):
        return False
    return _len_torch_dispatch_stack() == 0 and _get_tracing_state() is None


def requires_pytorch(tensors: Iterable[Tensor | None]) -> str:
    """What makes PyTorch's own operators necessary: ``FORWARD_MODE``, ``ONNX`` or ""."""
    if torch.compiler.is_compiling():
        return _compiled_requires_pytorch()
    if forward_ad._current_level >= 0 and has_tangent(tensors):
        return FORWARD_MODE
    return ONNX if _get_tracing_state() is not None and torch.onnx.is_in_onnx_export() else ""


@torch.compiler.assume_constant_result
def _compiled_requires_pytorch() -> str:
    if torch.onnx.is_in_onnx_export():
        return ONNX
    return FORWARD_MODE if forward_ad._current_level >= 0 else ""


def has_tangent(values: Iterable[object]) -> bool:
    """Whether one of ``values`` is a dual tensor, also inside ``torch.func`` transforms."""
    level = forward_ad._current_level
    if level < 0:
        return False
    given = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    transforms = get_interpreter_stack()
    levels = {transform.level() for transform in transforms or () if transform.key() == TransformType.Jvp}
    if not transforms or transforms[-1].level() in levels:
        if any(forward_ad.unpack_dual(x, level=level).tangent is not None for x in given):
            return True
        levels.discard(transforms[-1].level() if transforms else 0)
        return any(_is_wrapped_at(x, levels) for x in given)
    # Tangents of outer levels cannot be read: wrapped at a jvp counts, and without a jvp any level does.
    return not levels or any(_is_wrapped_at(x, levels) for x in given)


def _is_wrapped_at(x: Any, levels: set[int]) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.maybe_get_level(x) in levels:
            return True
        x = functorch.get_unwrapped(x)
    return False
