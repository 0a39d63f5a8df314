"""Calls native kernels with argument structures (``csrc/include/wmkernels.h``).

The extension checks dtype, shape, device and alignment; callers keep tensors alive.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wmkernels.dispatch import load_native

native = load_native()

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

DEBUG = os.environ.get("WMKERNELS_DEBUG") == "1"  # synchronise after every CUDA kernel
LARGE = 8 << 20  # bytes; above, page faults dominate

Expected = tuple[Tensor | None, Sequence[int], torch.dtype]
"""A tensor or None, its expected shape and dtype."""
Members = dict[str, int | Expected]


def output(tensor: Tensor) -> Expected:
    """A kernel's output; asks for huge pages if it is large and on a CPU."""
    if tensor.is_cpu and tensor.nbytes >= LARGE:
        native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return (tensor if tensor.numel() else None, tensor.shape, tensor.dtype)


def stream_args(device: torch.device) -> dict[str, int]:
    """CPU threads, or GPU device and stream."""
    if device.type == "cpu":
        return {"threads": torch.get_num_threads()}
    index = device.index if device.index is not None else torch.cuda.current_device()
    return {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}


def pack_args(name: str, members: Members, device: torch.device) -> Any:
    """A prepared call. Raises ValueError for a wrong dtype, shape, device or alignment, and for freed memory."""
    return native.prepare(f"{device.type}_{name}", members, device)


def run(name: str, members: Members, device: torch.device) -> None:
    """Runs a kernel in a 256-byte-aligned workspace; errors of ``pack_args``.

    Freed while the kernel may still run: the caching allocator reuses it only on the same stream, after the kernel.
    """
    members.update(stream_args(device))
    call = pack_args(name, members, device)
    size = call.workspace_bytes
    if size:
        workspace = torch.empty(size + 256, dtype=torch.uint8, device=device)
        call.run(-(-workspace.data_ptr() // 256) * 256)
    else:
        call.run()
    if DEBUG and device.type == "cuda":
        torch.cuda.synchronize(device)
