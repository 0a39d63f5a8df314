"""Finds nvcc and chooses GPU architectures; needs no GPU."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .toolchain import BuildError, Compiler, Prober, run_tool

DEFAULT_ARCHITECTURES = ("80", "90", "100", "120")
USUAL_PLACE = "/usr/local/cuda/bin/nvcc"
PROBE_CU = (
    "#include <cmath>\n__global__ void f(float* x) { x[threadIdx.x] = expf(x[0]); }\nint main() { f<<<1, 1>>>(0); }\n"
)

Run = Callable[[Sequence[str]], tuple[bool, str]]


@dataclass(frozen=True)
class Cuda:
    """A working nvcc; architectures oldest first."""

    nvcc: str
    version: str
    architectures: tuple[str, ...]

    @property
    def code_flags(self) -> tuple[str, ...]:
        """Machine code per architecture, and PTX of the newest for later GPUs."""
        newest = self.architectures[-1]
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures[:-1]]
        return (*flags, f"-gencode=arch=compute_{newest},code=[sm_{newest},compute_{newest}]")


def find_nvcc(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The path, or None and the reason."""
    named = environ.get("WMKERNELS_NVCC")
    if named:
        path = shutil.which(named, path=environ.get("PATH"))
        return (path, "") if path else (None, f"WMKERNELS_NVCC={named} is not a program")
    home = environ.get("CUDA_HOME")
    looked = [str(Path(home, "bin", "nvcc"))] if home else []
    for candidate in [*looked, "nvcc", USUAL_PLACE]:
        path = shutil.which(candidate, path=environ.get("PATH"))
        if path:
            return path, ""
    return None, f"nvcc not found in WMKERNELS_NVCC, CUDA_HOME, PATH or {USUAL_PLACE}"


def _order(architecture: str) -> tuple[int, str]:
    digits = re.match(r"\d+", architecture)
    return (int(digits.group()) if digits else 0, architecture)


def choose_architectures(environ: Mapping[str, str], listed: set[str]) -> tuple[str, ...]:
    """WMKERNELS_CUDA_ARCHS, or the defaults that nvcc supports."""
    named = [part.replace(".", "") for part in re.split(r"[,;\s]+", environ.get("WMKERNELS_CUDA_ARCHS", "")) if part]
    for architecture in named:
        # nvcc lists 90, accepts 90a
        if architecture.rstrip("af") not in listed:
            known = ", ".join(sorted(listed, key=_order))
            raise BuildError(f"WMKERNELS_CUDA_ARCHS names {architecture!r}; this nvcc compiles for {known}")
    return tuple(sorted(set(named) or listed.intersection(DEFAULT_ARCHITECTURES), key=_order))


def find_cuda(
    environ: Mapping[str, str], compiler: Compiler, prober: Prober, has_sources: bool, run: Run = run_tool
) -> tuple[Cuda | None, str]:
    """The CUDA toolchain, or None and the reason.

    Raises:
        BuildError: WMKERNELS_CUDA=1 without working CUDA, or an invalid setting.
    """
    asked = environ.get("WMKERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        raise BuildError(f"WMKERNELS_CUDA is {asked!r}; expected 0 (never), 1 (or fail), or unset (if it works)")
    if asked == "0":
        return None, "WMKERNELS_CUDA=0"
    cuda, reason = _try_nvcc(environ, compiler, prober, run) if has_sources else (None, "no CUDA sources in csrc/cuda")
    if cuda is None and asked == "1":
        raise BuildError(f"WMKERNELS_CUDA=1, but CUDA cannot be built: {reason}")
    return cuda, reason


def _try_nvcc(environ: Mapping[str, str], compiler: Compiler, prober: Prober, run: Run) -> tuple[Cuda | None, str]:
    nvcc, reason = find_nvcc(environ)
    if nvcc is None:
        return None, reason
    works, banner = run([nvcc, "--version"])
    release = re.search(r"release ([\d.]+)", banner)
    if not works or release is None:
        return None, f"{nvcc} --version does not work"
    works, listing = run([nvcc, "--list-gpu-arch"])
    listed = set(re.findall(r"compute_(\w+)", listing)) if works else set()
    architectures = choose_architectures(environ, listed)
    if not architectures:
        return None, f"{nvcc} compiles for none of the architectures {', '.join(DEFAULT_ARCHITECTURES)}"
    cuda = Cuda(nvcc, release.group(1), architectures)
    newest = architectures[-1]
    command = [nvcc, *host_flags(compiler), f"-arch=sm_{newest}", "-cudart=static"]
    failure = prober.failure(command, PROBE_CU, ".cu", compiler.version + banner)
    return (cuda, "") if not failure else (None, f"{nvcc} does not work: {failure}")


def host_flags(compiler: Compiler) -> tuple[str, ...]:
    """Make nvcc use the C++ compiler (the last word of `ccache g++`)."""
    return ("-std=c++17", f"-ccbin={compiler.command[-1]}")
