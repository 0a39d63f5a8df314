"""Launch, device, strides and segment lengths for Triton kernels.

Tiles come from tables, so the first call compiles once without tuning. Nothing synchronises; CUDA graphs can capture a
later call.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

# H100 and H200; assumed without a GPU.
DEFAULT_PROCESSORS = 132


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int, **options: Any) -> None:
    """Enqueues ``kernel`` on the current stream, unless the grid is empty."""
    if programs > 0:
        # Triton 3.10 no longer fuses multiply-adds by default.
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True, **options)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU current for Triton."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """Element strides; zeros without a tensor."""
    if tensor is None:
        return (0,) * dimensions
    if tensor.dim() != dimensions:
        raise ValueError(
            f"a Triton kernel got a tensor of shape {tuple(tensor.shape)}, expected {dimensions} dimensions"
        )
    return tensor.stride()


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Views booleans as bytes."""
    return None if flags is None else flags.view(torch.uint8)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors."""
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


def next_power_of_2(number: int) -> int:
    """Smallest power of two >= ``number``."""
    return 1 << max(0, number - 1).bit_length()


def power_of_two_factor(number: int, most: int) -> int:
    """Largest power-of-two factor of ``number`` up to ``most``."""
    return min(number & -number, most)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def choose_segment_length(time: int, rows: int, granule: int, min_programs: int, target_programs: int) -> int:
    """Steps per program: ``time`` if ``rows`` programs suffice, else fewer.

    Cutting computes a sequence nearly twice, which pays only if whole sequences leave most of the GPU idle.

    Args:
        time: sequence length.
        rows: programs without cutting.
        granule: divides the result.
        min_programs: minimum without cutting.
        target_programs: programs that fill the GPU.
    """
    whole = max(granule, ceil_div(time, granule) * granule)
    if rows >= min_programs or rows == 0:
        return whole
    segments = ceil_div(target_programs, rows)
    least = max(granule, ceil_div(64, granule) * granule)
    return min(whole, max(least, ceil_div(ceil_div(time, segments), granule) * granule))
