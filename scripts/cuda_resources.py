"""Tabulates registers, spills and shared memory of the CUDA kernels.

Needs nvcc, no GPU.

    python scripts/cuda_resources.py              writes docs/cuda_resources.json and docs/cuda_resources.md
    python scripts/cuda_resources.py --check      fails if they differ or a kernel spills
    python scripts/cuda_resources.py --check --arch 90 --only linear_scan
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from source_digest import digest as source_digest  # noqa: E402

from build_tools.cuda import DEFAULT_ARCHITECTURES, find_nvcc  # noqa: E402
from build_tools.ninja_file import NVCC_FLAGS  # noqa: E402

CUDA = ROOT / "csrc" / "cuda"
TABLE = ROOT / "docs" / "cuda_resources.json"
Resources = dict[str, int]
Kernels = dict[str, Resources]


def sources() -> list[Path]:
    return sorted(path for path in CUDA.glob("*/*.cu") if path.parent.name != "common")


def digest() -> str:
    shared = [
        *sorted((CUDA.parent / "include").iterdir()),
        *(CUDA.parent / "common" / f for f in ("checks.h", "ops.h")),
    ]
    return source_digest([*shared, *sorted(CUDA.glob("*/*.cuh")), *sources()])


def nvcc_release(nvcc: str) -> str:
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", banner)
    return found.group(1) if found else "unknown"


def readable(names: Sequence[str]) -> list[str]:
    """Demangled, without namespace and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = []
    for name in done.stdout.splitlines():
        name = re.sub(r"\((?:bool|int|short|long)\)", "", name).removeprefix("void ").replace("wmk::", "")
        depth, end = 0, len(name)
        for index, letter in enumerate(name):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = index
                break
        short.append(name[:end])
    return short


def compile_one(nvcc: str, source: Path, architecture: str) -> Kernels:
    """ptxas's report."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", *NVCC_FLAGS, f"-I{ROOT / 'csrc'}", f"-arch=sm_{architecture}", "-Xptxas=-v"]
        command += ["-cubin", str(source), "-o", str(Path(folder) / "kernels.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source.name} does not compile for sm_{architecture}:\n{done.stderr}")
    kernels: Kernels = {}
    current: Resources = {}
    for line in done.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels.setdefault(entry.group(1), {})
        elif spills := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # also called functions
            for key, value in zip(("stack", "spill_stores", "spill_loads"), spills.groups(), strict=True):
                current[key] = max(current.get(key, 0), int(value))
        elif used := re.search(r"Used (\d+) registers", line):
            current["registers"] = max(current.get("registers", 0), int(used.group(1)))
            shared = re.search(r"(\d+) bytes smem", line)
            current["static_shared"] = int(shared.group(1)) if shared else 0
    return dict(zip(readable(list(kernels)), kernels.values(), strict=True))


def measure(nvcc: str, files: Sequence[Path], architectures: Sequence[str]) -> dict[str, dict[str, Kernels]]:
    pairs = [(path, architecture) for path in files for architecture in architectures]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        measured = list(pool.map(lambda pair: compile_one(nvcc, *pair), pairs))
    found: dict[str, dict[str, Kernels]] = {path.name: {} for path in files}
    for (path, architecture), kernels in zip(pairs, measured, strict=True):
        found[path.name][architecture] = kernels
    return found


def failures(files: dict[str, dict[str, Kernels]]) -> list[str]:
    return [
        f"{name}, sm_{architecture}: {kernel} takes {used}"
        for name, architectures in files.items()
        for architecture, kernels in architectures.items()
        for kernel, used in kernels.items()
        if used["spill_stores"] or used["spill_loads"] or used["stack"]
    ]


def page(table: dict[str, Any]) -> str:
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"Written by `scripts/cuda_resources.py` with nvcc {table['nvcc']}: registers per thread, by architecture; the",
        "most bytes that a thread spills; bytes of static shared memory per block (dynamic is up to the call).",
        "A test holds every kernel, on every architecture, to no spills.",
        "",
    ]
    architectures = list(DEFAULT_ARCHITECTURES)
    for name, measured in table["files"].items():
        lines += [
            f"## {name}",
            "",
            "| kernel | " + " | ".join(f"sm_{a}" for a in architectures) + " | spills | shared |",
        ]
        lines += ["|---" * (len(architectures) + 3) + "|"]
        for kernel in sorted(measured[architectures[0]]):
            rows = [measured[a][kernel] for a in architectures]
            registers = " | ".join(str(row["registers"]) for row in rows)
            spills, shared = max(row["spill_stores"] for row in rows), rows[0]["static_shared"]
            lines.append(f"| `{kernel}` | {registers} | {spills} | {shared} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--arch", choices=DEFAULT_ARCHITECTURES, action="append", help="with --check: only this one")
    parser.add_argument("--only", help="with --check: only files whose name holds this")
    options = parser.parse_args()
    if not options.check and (options.arch or options.only):
        parser.error("a part of the table can be checked, not written")
    nvcc, reason = find_nvcc(os.environ)
    if nvcc is None:
        sys.exit(reason)
    files = [path for path in sources() if not options.only or options.only in path.name]
    measured = measure(nvcc, files, options.arch or DEFAULT_ARCHITECTURES)
    wrong = failures(measured)
    if options.check:
        table = json.loads(TABLE.read_text())
        for name, architectures in measured.items():
            for architecture, kernels in architectures.items():
                if table["files"].get(name, {}).get(architecture) != kernels:
                    wrong.append(
                        f"{name}, sm_{architecture}: not what {TABLE.name} says; run scripts/cuda_resources.py"
                    )
    else:
        table = {"nvcc": nvcc_release(nvcc), "sources": digest(), "files": measured}
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        TABLE.with_suffix(".md").write_text(page(table))
    if wrong:
        sys.exit("\n".join(wrong))
    count = sum(len(kernels) for by in measured.values() for kernels in by.values())
    print(f"{count} compiled kernels, none spills")


if __name__ == "__main__":
    main()
