"""Installation report: ``python -m wmkernels.info [--json]``."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from wmkernels import dispatch
from wmkernels.registry import OPS, op_names

ENVIRONMENT = {
    "WMKERNELS_BACKEND": "backend that every call uses, instead of the best that can run it",
    "WMKERNELS_CPU_ISA": "instruction-set level that the CPU kernels use, instead of the best there is",
    "WMKERNELS_DEBUG": "1: wait for the GPU after every CUDA kernel, so that an error shows where it happened",
    "WMKERNELS_PERSISTENT": "1: small 16-bit maps of conv_lstm take all their steps in one CUDA kernel",
    "OMP_NUM_THREADS": "threads that PyTorch starts with; torch.set_num_threads counts for the kernels too",
    "WMKERNELS_CUDA": "build: 0 never builds the CUDA kernels, 1 fails where they cannot be built",
    "WMKERNELS_REQUIRE_NATIVE": "build: 1 fails where there is no extension, or a kernel does not compile",
    "WMKERNELS_CUDA_ARCHS": "build: GPU architectures, as 80,90",
    "WMKERNELS_NVCC": "build: the nvcc to use",
    "CUDA_HOME": "build: where CUDA is",
    "CXX": "build: the C++ compiler",
    "CXXFLAGS": "build: more flags for it",
    "LDFLAGS": "build: more flags for the linker",
    "MAX_JOBS": "build: how many compilers run at a time",
}
DEFAULT_ARCHITECTURES = (80, 90, 100, 120)
BUILD_AGAIN = (
    "with a compiler: pip install --force-reinstall --no-deps --no-cache-dir, since pip's cache keeps this build"
)
NO_BUILD_INFO = "no record of a build in the package: it was not installed with pip"


def version_of(package: str) -> str:
    """Installed version, or empty."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def build_info() -> dict[str, Any]:
    """The build record."""
    path = Path(__file__).with_name("_build_info.json")
    if not path.exists():
        return {"extension": "", "extension_reason": NO_BUILD_INFO}
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def openmp_runtimes() -> list[str]:
    """OpenMP libraries loaded in this process (Linux): two of them oversubscribe the processors."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count("/")}
    return sorted(path for path in paths if re.match(r"lib(gomp|omp|iomp)\d*\b", Path(path).name))


def gpu_info() -> dict[str, Any]:
    """Driver and GPUs."""
    record = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+\.\d+(\.\d+)?", record.read_text()) if record.exists() else None
    if torch.cuda.is_available():
        indices = range(torch.cuda.device_count())
        names = [
            f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in indices
        ]
        reason = ""
    else:
        names = []
        built = torch.version.cuda or torch.version.hip
        reason = "PyTorch finds no GPU" if built else "this PyTorch was built without GPU support"
    return {"driver": driver.group() if driver else "", "gpus": names, "reason": reason}


def backend_reasons(build: dict[str, Any], gpu_reason: str) -> dict[str, dict[str, list[str]]]:
    """Per op and backend."""
    why_not_built = build["extension_reason"] or build["cuda_reason"]
    table: dict[str, dict[str, list[str]]] = {}
    for op in op_names():
        table[op] = {}
        for backend in dispatch.BACKENDS:
            on_gpu = backend in ("triton", "cuda")
            found = [gpu_reason] if on_gpu and gpu_reason else []
            device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
            found += dispatch.reasons(op, backend, device)
            table[op][backend] = [
                reason.replace("python -m wmkernels.info says why", why_not_built) for reason in found
            ]
    return table


def gpu_verification(build: dict[str, Any]) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Per op and GPU backend, built architectures by verification."""
    built = [int(architecture) for architecture in build.get("cuda_architectures") or DEFAULT_ARCHITECTURES]
    table: dict[str, dict[str, dict[str, list[str]]]] = {}
    for op in op_names():
        table[op] = {}
        for backend in dispatch.GPU_BACKENDS:
            tried = OPS[op].verified.get(backend, ())
            untried = [f"sm_{architecture}" for architecture in built if architecture not in tried]
            table[op][backend] = {"tried": [f"sm_{a}" for a in tried], "untried": untried}
    return table


