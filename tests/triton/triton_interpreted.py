"""Runs one group of the Triton kernels in Triton's interpreter; start with TRITON_INTERPRET=1.

The variable must be set before a kernel is defined. Setting it here would affect all kernels of a pytest process, which
imports this module for doctests. An access out of bounds ends the process. Scans and reductions combine whole arrays in
a logarithmic number of passes: scalar by scalar they take minutes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton_cases_conv1d  # noqa: F401 (registers its group)
import triton_cases_delta  # noqa: F401 (registers its group)
import triton_cases_ssd  # noqa: F401 (registers its group)
from triton.runtime import interpreter
from triton_cases import Case, Failures, draw
from triton_cases_place import GROUPS

from wmkernels.linear_scan import triton_kernels as linear
from wmkernels.selective_scan import triton_kernels as selective
from wmkernels.selective_scan.meta import ScanInputs


def _combine(self: Any, first: list[np.ndarray], second: list[np.ndarray], like: Any) -> list[np.ndarray]:
    """The combine function on whole arrays."""
    tensors = [self.to_tensor(x, y.dtype) for x, y in zip((*first, *second), (*like, *like), strict=True)]
    combined = self.combine_fn.fn(*tensors)
    found = combined if isinstance(combined, tuple) else (combined,)
    return [self.to_tensor(x.handle.data, y.dtype).handle.data for x, y in zip(found, like, strict=True)]


def scan_by_doubling(self: Any, arrays: Any) -> list[Any]:
    """After pass k, entry i holds the combination of the last 2^k entries up to i."""
    data = [x.handle.data for x in arrays]
    size, distance = data[0].shape[self.axis], 1
    while distance < size:
        combined = _combine(self, [np.roll(x, distance, self.axis) for x in data], data, arrays)
        inside = np.arange(size).reshape(-1, *[1] * (data[0].ndim - 1 - self.axis)) >= distance
        data = [np.where(inside, new, old) for new, old in zip(combined, data, strict=True)]
        distance *= 2
    return [self.to_tensor(x, y.dtype) for x, y in zip(data, arrays, strict=True)]


def reduce_by_halving(self: Any, arrays: Any) -> list[Any]:
    """Each pass combines neighbours; their order is kept."""
    data = [x.handle.data for x in arrays]
    while data[0].shape[self.axis] > 1:
        halves = [[np.take(x, range(start, x.shape[self.axis], 2), self.axis) for x in data] for start in (0, 1)]
        data = _combine(self, *halves, arrays)
    return [self.to_tensor(np.take(x, 0, self.axis), y.dtype) for x, y in zip(data, arrays, strict=True)]


def patch_tensor(*arguments: Any) -> None:
    """NumPy 2.4 refuses one-element tensors from Triton before 3.7 as numbers."""
    OWN_PATCH(*arguments)
    tensor = arguments[0]
    tensor.__index__ = lambda self: int(self.handle.data.item())
    tensor.__bool__ = lambda self: bool(self.handle.data.all()) if self.handle.data.size == 1 else True


OWN_PATCH = interpreter._patch_lang_tensor


@contextmanager
def patched_language() -> Iterator[None]:
    """Patches ``triton.language`` once: Triton does so for every call of every function, a third of the time."""
    if not hasattr(interpreter, "_LangPatchScope"):  # before Triton 3.7
        yield
        return
    own = interpreter._patch_lang
    scopes = [own(function) for function in (linear.scan_kernel.fn, tl.standard.sum.fn)]  # sees tl; sees tl.core
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
    try:
        yield
    finally:
        interpreter._patch_lang = own
        for scope in reversed(scopes):
            scope.restore()


@contextmanager
def interpreter_of(whole_arrays: bool) -> Iterator[None]:
    """Runs scans and reductions on whole arrays, or by scalars as Triton does."""
    scan, reduction = interpreter.ScanOps, interpreter.ReduceOps
    own = scan.generic_scan, reduction.generic_reduce
    if whole_arrays:
        scan.generic_scan, reduction.generic_reduce = scan_by_doubling, reduce_by_halving
    interpreter._patch_lang_tensor = patch_tensor
    try:
        with patched_language():
            yield
    finally:
        scan.generic_scan, reduction.generic_reduce = own
        interpreter._patch_lang_tensor = OWN_PATCH


def require_interpreter() -> None:
    if not isinstance(linear.scan_kernel, interpreter.InterpretedFunction):
        raise SystemExit("run this program with TRITON_INTERPRET=1")


def check_interpreter(_: Case, failures: Failures) -> None:
    for case in ({"reset": 0.3, "time": 8, "channels": 1, "batch": 1}, {"time": 8, "channels": 1, "batch": 1}):
        inputs = draw(case, torch.Generator().manual_seed(1))
        scan = ScanInputs(**inputs, delta_softplus=True)
        results = []
        for whole_arrays in (True, False):
            with interpreter_of(whole_arrays):
                out = selective.forward(scan, 4, segment_length=4)
                grad = torch.ones_like(inputs["u"])
                results.append((*out, *selective.backward(grad, None, scan, out[2], 4, segment_length=4)))
        failures.cases += 1
        for fast, slow in zip(*results, strict=True):
            failures.check(case, "the faster interpretation", fast, slow.double())


GROUPS["interpreter"] = (check_interpreter, [{}])


def main(group: str) -> int:
    require_interpreter()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    check, cases = GROUPS[group]
    failures = Failures()
    with interpreter_of(whole_arrays=True):
        for case in cases:
            check(case, failures)
    print(*failures.lines, f"{failures.cases} cases", sep="\n")
    return 1 if failures.lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
