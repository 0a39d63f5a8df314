"""What the launchers of Triton kernels share: the launch itself, the current device, strides, and sizes of work.

Nothing is tuned at run time. A kernel's tile comes from a small table, so that the first call costs one compilation and
no search, and a call never synchronises: it may be captured in a CUDA graph once it has run.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

# Assumed where there is no GPU to ask: what an H100 or H200 has.
DEFAULT_PROCESSORS = 132


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int, **options: Any) -> None:
    """Enqueues ``kernel`` on the current stream; a grid of none is no launch."""
    if programs > 0:
        # Named, since Triton 3.10 turns the fusing of a multiply and an add off where it isn't.
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True, **options)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, since Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """In elements; zeros for a tensor that is absent."""
    if tensor is None:
        return (0,) * dimensions
    if tensor.dim() != dimensions:
        raise ValueError(
            f"a Triton kernel got a tensor of shape {tuple(tensor.shape)}, expected {dimensions} dimensions"
        )
    return tensor.stride()


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Booleans as the bytes 0 and 1 that they are, without a copy."""
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
    """The least power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


def power_of_two_factor(number: int, most: int) -> int:
    """The largest power of two that divides ``number`` and is at most ``most``."""
    return min(number & -number, most)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def segment_length(time: int, rows: int, granule: int, enough: int, wanted: int) -> int:
    """Steps that one program walks: ``time`` where ``rows`` programs are enough, else less, a multiple of ``granule``.

    A sequence cut into segments is computed nearly twice (each segment's effect on the state, then the segments), so
    this only pays where whole sequences would leave most of the chip idle.

    Args:
        time: length of a sequence.
        rows: programs that there are without cutting.
        granule: what a segment's length is a multiple of.
        enough: programs with which nothing is cut.
        wanted: programs that fill the chip.
    """
    whole = max(granule, ceil_div(time, granule) * granule)
    if rows >= enough or rows == 0:
        return whole
    segments = ceil_div(wanted, rows)
    least = max(granule, ceil_div(64, granule) * granule)
    return min(whole, max(least, ceil_div(ceil_div(time, segments), granule) * granule))
