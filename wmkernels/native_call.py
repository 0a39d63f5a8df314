"""The only place where a tensor becomes a pointer.

A kernel receives one structure of eight-byte members (``csrc/include/wmkernels.h``) as a flat tuple of integers: sizes,
and for each tensor its address and four strides. The extension knows the layout and makes that tuple; it checks every
tensor before its address leaves Python: dtype, shape, device, alignment. The caller holds the tensors until the kernel
returns.
"""

import os
from collections.abc import Callable, Sequence

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
        native.expect_large_pages(tensor.data_ptr(), tensor.nbytes)
    return (tensor if tensor.numel() else None, tensor.shape, tensor.dtype)


def words(op: str, members: Members, device: torch.device) -> tuple[int, ...]:
    """The structure of ``op`` as a flat tuple; members not given are 0 (absent tensors).

    Raises:
        ValueError: a tensor has not the shape, the dtype, the device or the alignment that the kernel expects.
    """
    flat: tuple[int, ...] = native.pack(op, members, device)
    return flat


def placement(device: torch.device) -> dict[str, int]:
    """Where and how to run: the thread count on a CPU, the current stream on a GPU."""
    if device.type == "cpu":
        return {"threads": torch.get_num_threads()}
    index = device.index if device.index is not None else torch.cuda.current_device()
    return {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}


def workspace(size: int, device: torch.device) -> tuple[int, Tensor]:
    """Scratch of ``size`` bytes, its address a multiple of 256, and the tensor that holds it."""
    scratch = torch.empty(size + 256, dtype=torch.uint8, device=device)
    return -(-scratch.data_ptr() // 256) * 256, scratch


def kernel(name: str, device: torch.device) -> Callable[[tuple[int, ...]], int]:
    """The extension's entry point of this name for tensors on ``device``."""
    return getattr(native, f"cpu_{name}" if device.type == "cpu" else f"cuda_{name}")


def launch(name: str, op: str, members: Members, device: torch.device) -> None:
    """Runs a kernel that needs no workspace, or has it among its members."""
    kernel(name, device)(words(op, members, device))
    if DEBUG and device.type == "cuda":
        torch.cuda.synchronize(device)


def call(name: str, op: str, members: Members, device: torch.device) -> None:
    """Runs a kernel with its workspace, which is held until the call returns.

    On a GPU the memory goes back to PyTorch's caching allocator then, which hands it out again on the same stream only.
    """
    members.update(placement(device))
    size = kernel(f"{name}_workspace", device)(words(op, members, device))
    members["workspace"], _scratch = workspace(size, device)
    launch(name, op, members, device)
