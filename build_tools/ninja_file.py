"""Writes build.ninja, with relative paths for incremental isolated builds."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .cuda import Cuda, host_flags
from .toolchain import COMPILE_FLAGS, Compiler

NVCC_FLAGS = ("-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden")
ONCE = "api.cpp"
EXPORTS = "{ global: PyInit__native; local: *; };\n"


@dataclass(frozen=True)
class Plan:
    """The inputs of the build."""

    root: Path
    folder: Path  # relative to root
    compiler: Compiler
    openmp: bool
    levels: dict[str, tuple[str, ...]]
    cuda: Cuda | None
    pybind11_headers: Path  # relative to root

    @property
    def configuration(self) -> Path:
        """Folder of files that depend on Python or CUDA."""
        abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        parts = [abi] if self.cuda is None else [abi, "cuda", self.cuda.version, *self.cuda.architectures]
        return self.folder / "-".join(parts)

    @property
    def extension(self) -> Path:
        """Ninja's output."""
        return self.configuration / extension_name()


def extension_name() -> str:
    """File name of _native."""
    return "_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def _quote(words: Iterable[str | Path]) -> str:
    quoted = []
    for word in map(str, words):
        plain = all(character.isalnum() or character in "-_=+./,:@" for character in word)
        quoted.append((word if plain else "'" + word.replace("'", "'\\''") + "'").replace("$", "$$"))
    return " ".join(quoted)


def _escape(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _sources(plan: Plan, pattern: str) -> list[Path]:
    return [path.relative_to(plan.root) for path in sorted(plan.root.glob(pattern))]


def is_compiled_once(source: Path) -> bool:
    """Whether a CPU source is compiled once, not per level."""
    return source.parent.name == "dispatch" or source.name == ONCE


def ninja_text(plan: Plan) -> str:
    """The content of build.ninja."""
    compiler, folder = plan.compiler, plan.folder
    openmp = ("-fopenmp",) if plan.openmp else ()
    base = [*COMPILE_FLAGS, *openmp, "-Icsrc"]
    python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    bindings = [*base, f"-I{plan.pybind11_headers}", *(f"-I{path}" for path in sorted(python))]
    cuda = [] if plan.cuda is None else ["-DWMK_WITH_CUDA"]
    levels = [f"-DWMK_HAVE_{level.upper()}" for level in plan.levels]
    rules = [
        "ninja_required_version = 1.8",
        f"builddir = {_escape(folder)}",
        "rule cxx",
        f"  command = {_quote(compiler.command)} $flags {_quote(compiler.extra_flags)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in $level",
        "rule link",
        f"  command = {_link_command(plan)}",
        "  description = link $out",
    ]
    objects: list[Path] = []
    builds: list[str] = []

    def add(rule: str, source: Path, target: Path, flags: Iterable[str], level: str = "") -> None:
        objects.append(target)
        builds.extend([f"build {_escape(target)}: {rule} {_escape(source)}", f"  flags = {_quote(flags)}"])
        if level:
            builds.append(f"  level = ({level})")

    # longest first, for the first build
    add("cxx", Path("csrc/python/bindings.cpp"), plan.configuration / "bindings.o", [*bindings, *cuda])
    if plan.cuda is not None:
        rules += [
            "rule nvcc",
            f"  command = {_quote([plan.cuda.nvcc])} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
        ]
        names = f'-DWMK_CUDA_ARCHITECTURES="{",".join(plan.cuda.architectures)}"'
        compile_cuda = [*host_flags(compiler), *NVCC_FLAGS, "-Icsrc", *plan.cuda.code_flags, names]
        for source in _sources(plan, "csrc/cuda/*/*.cu"):
            add("nvcc", source, plan.configuration / "cuda" / f"{source.stem}.o", compile_cuda)
    for source in _sources(plan, "csrc/cpu/*/*.cpp"):
        if is_compiled_once(source):
            add("cxx", source, folder / "cpu" / source.parent.name / f"{source.stem}.o", [*base, *levels])
            continue
        for level, flags in plan.levels.items():
            target = folder / "cpu" / source.parent.name / f"{source.stem}.{level}.o"
            add("cxx", source, target, [*base, *flags, f"-DWMK_ISA={level}"], level)
    inputs = " ".join(map(_escape, objects))
    builds += [f"build {_escape(plan.extension)}: link {inputs} | {_escape(folder / 'exports')}"]
    return "\n".join([*rules, *builds, f"default {_escape(plan.extension)}", ""])


def _link_command(plan: Plan) -> str:
    # torch, imported first, loads its libgomp with RTLD_GLOBAL (libtorch_global_deps). The extension binds to it by
    # soname or, if the wheel renamed it (libgomp-a34b3233.so.1), by global symbol lookup. Linked without OpenMP,
    # loading fails if torch hides its own.
    openmp = ["-fopenmp"] if plan.openmp else []
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__native"]
    else:
        shared = ["-shared", f"-Wl,--version-script={plan.folder / 'exports'}", "-Wl,--exclude-libs,ALL"]
    flags = [*plan.compiler.extra_flags, *shared, *openmp, *plan.compiler.link_flags]
    if plan.cuda is None:
        return f"{_quote(plan.compiler.command)} $in -o $out {_quote(flags)}"
    # nvcc finds its static runtime
    return (
        f"{_quote([plan.cuda.nvcc, *host_flags(plan.compiler), '-cudart=static'])} $in -o $out {_quote(_nvcc(flags))}"
    )


def _nvcc(flags: Iterable[str]) -> list[str]:
    """Translate flags for nvcc, which splits them at commas."""
    words = []
    for flag in flags:
        if flag == "-shared" or not flag.startswith("-"):
            words.append(flag)
        elif flag.startswith("-Wl,"):
            words += [f"-Xlinker={part}" for part in flag.split(",")[1:]]
        else:
            words.append("-Xcompiler=" + flag.replace(",", "\\,"))
    return words


def write_ninja_file(plan: Plan) -> Path:
    """Write build.ninja and the export list; returns the former."""
    folder = plan.root / plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "exports", EXPORTS)
    path = plan.root / plan.configuration / "build.ninja"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_if_changed(path, ninja_text(plan))
    return path


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, keeping the timestamp of equal content."""
    if not path.exists() or path.read_text() != text:
        temporary = path.with_name(path.name + f".{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)
