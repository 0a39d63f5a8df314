"""Input checks. Every error begins with the name of the op or module.

``Signature`` checks what each argument is, before anything reads it; the ``require_*`` functions check its values.
"""

import contextlib
import inspect
import numbers
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wmkernels.modes import is_jit_trace

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_SIZE = 2**31 - 1
DENSE = torch.strided
_EXACT = (torch.float32, torch.bfloat16, torch.float16)  # float32 holds each exactly


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


class Signature:
    """Kinds of a public function's arguments, read from its annotations: one check for every op.

    Attributes:
        name: the function's.
        kinds: of each argument, in order: Tensor, bool or str; None where the op checks it by itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        hints = typing.get_type_hints(function)
        self.kinds: list[tuple[str, type | None, bool]] = []  # (argument, kind, whether None is allowed)
        for name in inspect.signature(function).parameters:
            options = typing.get_args(hints[name]) or (hints[name],)
            kind = next((kind for kind in (Tensor, bool, str) if kind in options), None)
            if not set(options) <= {kind, type(None)}:
                kind = None
            self.kinds.append((name, kind, type(None) in options))

    def require(self, *values: object) -> None:
        """Checks all arguments, in order. Raises TypeError."""
        for (name, kind, optional), value in zip(self.kinds, values, strict=True):
            if kind is None or (value is None and optional):
                continue
            if kind is Tensor:
                if type(value) is Tensor and value.layout is DENSE and not value.is_nested:
                    continue  # without a call: a step's checks take as long as its kernel
                require_tensor(self.name, name, value)
            elif type(value) is not kind:
                expected = "True or False" if kind is bool else "a str" + (" or None" if optional else "")
                raise TypeError(f"{self.name}: {name} is {shown(value)}, expected {expected}")


def shown(value: object) -> str:
    """The value in an error message, or its type where it is long."""
    text = "" if isinstance(value, Tensor) else repr(value)
    return text if text and len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def require_tensor(op: str, name: str, value: object) -> None:
    """Expects a dense tensor. Raises TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.layout is not DENSE or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        hint = "to_padded_tensor(), or cu_seqlens for packed sequences" if value.is_nested else "to_dense()"
        raise TypeError(f"{op}: {name} is a {layout} tensor, expected a dense one; {hint} makes one")


def require_flag(op: str, name: str, value: object) -> bool:
    """The value. Raises TypeError."""
    if type(value) is not bool:
        raise TypeError(f"{op}: {name} is {shown(value)}, expected True or False")
    return value


def require_size(op: str, name: str, value: object, least: int = 0) -> None:
    """Expects a whole number, at least ``least``, that kernels hold. Raises TypeError, ValueError."""
    if isinstance(value, Tensor) and is_jit_trace():  # sizes are tensors there
        return
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} is {shown(value)}, expected a whole number")
    if value < least or (isinstance(value, int) and value > MAX_SIZE):
        raise ValueError(f"{op}: {name} is {value}, expected {least} to {MAX_SIZE}")