def collect() -> dict[str, Any]:
    """The report as JSON types."""
    native = dispatch.load_native()
    build, gpu = build_info(), gpu_info()
    return {
        "versions": {
            "wmkernels": version_of("wmkernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "numpy": version_of("numpy"),
            "platform": platform.platform(),
        },
        "build": build,
        "gpu": gpu,
        "backends": backend_reasons(build, gpu["reason"]),
        "gpu_verification": gpu_verification(build),
        "instruction_sets": {
            "available": native.cpu_isa_available().split(",") if native else [],
            "in_use": native.cpu_isa() if native else "",
        },
        "openmp": {"in_use": native.openmp_library() if native else "", "loaded": openmp_runtimes()},
        "threads": {"torch": torch.get_num_threads(), "processors": os.cpu_count()},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def _build_lines(build: dict[str, Any]) -> list[str]:
    if not build["extension"]:
        return [f"extension     not built: {build['extension_reason']}", f"              {BUILD_AGAIN}"]
    architectures = ", ".join(f"sm_{architecture}" for architecture in build["cuda_architectures"])
    lines = [
        f"extension     {build['extension']}",
        f"C++ compiler  {build['compiler']} ({build['compiler_version']})",
        "OpenMP        " + ("yes" if build["openmp"] else f"no, one thread only: {build['openmp_reason']}"),
        f"CPU kernels   {', '.join(build['cpu_levels'])}",
        *(f"              not {level}: {reason}" for level, reason in build["cpu_levels_missing"].items()),
        "CUDA kernels  " + (architectures if build["cuda"] else f"not built: {build['cuda_reason']}"),
    ]
    return lines + ([f"nvcc          {build['nvcc']} ({build['nvcc_version']})"] if build["nvcc"] else [])


def _trust(verification: dict[str, list[str]]) -> str:
    if not verification["tried"]:
        return "not held against the reference on any GPU: runs only when asked for by name"
    text = f"held against the reference on {', '.join(verification['tried'])}"
    return text + (f"; not tried on {', '.join(verification['untried'])}" if verification["untried"] else "")


def text(info: dict[str, Any]) -> str:
    """The report as text."""
    gpu, openmp, sets = info["gpu"], info["openmp"], info["instruction_sets"]
    sections = {
        "versions": [f"{name:<12}  {version or 'not installed'}" for name, version in info["versions"].items()],
        "built": _build_lines(info["build"]),
        "GPU": [
            f"driver        {gpu['driver'] or 'none found'}",
            *(f"GPU {index}         {name}" for index, name in enumerate(gpu["gpus"])),
            *([gpu["reason"]] if gpu["reason"] else []),
        ],
        "CPU": [
            f"instructions  {sets['in_use'] or 'none'} in use; available: {', '.join(sets['available']) or 'none'}",
            f"threads       {info['threads']['torch']} (processors: {info['threads']['processors']})",
            f"OpenMP        {openmp['in_use'] or 'not used'}",
            *(f"              {path} is loaded" for path in openmp["loaded"] if path != openmp["in_use"]),
        ],
    }
    for op, backends in info["backends"].items():
        rows = []
        for name, reasons in backends.items():
            row = f"{name:<12}  {'; '.join(reasons) or 'can run'}"
            if name in info["gpu_verification"][op]:
                row += f" ({_trust(info['gpu_verification'][op][name])})"
            rows.append(row)
        sections[f"{op} on the backend"] = rows
    width = max(map(len, ENVIRONMENT))
    sections["environment"] = [
        f"{name:<{width}}  {'unset' if value is None else '= ' + value}  ({ENVIRONMENT[name]})"
        for name, value in info["environment"].items()
    ]
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(prog="python -m wmkernels.info", description="What wmkernels is and can do here.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    info = collect()
    print(json.dumps(info, indent=2) if parser.parse_args().json else text(info))


if __name__ == "__main__":
    main()
