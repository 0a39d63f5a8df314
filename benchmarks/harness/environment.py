"""Hardware and software of a benchmark run."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
BASELINES = ("mambapy", "mamba_ssm", "accelerated_scan", "flash-linear-attention")
SOURCES = ("csrc", "python", "wmkernels", "benchmarks/*.py")
PACKAGES = ("torch", "transformers", "triton", "numpy", *BASELINES, "rich", "gymnasium", "popgym", "minigrid")
FLAG_PREFIXES = ("avx", "fma", "f16c", "sse4_2", "asimd", "sve", "neon", "fphp", "bf16", "amx")


def describe(device: torch.device) -> dict[str, Any]:
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "wmkernels": _wmkernels(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "WMKERNELS_", "KMP_"))},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        found["gpu"] = _gpu(device)
    return found


def processor(environment: dict[str, Any]) -> str:
    """Model, cores and widest vectors of the CPU."""
    cpu = environment["cpu"]
    widest = next((f for f in ("avx512f", "avx2", "sve", "asimd") if f in cpu["flags"]), "")
    return f"{cpu['model']}, {cpu['cores']} cores{', ' + widest if widest else ''}"


def summary(environment: dict[str, Any]) -> str:
    packages = environment["packages"]
    parts = [processor(environment)]
    if "gpu" in environment:
        gpu = environment["gpu"]
        parts = [f"{gpu['name']}, CUDA {gpu['cuda']}, driver {gpu['driver'] or 'unknown'}"]
    parts.append(f"torch {packages.get('torch', '?')}")
    if "gpu" in environment and "triton" in packages:
        parts.append(f"triton {packages['triton']}")
    ours = environment["wmkernels"]
    commit = f" at {ours['commit'][:10]}{' with changes' if ours['changed'] else ''}" if ours["commit"] else ""
    parts.append(f"wmkernels {ours['version']}{commit}")
    parts.append(environment["date"][:10])
    return "; ".join(parts)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wmkernels() -> dict[str, Any]:
    import wmkernels
    from wmkernels.dispatch import load_native

    native = load_native()
    return {
        "version": wmkernels.__version__,
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no", "--", *SOURCES)),
        "cpu_isa": native.cpu_isa() if native else None,
        "openmp": Path(native.openmp_library()).name if native and hasattr(native, "openmp_library") else None,
        "cuda_architectures": str(native.cuda_archs()) if native and hasattr(native, "cuda_archs") else None,
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = sorted(flag for flag in value.split() if flag.startswith(FLAG_PREFIXES))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"model": model, "cores": cores, "flags": flags, "machine": platform.machine()}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", f"--id={device.index or 0}", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": _output(*query, "--query-gpu=driver_version"),
        "clocks": _output(*query, "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"),
    }
