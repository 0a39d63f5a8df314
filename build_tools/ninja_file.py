"""Writes build.ninja: which object comes from which source, and with which command.

Commands are the same from one build to the next (paths are relative to the project, headers that move are copied to one
place first), and ninja runs again only those whose command or whose files changed.
"""

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
ONCE = "api.cpp"  # of an op's folder; its other files are compiled once per level
EXPORTS = "{ global: PyInit__native; local: *; };\n"


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is compiled."""

    root: Path
    folder: Path  # of the objects, relative to root
    compiler: Compiler
    openmp: bool
    levels: dict[str, tuple[str, ...]]
    cuda: Cuda | None
    pybind11_headers: Path  # relative to root

    @property
    def configuration(self) -> Path:
        """Holds what depends on Python or on CUDA being there, so that configurations do not overwrite each other."""
        abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        parts = [abi] if self.cuda is None else [abi, "cuda", self.cuda.version, *self.cuda.architectures]
        return self.folder / "-".join(parts)

    @property
    def extension(self) -> Path:
        """The extension where ninja leaves it."""
        return self.configuration / extension_name()


def extension_name() -> str:
    """The file name that this Python imports as _native."""
    return "_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def _quote(words: Iterable[str | Path]) -> str:
    """Words for a command line in a ninja file."""
    quoted = []
    for word in map(str, words):
        plain = all(character.isalnum() or character in "-_=+./,:@" for character in word)
        quoted.append((word if plain else "'" + word.replace("'", "'\\''") + "'").replace("$", "$$"))
    return " ".join(quoted)


def _escape(path: str | Path) -> str:
    """A path in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _sources(plan: Plan, pattern: str) -> list[Path]:
    return [path.relative_to(plan.root) for path in sorted(plan.root.glob(pattern))]


def is_compiled_once(source: Path) -> bool:
    """Whether a C++ source under csrc/cpu is compiled once, not once per instruction-set level."""
    return source.parent.name == "dispatch" or source.name == ONCE


def ninja_text(plan: Plan) -> str:
    """The whole of build.ninja."""
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

    # the longest first, since ninja knows no times at the first build
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
    # OpenMP: wmkernels imports torch before the extension, and torch's wheels load their libgomp for everyone to see
    # (libtorch_global_deps needs it and is opened RTLD_GLOBAL). An ordinary link therefore finds that one: by its
    # soname where the wheel kept it, and where the wheel renamed it (libgomp-a34b3233.so.1), by the order of symbol
    # lookup, global scope first; the system's libgomp is then mapped but never runs. Both were tried. Leaving libgomp
    # out of the link would spare that mapping, but fail to load beside a torch that keeps its OpenMP to itself.
    # `python -m wmkernels.info` names the library that the extension is really bound to.
    openmp = ["-fopenmp"] if plan.openmp else []
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__native"]
    else:
        shared = ["-shared", f"-Wl,--version-script={plan.folder / 'exports'}", "-Wl,--exclude-libs,ALL"]
    flags = [*plan.compiler.extra_flags, *shared, *openmp, *plan.compiler.link_flags]
    if plan.cuda is None:
        return f"{_quote(plan.compiler.command)} $in -o $out {_quote(flags)}"
    # nvcc links, since it knows where its static runtime is
    return (
        f"{_quote([plan.cuda.nvcc, *host_flags(plan.compiler), '-cudart=static'])} $in -o $out {_quote(_nvcc(flags))}"
    )


def _nvcc(flags: Iterable[str]) -> list[str]:
    """Flags of the C++ compiler for nvcc, which splits them at commas and links by itself."""
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
    """Write build.ninja and what it refers to, and answer where it is."""
    folder = plan.root / plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "exports", EXPORTS)
    path = plan.root / plan.configuration / "build.ninja"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_if_changed(path, ninja_text(plan))
    return path


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, but leave its time alone when it already says this."""
    if not path.exists() or path.read_text() != text:
        temporary = path.with_name(path.name + f".{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)
