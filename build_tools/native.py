"""Builds wmkernels/_native for setup.py.

Without a tool, or where it does not compile a kernel, kernels are left out. WMKERNELS_REQUIRE_NATIVE=1 stops the build
there; WMKERNELS_NVCC and WMKERNELS_CUDA=1 do for CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from .cuda import find_cuda
from .ninja_file import Plan, extension_name, write_if_changed, write_ninja_file
from .report import Report
from .toolchain import (
    BuildError,
    Prober,
    complaint,
    find_compiler,
    instruction_set_levels,
    machine_name,
    openmp_failure,
)

BUILD_FOLDER = Path("build", "native")


def build(root: Path, package: Path, version: str, environ: Mapping[str, str] = os.environ) -> Report:
    """Build into `package`; print and save the report."""
    report = Report(version)
    with _one_build_at_a_time(root / BUILD_FOLDER):
        plan = make_plan(root, report, environ)
        if plan is not None:
            plan = compile_plan(plan, report, environ)
        extension = package / extension_name()
        if plan is None:
            extension.unlink(missing_ok=True)
        else:
            _install(root / plan.extension, extension)
            report.extension, report.objects = extension.name, plan.folder.as_posix()
        report.write(package)
    print(f"\n{report.block()}\n", flush=True)
    if plan is None and environ.get("WMKERNELS_REQUIRE_NATIVE") == "1":
        raise BuildError(f"WMKERNELS_REQUIRE_NATIVE=1, but there is no extension: {report.extension_reason}")
    return report


def compile_plan(plan: Plan, report: Report, environ: Mapping[str, str]) -> Plan | None:
    """Compile, on failure without CUDA. Returns the compiled plan, or None."""
    failure = run_ninja(plan, write_ninja_file(plan), environ)
    if not failure:
        return plan
    if plan.cuda is not None and not asked_for(environ):
        report.cuda, report.cuda_reason = False, f"its kernels, or the extension, do not compile: {failure}"
        report.nvcc, report.nvcc_version, report.cuda_architectures = "", "", []
        return compile_plan(dataclasses.replace(plan, cuda=None), report, environ)
    report.extension_reason = f"the kernels do not compile: {failure}"
    if asked_for(environ):
        raise BuildError(f"{', '.join(asked_for(environ))}, but {report.extension_reason}")
    return None


def asked_for(environ: Mapping[str, str]) -> list[str]:
    """Settings whose failure stops the build."""
    settings = [f"WMKERNELS_NVCC={environ['WMKERNELS_NVCC']}"] if environ.get("WMKERNELS_NVCC") else []
    return settings + [
        f"{name}=1" for name in ("WMKERNELS_CUDA", "WMKERNELS_REQUIRE_NATIVE") if environ.get(name) == "1"
    ]


def make_plan(root: Path, report: Report, environ: Mapping[str, str]) -> Plan | None:
    """Find and report the tools."""
    if sys.platform == "win32":
        report.extension_reason = "the native extension is not built on Windows"
        compiler = None
    else:
        compiler, report.extension_reason = find_compiler(environ)
    headers = Path(sysconfig.get_path("include"))
    if compiler is not None and not (headers / "Python.h").exists():
        report.extension_reason = f"Python.h not found in {headers} (a package such as python3-dev has it)"
        compiler = None
    if compiler is None:
        if environ.get("WMKERNELS_CUDA") == "1":
            raise BuildError(f"WMKERNELS_CUDA=1, but nothing can be compiled: {report.extension_reason}")
        return None
    report.compiler, report.compiler_version = compiler.command[-1], compiler.version
    folder = BUILD_FOLDER / f"{machine_name()}-{compiler.digest}"
    prober = Prober(root / folder / "probes.json")
    report.openmp_reason = openmp_failure(compiler, prober)
    report.openmp = not report.openmp_reason
    levels, report.cpu_levels_missing = instruction_set_levels(compiler, prober, machine_name())
    report.cpu_levels = list(levels)
    has_sources = any(root.glob("csrc/cuda/*/*.cu"))
    cuda, report.cuda_reason = find_cuda(environ, compiler, prober, has_sources)
    if cuda is not None:
        report.cuda, report.nvcc, report.nvcc_version = True, cuda.nvcc, cuda.version
        report.cuda_architectures = list(cuda.architectures)
    return Plan(root, folder, compiler, report.openmp, levels, cuda, mirror_pybind11(root))


def mirror_pybind11(root: Path) -> Path:
    """Copy pybind11's headers to build/: build isolation moves them."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is not installed: install it, or build with build isolation") from None
    source = Path(pybind11.get_include())
    target = Path("build") / f"pybind11-{pybind11.__version__}"
    for header in sorted(source.rglob("*.h")):
        copy = root / target / header.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_if_changed(copy, header.read_text())
    return target


def find_ninja(environ: Mapping[str, str]) -> str:
    """From the Python package, or PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
        if path:
            return path
    path = shutil.which("ninja", path=environ.get("PATH"))
    if path is None:
        raise BuildError("ninja is not installed: install it, or build with build isolation")
    return path


def run_ninja(plan: Plan, file: Path, environ: Mapping[str, str]) -> str:
    """Returns the first error, or an empty string."""
    command = [find_ninja(environ), "-f", str(file.relative_to(plan.root))]
    if environ.get("MAX_JOBS"):
        command += ["-j", environ["MAX_JOBS"]]
    # In the command, nvcc's thread count would cause rebuilds.
    count = min(len(plan.cuda.architectures), os.cpu_count() or 1) if plan.cuda is not None else 0
    threads = f"--threads={count}" if count else ""
    appended = " ".join(filter(None, [environ.get("NVCC_APPEND_FLAGS", ""), threads]))
    environment = {**environ, "NVCC_APPEND_FLAGS": appended, "NINJA_STATUS": "[%f/%t %es] "}
    sys.stdout.flush()
    output = []
    with subprocess.Popen(
        command,
        cwd=plan.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as ninja:
        assert ninja.stdout is not None
        for line in ninja.stdout:
            print(line, end="", flush=True)
            output.append(line)
    return complaint("".join(output)) if ninja.returncode else ""


def _install(built: Path, target: Path) -> None:
    """Replace atomically; a process may be using the old extension."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy2(built, temporary)
    os.replace(temporary, target)


@contextlib.contextmanager
def _one_build_at_a_time(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
