"""The only place where a tensor becomes a pointer.

A kernel receives one structure (``csrc/include/wmkernels.h``): sizes, and the address and strides of each tensor. The
extension fills it once per call and checks every tensor: dtype, shape, device, alignment. The caller holds the tensors
until the kernel returns.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wmkernels.dispatch import load_native

native = load_native()

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

DEBUG = os.environ.get("WMKERNELS_DEBUG") == "1"  # wait for the GPU after every CUDA kernel
LARGE = 8 << 20  # bytes from which on the first write to fresh memory is dominated by its page faults

Expected = tuple[Tensor | None, Sequence[int], torch.dtype]
"""A tensor, or None where it is absent, and the shape and dtype that the kernel expects of it."""
Members = dict[str, int | Expected]


def output(tensor: Tensor) -> Expected:
    """A tensor allocated for a kernel; absent where it has no elements."""
    if tensor.is_cpu and tensor.nbytes >= LARGE:
        native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return (tensor if tensor.numel() else None, tensor.shape, tensor.dtype)


def stream_args(device: torch.device) -> dict[str, int]:
    """The thread count on a CPU, the device and its current stream on a GPU."""
    if device.type == "cpu":
        return {"threads": torch.get_num_threads()}
    index = device.index if device.index is not None else torch.cuda.current_device()
    return {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}


def pack_args(name: str, members: Members, device: torch.device) -> Any:
    """A prepared call of a kernel: ``workspace_bytes``, and ``run(address)`` with a workspace of that size.

    Members not given are 0 (absent tensors).

    Raises:
        ValueError: a tensor has not the shape, the dtype, the device or the alignment that the kernel expects.
    """
    return native.prepare(f"{device.type}_{name}", members, device)


def run(name: str, members: Members, device: torch.device) -> None:
    """Runs the kernel ``name`` on ``device``, with a workspace where it needs one.

    The workspace's address is a multiple of 256. It is held until the call returns; on a GPU PyTorch's caching
    allocator hands the memory out again on the same stream only.
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
