"""Shared by the launchers of Triton kernels: the launch, the current device, strides, segment lengths.

Nothing is tuned at run time: tiles come from small tables, so the first call costs one compilation and no search. A
call never synchronises and can be captured in a CUDA graph once it has run.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

# Of an H100 or H200; assumed without a GPU.
DEFAULT_PROCESSORS = 132


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int, **options: Any) -> None:
    """Enqueues ``kernel`` on the current stream; an empty grid is not launched."""
    if programs > 0:
        # Explicit, since Triton 3.10 no longer fuses multiply-adds by default.
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True, **options)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU current, since Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """Strides in elements; zeros for an absent tensor."""
    if tensor is None:
        return (0,) * dimensions
    if tensor.dim() != dimensions:
        raise ValueError(
            f"a Triton kernel got a tensor of shape {tuple(tensor.shape)}, expected {dimensions} dimensions"
        )
    return tensor.stride()


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Booleans as bytes 0 and 1, without a copy."""
    return None if flags is None else flags.view(torch.uint8)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU."""
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


def power_of_two_at_least(number: int) -> int:
    """The smallest power of two >= ``number``."""
    return 1 << max(0, number - 1).bit_length()


def power_of_two_factor(number: int, most: int) -> int:
    """The largest power of two that divides ``number`` and is at most ``most``."""
    return min(number & -number, most)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def choose_segment_length(time: int, rows: int, granule: int, min_programs: int, target_programs: int) -> int:
    """Steps per program: ``time`` where ``rows`` programs are enough, else fewer, a multiple of ``granule``.

    A sequence cut into segments is computed nearly twice (the segments' final states, then the segments), which pays
    only where whole sequences leave most of the GPU idle.

    Args:
        time: length of a sequence.
        rows: programs without cutting.
        granule: divides the segment length.
        min_programs: from as many programs on nothing is cut.
        target_programs: programs that fill the GPU.
    """
    whole = max(granule, ceil_div(time, granule) * granule)
    if rows >= min_programs or rows == 0:
        return whole
    segments = ceil_div(target_programs, rows)
    least = max(granule, ceil_div(64, granule) * granule)
    return min(whole, max(least, ceil_div(ceil_div(time, segments), granule) * granule))
