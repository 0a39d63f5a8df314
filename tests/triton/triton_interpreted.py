"""Runs one group of the Triton kernels in Triton's interpreter; start with TRITON_INTERPRET=1.

The variable must be set before a kernel is defined. Setting it here would affect all kernels of a pytest process, which
imports this module for doctests. An access out of bounds ends the process. Scans and reductions run one slice at a
time, because scalar by scalar they take minutes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton_cases import GROUPS, Case, Failures, draw

from wmkernels.linear_scan import triton_kernels as linear
from wmkernels.selective_scan import triton_kernels as selective
from wmkernels.selective_scan.meta import ScanInputs


def _slices(self: Any, arrays: list[Any], axis: int, index: int) -> tuple[Any, ...]:
    return tuple(self.to_tensor(np.take(x.handle.data, index, axis), x.dtype) for x in arrays)


def _fold(self: Any, arrays: Any, axis: int) -> Iterator[tuple[Any, ...]]:
    total = _slices(self, arrays, axis, 0)
    yield total
    for index in range(1, arrays[0].handle.data.shape[axis]):
        total = self.combine_fn.fn(*total, *_slices(self, arrays, axis, index))
        yield total


def scan_by_slices(self: Any, arrays: Any) -> list[Any]:
    steps = list(_fold(self, arrays, self.axis))
    columns = [[step[i].handle.data for step in steps] for i in range(len(arrays))]
    return [self.to_tensor(np.stack(c, self.axis), x.dtype) for c, x in zip(columns, arrays, strict=True)]


def reduce_by_slices(self: Any, arrays: Any) -> list[Any]:
    *_, total = _fold(self, arrays, self.axis)
    return [self.to_tensor(value.handle.data, x.dtype) for value, x in zip(total, arrays, strict=True)]


def patch_tensor(*arguments: Any) -> None:
    """NumPy 2.4 refuses one-element tensors from Triton before 3.7 as numbers."""
    OWN_PATCH(*arguments)
    tensor = arguments[0]
    tensor.__index__ = lambda self: int(self.handle.data.item())
    tensor.__bool__ = lambda self: bool(self.handle.data.all()) if self.handle.data.size == 1 else True


OWN_PATCH = interpreter._patch_lang_tensor


@contextmanager
def interpreter_of(slices: bool) -> Iterator[None]:
    """Runs scans and reductions by slices, or by scalars as Triton does."""
    scan, reduction = interpreter.ScanOps, interpreter.ReduceOps
    own = scan.generic_scan, reduction.generic_reduce
    if slices:
        scan.generic_scan, reduction.generic_reduce = scan_by_slices, reduce_by_slices
    interpreter._patch_lang_tensor = patch_tensor
    try:
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
        for slices in (True, False):
            with interpreter_of(slices):
                out = selective.forward(scan, 4, segment_length=4)
                grad = torch.ones_like(inputs["u"])
                results.append((*out, *selective.backward(grad, None, scan, out[2], 4, segment_length=4)))
        failures.cases += 1
        if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
            failures.lines.append(f"{case}: the faster interpretation differs")


GROUPS["interpreter"] = (check_interpreter, [{}])


def main(group: str) -> int:
    require_interpreter()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    check, cases = GROUPS[group]
    failures = Failures()
    with interpreter_of(slices=True):
        for case in cases:
            check(case, failures)
    print(*failures.lines, f"{failures.cases} cases", sep="\n")
    return 1 if failures.lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