def require_range(op: str, name: str, value: object) -> tuple[float, float]:
    """Two numbers, the lowest first. Raises TypeError, ValueError."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{op}: {name} is {shown(value)}, expected (lowest, highest)")
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in value):
        raise TypeError(f"{op}: {name} is {shown(value)}, expected two numbers")
    low, high = (float(v) for v in value)
    if not low <= high:  # NaN, too
        raise ValueError(f"{op}: {name} is {shown(value)}, expected its lowest number first")
    return low, high


def has_shape(tensor: Tensor, sizes: Sequence[int]) -> bool:
    """Whether the sizes are equal one by one: compiled with dynamic shapes, tuples of them are not compared."""
    return tensor.dim() == len(sizes) and all(a == b for a, b in zip(tensor.shape, sizes, strict=True))


def require_shape(
    op: str, name: str, tensor: Tensor, labels: Sequence[str], sizes: Sequence[int], against: str, hint: str = ""
) -> None:
    """Raises ValueError."""
    if has_shape(tensor, sizes):
        return
    expected = ", ".join(f"{label}={size}" for label, size in zip(labels, sizes, strict=True))
    raise ValueError(
        f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({expected}) to match {against}"
        + (f"; {hint}" if hint else "")
    )


def require_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype], why: str) -> None:
    """Raises TypeError."""
    if tensor.dtype not in allowed:
        expected = " or ".join(dict.fromkeys(dtype_name(dtype) for dtype in allowed))
        raise TypeError(f"{op}: {name} has dtype {dtype_name(tensor.dtype)}, expected {expected} {why}".rstrip())


def require_float(op: str, name: str, tensor: Tensor, like: Tensor, against: str) -> None:
    """Expects a dtype that the arithmetic of ``like`` holds exactly, and its device. Raises TypeError, ValueError."""
    if tensor.dtype not in (FLOATS if like.dtype == torch.float64 else _EXACT):
        held = dtype_name(state_dtype(like.dtype))
        raise TypeError(
            f"{op}: {name} has dtype {dtype_name(tensor.dtype)}, expected {held} beside {against} of {like.dtype}, or "
            "a narrower floating dtype"
        )
    if tensor.device != like.device:
        require_device(op, name, tensor, like.device, against)


def common_dtype(tensors: Sequence[Tensor | None], like: Tensor) -> Sequence[Tensor | None]:
    """The tensors as they are where all have the dtype of ``like``; else in the state dtype, which holds them all."""
    if all(x is None or x.dtype == like.dtype for x in tensors):
        return tensors
    dtype = state_dtype(like.dtype)
    return [None if x is None else x.to(dtype) for x in tensors]


def require_device(op: str, name: str, tensor: Tensor, device: torch.device, against: str) -> None:
    """Raises ValueError."""
    if tensor.device != device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, expected {device} as {against} is; move it with .to({str(device)!r})"
        )


def require_reset(
    op: str, reset: Tensor | None, labels: Sequence[str], sizes: Sequence[int], like: Tensor, against: str
) -> None:
    """Checks dtype, shape and device."""
    if reset is None:
        return
    require_tensor(op, "reset", reset)
    require_device(op, "reset", reset, like.device, against)
    require_dtype(op, "reset", reset, (torch.bool,), "(true where a new sequence starts)")
    require_shape(op, "reset", reset, labels, sizes, against)


def require_packing(op: str, cu_seqlens: Tensor | None, like: Tensor, against: str) -> None:
    """Checks dtype, device, shape and batch 1."""
    if cu_seqlens is None:
        return
    require_tensor(op, "cu_seqlens", cu_seqlens)
    require_dtype(op, "cu_seqlens", cu_seqlens, (torch.int64, torch.int32), "")
    require_device(op, "cu_seqlens", cu_seqlens, like.device, against)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (sequences + 1,)")
    if like.shape[0] != 1:
        raise ValueError(
            f"{op}: {against} has a batch of {like.shape[0]}, expected 1 with cu_seqlens: "
            "packed sequences lie along time"
        )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promote_dtypes(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Promoted dtype under autocast."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def require_writable(op: str, name: str, tensor: Tensor) -> None:
    """Expects a tensor that a kernel can update in place: each element in memory of its own. Raises ValueError."""
    if torch.compiler.is_compiling():  # the compiled graph updates a copy and writes it back
        return
    if overlaps_itself(tensor):
        raise ValueError(
            f"{op}: {name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}: several of its elements share "
            "memory, so it cannot be updated in place; pass a copy, .clone() of it"
        )
    if tensor.is_neg():
        raise ValueError(f"{op}: {name} is a negated view of other memory, to be written; pass .resolve_neg() of it")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{op}: {name} was made in inference mode and cannot be updated outside it; pass a copy, .clone() of it"
        )


def require_disjoint(op: str, name: str, written: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Expects no memory of ``written`` in the tensors read meanwhile. Raises ValueError."""
    if torch.compiler.is_compiling():
        return
    for other, x in others.items():
        if x is not None and torch._C._is_alias_of(x, written):  # type: ignore[attr-defined]
            (begin, end), (first, last) = _bytes_of(x), _bytes_of(written)
            if begin < last and first < end:
                raise ValueError(
                    f"{op}: {other} shares memory with {name}, which is updated in place; pass a copy, .clone() of it"
                )


def _bytes_of(tensor: Tensor) -> tuple[Any, Any]:
    """From the first to behind the last byte of its storage that the tensor may use."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset() * tensor.itemsize
    return begin, begin + (reach + 1) * tensor.itemsize if tensor.numel() else begin


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements may share memory; true as well for some interleaved views by ``as_strided``."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on; False for devices without it, such as meta."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextlib.contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Disables autocast."""
    if not is_autocast(device):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def require_sequences(op: str, cu_seqlens: Tensor, time: int) -> None:
    """Raises ValueError unless bounds rise from 0 to ``time``; synchronises."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != time or any(a > b for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(f"{op}: cu_seqlens is {shown}, expected bounds that rise from 0 to time={time}")
