"""Runs the PTX of the Triton kernels on the CPU against the float64 reference.

    python tests/triton/triton_compiled.py [--every N] [--arch 90] [GROUP ...]    every Nth case; default: all groups

emulator/ptx.py stops at any access outside the tensors. ptxas is not covered.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton_cases_delta  # noqa: F401 (registers its group)
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton_cases import Failures
from triton_cases_place import GROUPS

from emulator import ptx
from wmkernels import triton_runtime

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "scripts")]
from triton_resources import CompileOnly

PROGRAMS: dict[str, ptx.Program] = {}


def flat(value: Any) -> list[Any]:
    return [item for part in value for item in flat(part)] if isinstance(value, tuple) else [value]


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int, **options: Any) -> None:
    """Replaces triton_runtime.launch."""
    if programs == 0:
        return
    compiled = kernel.warmup(*arguments, grid=(1,), num_warps=num_warps, enable_fp_fusion=True, **options)
    code = compiled.asm["ptx"]
    if code not in PROGRAMS:
        PROGRAMS[code] = ptx.translate(code)
    memory, words = ptx.Memory(), []
    for (name, kind), argument in zip(compiled.src.signature.items(), arguments, strict=False):
        for part, value in zip(flat(kind), flat(argument), strict=True):
            if part == "constexpr":
                continue
            if isinstance(value, Tensor):
                memory.add(name, value)
                value = value.data_ptr()
            words.append(value)
    # Triton's own two scratch pointers, unused here.
    ptx.launch(PROGRAMS[code], memory, programs, compiled.metadata.shared, [*words, 0, 0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", choices=[[], *GROUPS])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth case of a group")
    parser.add_argument("--arch", type=int, default=90, help="compute capability to compile for, 90")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    triton.runtime.driver.set_active(CompileOnly(options.arch))
    triton_runtime.launch = launch
    CUDABackend.make_cubin = lambda *_: b"not assembled"
    failures = Failures()
    for group in options.groups or GROUPS:
        check, cases = GROUPS[group]
        for case in cases[:: options.every]:
            try:
                check(case, failures)
            except ptx.Fault as fault:
                failures.lines.append(f"{case}: {fault}")
    print(*failures.lines, f"{failures.cases} cases, {len(PROGRAMS)} kernels", sep="\n")
    return 1 if failures.lines else 0


if __name__ == "__main__":
    sys.exit(main())
