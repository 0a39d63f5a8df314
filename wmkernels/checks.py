"""Input checks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def require_tensor(op: str, name: str, value: object) -> None:
    """Raises TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a torch.Tensor")


def require_shape(
    op: str, name: str, tensor: Tensor, labels: Sequence[str], sizes: Sequence[int], against: str, hint: str = ""
) -> None:
    """Raises ValueError."""
    if tensor.dim() == len(sizes) and all(a == b for a, b in zip(tensor.shape, sizes, strict=True)):
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
        raise TypeError(f"{op}: {name} has dtype {dtype_name(tensor.dtype)}, expected {expected} {why}")


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


def require_sequences(op: str, cu_seqlens: Tensor, time: int) -> None:
    """Raises ValueError unless bounds rise from 0 to ``time``; synchronises."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != time or any(a > b for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(f"{op}: cu_seqlens is {shown}, expected bounds that rise from 0 to time={time}")
