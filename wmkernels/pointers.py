"""The only place where a tensor becomes a pointer.

A kernel receives one structure of eight-byte members (``csrc/wmkernels.h``) as a flat tuple of integers: sizes, and for
each tensor its address and four strides. The layout comes from the extension itself, so the two cannot drift apart.
Every tensor is checked here before its address leaves Python: its dtype, its device, its shape, its alignment. The
caller holds the tensors until the kernel returns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wmkernels.dispatch import load_native

native = load_native()

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ABSENT = (0, 0, 0, 0, 0)
Members = dict[str, int | tuple[int, ...]]
_PADDING = {rank: (0,) * (4 - rank) for rank in range(5)}
_LAYOUTS: dict[str, list[tuple[str, int]]] = (
    {op: native.layout(op) for op in ("selective_scan", "selective_step", "linear_scan")} if native else {}
)


def view(
    op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[int, ...]:
    """Address and strides of ``tensor``, which must be None or have exactly this shape, dtype and device."""
    if tensor is None:
        return ABSENT
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{op}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, "
            f"the kernel expects {dtype} of shape {tuple(shape)} on {device}"
        )
    address = tensor.data_ptr()
    if address % dtype.itemsize:
        raise ValueError(f"{op}: {name} starts at an address that is no multiple of {dtype.itemsize} bytes")
    return (address, *tensor.stride(), *_PADDING[len(shape)])


def output(op: str, tensor: Tensor) -> tuple[int, ...]:
    """Address and strides of a tensor allocated for a kernel; absent where it has no elements."""
    return view(op, "output", tensor, tuple(tensor.shape), tensor.dtype, tensor.device) if tensor.numel() else ABSENT


def words(op: str, members: Members) -> tuple[int, ...]:
    """The structure of ``op`` as a flat tuple; members not given are 0 (absent tensors)."""
    flat: list[int] = []
    for name, size in _LAYOUTS[op]:
        value = members.get(name)
        if value is None:
            flat.extend((0,) * size)
        elif size == 1:
            flat.append(value)  # type: ignore[arg-type]
        else:
            flat.extend(value)  # type: ignore[arg-type]
    return tuple(flat)


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


def call(name: str, op: str, members: Members, device: torch.device) -> None:
    """Runs a kernel with its workspace, which is held until the call returns.

    On a GPU the memory goes back to PyTorch's caching allocator then, which hands it out again on the same stream only.
    """
    members.update(placement(device))
    size = kernel(f"{name}_workspace", device)(words(op, members))
    members["workspace"], _scratch = workspace(size, device)
    kernel(name, device)(words(op, members))
