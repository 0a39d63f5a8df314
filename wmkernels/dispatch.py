"""Which backend runs a call, and the reasons why the others cannot.

Every backend answers with a list of reasons why it cannot run an op on a device; an empty list means that it can. The
first backend in ``BACKENDS`` without reasons runs. A backend asked for by name, with ``backend=`` or
``WMKERNELS_BACKEND`` (read once, at import), runs or raises: nothing is ever chosen in its stead.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = ("selective_scan", "selective_step", "linear_scan", "conv_lstm")
# An op's entry point in the extension.
ENTRY_POINTS = {
    "selective_scan": "selective_scan_forward",
    "selective_step": "selective_step",
    "linear_scan": "linear_scan_forward",
    "conv_lstm": "conv_lstm_forward",
}
# Where an op's CUDA kernels have another module or another entry point than its C++ kernels.
CUDA_MODULES = {"conv_lstm": "cuda_kernels"}
CUDA_ENTRY_POINTS = {**ENTRY_POINTS, "conv_lstm": "conv_lstm_update_forward"}
MAX_STATE = 256

REQUESTED = os.environ.get("WMKERNELS_BACKEND") or None


@functools.cache
def load_native() -> Any:
    """The compiled extension, or None where it was not built, on the instruction set that ``WMKERNELS_CPU_ISA`` names.

    torch is imported first: one OpenMP runtime is loaded.
    """
    try:
        native = importlib.import_module("wmkernels._native")
    except ModuleNotFoundError:
        return None
    level = os.environ.get("WMKERNELS_CPU_ISA")
    if level:
        try:
            native.cpu_set_isa(level)
        except ValueError as error:
            raise ValueError(f"WMKERNELS_CPU_ISA={level}: {error}") from None
    return native


@functools.cache
def kernels(package: str, backend: str) -> ModuleType:
    """The module that hands tensors to a backend's kernels."""
    modules = {"triton": "triton_kernels", "cuda": CUDA_MODULES.get(package, "native")}
    return importlib.import_module(f"wmkernels.{package}.{modules.get(backend, 'native')}")


def reasons(op: str, backend: str, device: torch.device, state: int = 1) -> list[str]:
    """Why ``backend`` cannot run ``op`` on ``device`` with this state size; empty when it can."""
    found = list(_device_reasons(op, backend, device.type, device.index))
    if backend != "reference" and state > MAX_STATE:
        found.append(f"its kernels hold at most {MAX_STATE} states a channel, this call has {state}")
    return found


@functools.cache
def _device_reasons(op: str, backend: str, device_type: str, device_index: int | None) -> tuple[str, ...]:
    if op not in OPS:
        return (f"there is no op {op!r}; the ops are {', '.join(OPS)}",)
    if backend == "reference":
        return ()
    if backend == "cpu":
        return _cpu_reasons(op, device_type)
    if backend == "triton":
        return _triton_reasons(op, device_type)
    if backend == "cuda":
        return _cuda_reasons(op, device_type, device_index)
    return (f"there is no backend {backend!r}; the backends are {', '.join(BACKENDS)}",)


def _cpu_reasons(op: str, device_type: str) -> tuple[str, ...]:
    if device_type != "cpu":
        return (f"the tensors are on {device_type}, it runs on cpu",)
    native = load_native()
    if native is None:
        return ("the C++ extension was not built (python -m wmkernels.info says why)",)
    if f"cpu_{ENTRY_POINTS[op]}" not in native.kernels:
        return (f"this build holds no C++ kernel for {op}: install it again",)
    return ()


def _triton_reasons(op: str, device_type: str) -> tuple[str, ...]:
    found = []
    if device_type != "cuda":
        found.append(f"the tensors are on {device_type}, it runs on a GPU")
    if importlib.util.find_spec("triton") is None:
        found.append("the package triton is not installed")
    if importlib.util.find_spec(f"wmkernels.{op}.triton_kernels") is None:
        found.append(f"this version has no Triton kernel for {op}")
    return tuple(found)


def _cuda_reasons(op: str, device_type: str, device_index: int | None) -> tuple[str, ...]:
    found = []
    if device_type != "cuda":
        found.append(f"the tensors are on {device_type}, it runs on an NVIDIA GPU")
    native = load_native()
    if native is None:
        found.append("the C++ extension was not built (python -m wmkernels.info says why)")
    elif f"cuda_{CUDA_ENTRY_POINTS[op]}" not in native.kernels:
        found.append(f"this build holds no CUDA kernels for {op} (python -m wmkernels.info says why)")
    elif device_type == "cuda":
        unavailable = native.cuda_unavailable_reason(device_index or 0)
        if unavailable:
            found.append(unavailable)
    return tuple(found)


@functools.cache
def _default_backend(op: str, device_type: str, device_index: int | None) -> str:
    return next(b for b in BACKENDS if not _device_reasons(op, b, device_type, device_index))


@torch.compiler.assume_constant_result
def _choose(op: str, device_type: str, device_index: int | None, requested: str | None, too_many: int) -> str:
    if requested is None:
        if too_many:
            return "reference"
        return _default_backend(op, device_type, device_index)
    found = {b: _device_reasons(op, b, device_type, device_index) for b in dict.fromkeys((*BACKENDS, requested))}
    if too_many:
        for name in ("cuda", "triton", "cpu"):
            found[name] = (
                *found[name],
                f"its kernels hold at most {MAX_STATE} states a channel, this call has {too_many}",
            )
    if not found[requested]:
        return requested
    device = device_type if device_index is None else f"{device_type}:{device_index}"
    lines = [f"{op}: backend {requested!r} cannot run this call (tensors on {device}):"]
    for name, why in found.items():
        lines.append(f"  {name}: {'; '.join(why) if why else 'can run it'}")
    raise ValueError("\n".join(lines))


def choose(op: str, device: torch.device, requested: str | None = None, state: int = 1) -> str:
    """The backend that runs this call.

    Args:
        op: one of ``OPS``.
        device: where the tensors are.
        requested: the ``backend=`` argument; ``WMKERNELS_BACKEND`` counts where it is None.
        state: states a channel.

    Raises:
        ValueError: the backend asked for cannot run it; the message lists every backend's reasons.
    """
    # torch.compile may keep the size symbolic, and nothing symbolic may go into what it is to take as a constant.
    return _choose(op, device.type, device.index, requested or REQUESTED, state if state > MAX_STATE else 0)
