"""Compiles CUDA sources for the emulator, with sanitizers or a race detector, and caches objects.

``python emulator/build.py [--races] NAME SOURCE... [-- FLAG...]`` prints the program's path.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = ROOT / "build" / "emulator"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr,null,return,unreachable", "-fno-sanitize-recover=all")
FLAGS = (
    "-std=c++17",
    "-Og",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wno-unknown-pragmas",
)
STRICT = ("-Werror",) if os.environ.get("CI") else ()  # other compilers may warn of more


class BuildError(RuntimeError):
    """A source does not compile; has the compiler's message."""


def find_compiler() -> str | None:
    """CXX, or a usual C++ compiler, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = (), *, races: bool = False) -> Path:
    """Builds or finds in the cache a program that serves the ``extern "C"`` functions of ``sources``.

    Args:
        name: of the program; a digest is appended.
        sources: ``.cu`` files that launch with CUDA_EMULATOR_LAUNCH.
        flags: for the compiler.
        races: detect shared-memory races instead of sanitizing.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found: set CXX or install g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    own = [HERE / "runtime.cpp", HERE / "sync.cpp", HERE / "server.cpp"]
    command = [compiler, *FLAGS, *STRICT, *(() if races else SANITIZERS), f"-I{HERE}", *flags]
    instrumentation: tuple[str, ...] = ()
    if races:
        own.append(HERE / "races.cpp")
        command.append("-DCUDA_EMULATOR_RACES")
        instrumentation = ("-fsanitize=thread",)  # races.cpp implements the hooks
    jobs = [(command, source) for source in own] + [([*command, *instrumentation], source) for source in sources]
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(job[0], version, job[1]), jobs))
    digest = hashlib.sha256("\0".join(path.name for path in objects).encode()).hexdigest()[:16]
    program = CACHE / f"{name}-{digest}"
    if not program.exists():
        # the server looks functions up by name
        _run([*command, "-rdynamic", *map(str, objects), "-ldl"], program)
    return program


def _compile(command: Sequence[str], version: str, source: Path) -> Path:
    """The object is named by a digest of the preprocessed text."""
    language = ["-x", "c++", str(source)]
    text = subprocess.run([*command, "-E", *language], capture_output=True, text=True)
    if text.returncode:
        raise BuildError(text.stderr)
    key = "\0".join([*command[1:], version, text.stdout])
    target = CACHE / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.o"
    if not target.exists():
        _run([*command, "-c", *language], target)
    return target


def _run(command: Sequence[str], target: Path) -> None:
    """The file appears when complete, and never replaces one: another process may run it and read its lines."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(done.stderr)
    with contextlib.suppress(FileExistsError):
        os.link(partial, target)
    partial.unlink()


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    races = arguments[:1] == ["--races"]
    arguments = arguments[int(races) :]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    name, *sources = arguments[:split]
    print(build(name, [Path(source).resolve() for source in sources], arguments[split + 1 :], races=races))


if __name__ == "__main__":
    main(sys.argv[1:])
