"""Peak memory of one call above the level before it.

CPU: peak resident set, which Linux can reset; free heap pages are released first, so that reused memory counts. GPU:
peak of PyTorch's allocator.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory, result included; None without /proc."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    _release_free_heap()
    try:
        CLEAR_REFS.write_text("5")  # resets the peak: proc(5)
        before = _resident("VmRSS")
    except OSError:
        work()
        return None
    result = work()
    peak = _resident("VmHWM")
    del result
    return max(0, peak - before)


def saved_bytes(run: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that autograd saves beyond ``known`` and the result; each storage counts once."""
    inputs = {x.untyped_storage().data_ptr() for x in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    kept.pop(out.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _resident(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")


def _release_free_heap() -> None:
    with contextlib.suppress(OSError, AttributeError):  # without glibc: a lower bound
        ctypes.CDLL(None).malloc_trim(0)
