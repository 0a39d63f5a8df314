"""Finds the C++ compiler and probes features."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMPILE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast")

# Per machine and instruction-set level, best first
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
        "v3": ("-march=x86-64-v3",),
        "portable": (),
    },
    "aarch64": {"neon": ()},
}

PROBE_CPP = (
    "#include <cmath>\n#include <vector>\ndouble f(double x) { return std::vector<double>(3, std::exp(x))[1]; }\n"
)
PROBE_OPENMP = """#include <omp.h>
int f() { int n = 0;
#pragma omp parallel
{
#pragma omp atomic
n += omp_get_thread_num(); }
return n; }
"""


class BuildError(Exception):
    """The build must stop."""


def machine_name() -> str:
    """Normalised instruction-set family."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def run_tool(command: Sequence[str]) -> tuple[bool, str]:
    """Success and output, or the reason it did not start."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout + done.stderr


def complaint(output: str) -> str:
    """The first error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = (line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE))
    return next(errors, lines[-1] if lines else "no output")


class Prober:
    """Compiles probe files; caches successes in `memory`, retries failures."""

    def __init__(self, memory: Path | None = None):
        self.memory = memory
        self.known: set[str] = set()
        if memory is not None and memory.exists():
            self.known = set(json.loads(memory.read_text()))

    def failure(self, command: Sequence[str], source: str, suffix: str = ".cpp", version: str = "") -> str:
        """The error of `command source -o object`; empty on success."""
        key = hashlib.sha256("\0".join([*command, source, version]).encode()).hexdigest()
        if key in self.known:
            return ""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe" + suffix)
            path.write_text(source)
            works, output = run_tool([*command, str(path), "-o", str(Path(folder, "probe.out"))])
        if not works:
            return complaint(output)
        self.known.add(key)
        if self.memory is not None:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            self.memory.write_text(json.dumps(sorted(self.known)))
        return ""


@dataclass(frozen=True)
class Compiler:
    """A working C++ compiler."""

    command: tuple[str, ...]
    version: str
    extra_flags: tuple[str, ...]
    link_flags: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hash that names the object folder."""
        parts = [*self.command, self.version, *self.extra_flags, *self.link_flags]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def find_compiler(environ: Mapping[str, str]) -> tuple[Compiler | None, str]:
    """CXX, or the first of c++, g++, clang++; or None and the reason."""
    named = environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    extra_flags = tuple(shlex.split(environ.get("CXXFLAGS", "")))
    link_flags = tuple(shlex.split(environ.get("LDFLAGS", "")))
    reasons = []
    for candidate in candidates:
        path = shutil.which(candidate[0], path=environ.get("PATH"))
        if path is None:
            reasons.append(f"{candidate[0]} not found")
            continue
        command = (path, *candidate[1:])
        _, banner = run_tool([*command, "--version"])
        version = banner.splitlines()[0].strip() if banner else ""
        probe = [*command, "-std=c++17", "-fPIC", "-shared", *extra_flags, *link_flags]
        failure = Prober().failure(probe, PROBE_CPP)
        if not failure:
            return Compiler(command, version, extra_flags, link_flags), ""
        reasons.append(f"{path} does not work: {failure}")
    return None, "; ".join(reasons)


def openmp_failure(compiler: Compiler, prober: Prober) -> str:
    """Why OpenMP is unavailable, or empty."""
    command = [*compiler.command, "-fopenmp", "-fPIC", "-shared", *compiler.extra_flags, *compiler.link_flags]
    return prober.failure(command, PROBE_OPENMP, version=compiler.version)


def instruction_set_levels(
    compiler: Compiler, prober: Prober, machine: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Flags per supported level, reasons against the others."""
    built: dict[str, tuple[str, ...]] = {}
    missing: dict[str, str] = {}
    for level, flags in LEVELS.get(machine, {"portable": ()}).items():
        command = [*compiler.command, *COMPILE_FLAGS, *flags, "-c", *compiler.extra_flags]
        failure = prober.failure(command, PROBE_CPP, version=compiler.version)
        if failure:
            missing[level] = failure
        else:
            built[level] = flags
    return built, missing
