"""Launch helpers for Triton kernels; nothing synchronises, so CUDA graphs can capture calls."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

# H100, H200; default without GPU
DEFAULT_PROCESSORS = 132


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int, **options: Any) -> None:
    if programs > 0:
        # Triton 3.10 does not fuse by default
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True, **options)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """In elements; zeros if None."""
    if tensor is None:
        return (0,) * dimensions
    if tensor.dim() != dimensions:
        raise ValueError(
            f"a Triton kernel got a tensor of shape {tuple(tensor.shape)}, expected {dimensions} dimensions"
        )
    return tensor.stride()


def as_bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


def next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def power_of_two_factor(number: int, most: int) -> int:
    """Largest power of two that divides ``number``, at most ``most`` (a power of two)."""
    return min(number & -number, most)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def choose_segment_length(time: int, rows: int, granule: int, min_programs: int, target_programs: int) -> int:
    """Steps per program, a multiple of ``granule``.

    Cutting computes sequences almost twice, so it needs a mostly idle GPU: ``rows``, the programs without a cut, below
    ``min_programs``.
    """
    whole = max(granule, ceil_div(time, granule) * granule)
    if rows >= min_programs or rows == 0:
        return whole
    segments = ceil_div(target_programs, rows)
    least = max(granule, ceil_div(64, granule) * granule)
    return min(whole, max(least, ceil_div(ceil_div(time, segments), granule) * granule))
