"""Backend selection.

The first capable backend of ``BACKENDS`` runs; a GPU backend also needs one architecture in ``OpSpec.verified``, not
necessarily this GPU's. ``backend=`` or ``WMKERNELS_BACKEND`` (read at import) runs that backend or raises.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

from wmkernels.modes import ONNX
from wmkernels.registry import OPS, op_names

BACKENDS = ("cuda", "triton", "cpu", "chunked", "reference")
GPU_BACKENDS = ("cuda", "triton")
PYTORCH_BACKENDS = ("chunked", "reference")
UNVERIFIED = "it was not held against the reference on any GPU yet, so it runs only when asked for by name"

REQUESTED = os.environ.get("WMKERNELS_BACKEND") or None


@functools.cache
def load_native() -> Any:
    """The extension, or None if not built."""
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
def kernels(op: str, backend: str) -> ModuleType:
    """The op's kernel module."""
    return importlib.import_module(f"wmkernels.{op}.{'triton_kernels' if backend == 'triton' else 'native'}")


def is_verified(op: str, backend: str) -> bool:
    """Whether automatic dispatch may use it."""
    return backend not in GPU_BACKENDS or bool(OPS[op].verified.get(backend))


def reasons(op: str, backend: str, device: torch.device, state: int = 1) -> list[str]:
    """Why ``backend`` cannot run ``op``; empty if it can."""
    found = list(_device_reasons(op, backend, device.type, device.index))
    limit = OPS[op].max_state if op in OPS else None
    if limit is not None and state > limit and backend not in PYTORCH_BACKENDS:
        found.append(f"its kernels hold at most {limit} states a channel, this call has {state}")
    return found


@functools.cache
def _device_reasons(op: str, backend: str, device_type: str, device_index: int | None) -> tuple[str, ...]:
    if op not in OPS:
        return (f"there is no op {op!r}; the ops are {', '.join(op_names())}",)
    if backend in PYTORCH_BACKENDS:
        return ()
    if device_type == "meta" and backend in BACKENDS:
        return ()  # shapes alone, which all kernels share
    if backend == "cpu":
        return _cpu_reasons(op, device_type)
    if backend == "triton":
        return _triton_reasons(op, device_type)
    if backend == "cuda":
        return _cuda_reasons(op, device_type, device_index)
    return (f"there is no backend {backend!r}; the backends are {', '.join(BACKENDS)}",)


def _has_kernels(native: Any, device: str, op: str) -> bool:
    return any(name == f"{device}_{op}" or name.startswith(f"{device}_{op}_") for name in native.kernels)


def _cpu_reasons(op: str, device_type: str) -> tuple[str, ...]:
    if device_type != "cpu":
        return (f"the tensors are on {device_type}, it runs on cpu",)
    native = load_native()
    if native is None:
        return ("the C++ extension was not built (python -m wmkernels.info says why)",)
    if not _has_kernels(native, "cpu", op):
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
    elif not _has_kernels(native, "cuda", op):
        found.append(f"this build holds no CUDA kernels for {op} (python -m wmkernels.info says why)")
    elif device_type == "cuda":
        unavailable = native.cuda_unavailable_reason(device_index or 0)
        if unavailable:
            found.append(unavailable)
    return tuple(found)


@functools.cache
def _default_backend(op: str, device_type: str, device_index: int | None, state: int) -> str:
    device = torch.device(device_type, device_index) if device_index is not None else torch.device(device_type)
    return next(b for b in BACKENDS if is_verified(op, b) and not reasons(op, b, device, state))


@torch.compiler.assume_constant_result
def _choose(
    op: str,
    device_type: str,
    device_index: int | None,
    requested: str | None,
    large_state: int,
    function: str,
    pytorch_for: str,
) -> str:
    if pytorch_for and (requested is None or requested in BACKENDS):
        return _choose_pytorch(function, requested, pytorch_for)
    if requested is None:
        return _default_backend(op, device_type, device_index, large_state)
    if not large_state and not _device_reasons(op, requested, device_type, device_index):
        return requested  # cached: a step takes microseconds
    device = torch.device(device_type) if device_index is None else torch.device(device_type, device_index)
    found = {b: reasons(op, b, device, large_state) for b in dict.fromkeys((*BACKENDS, requested))}
    if not found[requested]:
        return requested
    lines = [f"{function}: backend {requested!r} cannot run this call (tensors on {device}):"]
    for name, why in found.items():
        can_run = "can run it" if is_verified(op, name) else f"can run it; {UNVERIFIED}"
        lines.append(f"  {name}: {'; '.join(why) if why else can_run}")
    raise ValueError("\n".join(lines))


def _choose_pytorch(function: str, requested: str | None, pytorch_for: str) -> str:
    if requested is None:
        # The TorchScript exporter translates the movedim of the chunked scan to a permutation that is none.
        return "reference" if pytorch_for == ONNX else "chunked"
    if requested in PYTORCH_BACKENDS:
        return requested
    raise RuntimeError(
        f"{function}: {pytorch_for} is not implemented by the compiled kernels of backend {requested!r}; "
        'use backend="reference", or none, which then runs plain PyTorch'
    )


def choose(
    op: str,
    device: torch.device,
    requested: str | None = None,
    state: int = 1,
    function: str | None = None,
    pytorch_for: str = "",
) -> str:
    """Selects a call's backend.

    Args:
        op: name.
        device: of its tensors.
        requested: its ``backend=``.
        state: states per channel.
        function: the public name, in errors.
        pytorch_for: what makes PyTorch's own operators necessary, as ``modes.requires_pytorch`` returns it.

    Raises:
        ValueError: the requested backend cannot run; lists all reasons.
        RuntimeError: the requested backend is compiled, and ``pytorch_for`` excludes those.
    """
    # The cached choice must not depend on a symbolic size.
    limit = OPS[op].max_state
    large_state = state if limit is not None and state > limit else 0
    requested = REQUESTED if requested is None else requested
    return _choose(op, device.type, device.index, requested, large_state, function or op, pytorch_for)
