"""Leaves out slow kernel tests while their sources are unchanged.

A test marked ``gated(group)`` runs only if the digest of the group's sources differs from tests/digests.json, or if it
is marked ``canary``. ``--all`` and naming the file run everything. Digests ignore comments, docstrings and layout.

    python tests/gates.py "CUDA built"             # whether it is unchanged, by the exit status too
    python tests/gates.py "CUDA built" --record    # after a build for all architectures
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "digests.json"
sys.path.insert(0, str(ROOT / "scripts"))

from source_digest import digest  # noqa: E402


class Gate(NamedTuple):
    sources: tuple[str, ...]
    packages: tuple[str, ...] = ()


class State(NamedTuple):
    unchanged: bool
    why: str


EMULATOR = ("emulator/*.h", "emulator/*.cpp", "emulator/build.py", "emulator/client.py", "tests/emulated_cuda.py")
CUDA = ("csrc/include/*", "csrc/common/*.h", "csrc/cuda/common/*", "wmkernels/*.py")
SCAN_OPS = (
    "selective_scan",
    "selective_step",
    "linear_scan",
    "place_memory",
    "gated_delta_rule",
    "causal_conv1d",
    "ssd_scan",
)
SCANS = tuple(f"csrc/cuda/{op}/*" for op in SCAN_OPS)
SCAN_LAUNCHERS = tuple(f"wmkernels/{op}/*.py" for op in SCAN_OPS)
CONV_LSTM = ("csrc/cuda/conv_lstm/*", "wmkernels/conv_lstm/*.py")
TRITON = ("wmkernels/*.py", *(f"wmkernels/{path.parent.name}/*.py" for path in ROOT.glob("wmkernels/*/triton*.py")))
PROBLEMS = tuple(
    f"tests/{name}.py"
    for name in (
        "problems",
        "place_memory_problems",
        "delta_rule_problems",
        "causal_conv_problems",
        "ssd_problems",
        "tolerances",
    )
)

GATES = {
    # No tests: CI compiles for one architecture while these are unchanged.
    "CUDA built": Gate(("csrc/include/*", "csrc/common/*.h", "csrc/cuda/*/*", "build_tools/*.py", "setup.py")),
    "CUDA scans emulated": Gate(
        (*EMULATOR, *CUDA, *SCANS, *SCAN_LAUNCHERS, *PROBLEMS, "tests/emulator/test_cuda_emulated*.py")
    ),
    "CUDA ConvLSTM emulated": Gate(
        (*EMULATOR, *CUDA, *CONV_LSTM, *PROBLEMS, "tests/conv_lstm_problems.py", "tests/emulator/test_conv_lstm*.py")
    ),
    "CUDA races": Gate(
        (*EMULATOR, *CUDA, *SCANS, *SCAN_LAUNCHERS, *CONV_LSTM, "tests/emulator/test_emulator_races*.py")
    ),
    "Triton compiled": Gate(
        (*TRITON, "scripts/triton_resources.py", "docs/triton_resources.json", "tests/triton/test_triton_aot.py"),
        ("triton",),
    ),
    "Triton executed": Gate(
        (*TRITON, "emulator/ptx*.py", "tests/triton/triton_c*.py", "tests/triton/test_triton_compiled.py"), ("triton",)
    ),
    "Triton interpreted": Gate((*TRITON, "tests/triton/*interprete*.py", "tests/triton/triton_cases*.py"), ("triton",)),
}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def current(group: str) -> str:
    """The digest of a group's sources.

    Raises:
        LookupError: a glob matches no file.
    """
    gate = GATES[group]
    paths: dict[Path, None] = {}
    for pattern in gate.sources:
        found = [path for path in sorted(ROOT.glob(pattern)) if path.is_file()]
        if not found:
            raise LookupError(f"tests/gates.py: nothing is called {pattern}, which {group!r} is made of")
        paths |= dict.fromkeys(found)
    versions = [f"{package} {version(package)}" for package in gate.packages]
    return hashlib.sha256("\0".join([digest(paths), *versions]).encode()).hexdigest()


def recorded() -> dict[str, str]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def state(group: str) -> State:
    try:
        unchanged = recorded().get(group) == current(group)
    except LookupError as error:  # nothing is left out
        return State(False, str(error))
    if unchanged:
        return State(True, "passed in full with these sources")
    return State(False, "the sources are not those that passed in full before")


def record(groups: list[str]) -> None:
    known = {name: value for name, value in recorded().items() if name in GATES}
    known |= {group: current(group) for group in groups}
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GATES)
    parser.add_argument("--record", action="store_true", help="these sources passed")
    chosen = parser.parse_args(arguments)
    if chosen.record:
        record([chosen.group])
    found = state(chosen.group)
    print(f"{chosen.group}: {found.why}")
    return 0 if found.unchanged else 1


if __name__ == "__main__":
    sys.exit(main())
