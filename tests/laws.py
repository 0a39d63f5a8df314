"""Lists laws × ops × backends, planted errors (wrong kernels) and bad inputs.

    python tests/laws.py                          print counts and rows
    python tests/laws.py --write                  write tests/laws.json
    python tests/laws.py --tree FOLDER            use another checkout
    python tests/laws.py --json FILE              write the rows to FILE
    python tests/laws.py --compare OLD NEW [--renames FILE]    print rows missing in NEW; exit status 1 if any

A law is a test function. Its op is a parameter, part of the test's name, or the file name.
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "laws.json"
OPS = (
    "selective_state_update",
    "selective_scan",
    "selective_step",
    "linear_scan",
    "conv_lstm_step",
    "conv_lstm",
    "gated_delta_rule_step",
    "gated_delta_rule",
    "place_memory",
    "ssd_scan",
    "ssd_step",
    "causal_conv1d_step",
    "causal_conv1d",
)
WITHOUT_GPU = {  # by test file
    "cuda_emulated": "cuda, emulated",
    "conv_lstm_emulated": "cuda, emulated",
    "emulator_races": "cuda, emulated",
    "triton_aot": "triton, compiled",
    "triton_compiled": "triton, executed from PTX",
    "triton_interpreter": "triton, interpreted",
    "conv_lstm_interpreted": "triton, interpreted",
}
PLANTED = re.compile(r"raises\((EmulatorError|Fault)|plant|left_out|has_race_without|gate_sees")
Row = tuple[str, str, str]  # law, op, backend
EVERY_TEST = pytest.StashKey[list[pytest.Item]]()  # collected, before any is left out


def row(item: Any) -> Row:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    values = list(parameters.values())
    file = item.path.stem.removeprefix("test_").removeprefix("worldmodel_").removeprefix("runtime_")
    law = item.name.split("[")[0]
    if not hasattr(item, "function"):
        return "doctest", law.rsplit(".", 1)[-1], "-"
    backend = next((v.backend for v in values if hasattr(v, "backend") and hasattr(v, "device")), None)
    backend = backend or (parameters["backend"] if isinstance(parameters.get("backend"), str) else None)
    backend = backend or ("cpu, every instruction set" if "level" in parameters else None)
    op = next((v.name for v in values if hasattr(v, "op") and hasattr(v, "name")), None)
    op = op or (parameters["op"] if isinstance(parameters.get("op"), str) else None)
    op = op or next((name for name in OPS if name in law), None)
    op = op or next((name for name in OPS if name == file), file)
    return law, op, backend or WITHOUT_GPU.get(file, "-")


def errors(items: Iterable[Any]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {"planted": set(), "bad input": set()}
    for item in items:
        source = inspect.getsource(item.function) if hasattr(item, "function") else ""
        if PLANTED.search(source) and item.path.stem != "test_no_law_is_lost":
            found["planted"].add(item.name)
        elif "pytest.raises(" in source:
            found["bad input"].add(item.name)
    return {kind: sorted(names) for kind, names in found.items()}


def barriers() -> int:
    lines = (line for path in Path("csrc/cuda").rglob("*.cuh") for line in path.read_text().splitlines())
    return sum(bool(re.search(r"__sync(threads|warp)\(", line.split("//")[0])) for line in lines)


def lists(items: list[Any]) -> dict[str, Any]:
    return {"laws": sorted({row(item) for item in items}), **errors(items)}


def lost(old: dict[str, Any], new: dict[str, Any], renames: dict[str, str] | None = None) -> list[str]:
    """Rows of ``old`` missing in ``new``, except backends absent from ``new``.

    ``renames`` maps old rows, or parts of them, to new ones.
    """

    def renamed(text: str) -> str:
        renames_of_rows = renames or {}
        if text in renames_of_rows:
            return renames_of_rows[text]
        for part, other in renames_of_rows.items():
            text = text.replace(part, other)
        return text

    rows = {" × ".join(found) for found in new["laws"]}
    backends = {backend for _, _, backend in new["laws"]}
    wanted = (renamed(" × ".join(found)) for found in old["laws"])
    missing = [found for found in wanted if found not in rows and found.rsplit(" × ", 1)[1] in backends]
    for kind in ("planted", "bad input"):
        present = set(new[kind])
        missing += [f"{kind}: {name}" for name in map(renamed, old[kind]) if name not in present]
    return missing


def counts(found: dict[str, Any]) -> str:
    laws = {law for law, _, _ in found["laws"]}
    by_backend = ", ".join(f"{n} {name}" for name, n in Counter(x[2] for x in found["laws"]).most_common())
    return (
        f"{len(laws)} laws, {len({op for _, op, _ in found['laws']})} ops and files, {len(found['laws'])} rows\n"
        f"rows by backend: {by_backend}\n"
        f"{len(found['planted'])} planted errors and {found['barriers']} barriers left out in turn, "
        f"{len(found['bad input'])} bad inputs"
    )


class Collector:
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.found = {**lists(session.items), "barriers": barriers()}


def collect(tree: Path) -> dict[str, Any]:
    path = os.pathsep.join(map(str, [tree, tree / "python", tree / "tests"]))
    command = [sys.executable, str(Path(__file__).resolve()), "--here"]
    # Disables the digest gates.
    environment = {**os.environ, "PYTHONPATH": path, "CI": "1"}
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to collect")
    parser.add_argument("--write", action="store_true", help=f"write {LIST.name}")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two files of rows")
    parser.add_argument("--renames", type=Path, help="JSON: words of old rows, and what replaced them")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        collector = Collector()
        status = pytest.main(["--collect-only", "-q"], plugins=[collector])
        print("\n" + json.dumps(collector.found))
        return int(status)
    if options.compare:
        old, new = (json.loads(path.read_text()) for path in options.compare)
        missing = lost(old, new, json.loads(options.renames.read_text()) if options.renames else None)
        print(*missing, f"{len(missing)} rows of the old list are missing in the new one", sep="\n")
        return bool(missing)
    found = collect(options.tree.resolve())
    if options.write or options.json:
        target = LIST if options.write else options.json
        parts = [
            f' "{kind}": [\n' + ",\n".join(f"  {json.dumps(x)}" for x in found[kind]) + "\n ]"
            for kind in ("laws", "planted", "bad input")
        ]
        target.write_text("{\n" + ",\n".join([*parts, f' "barriers": {found["barriers"]}']) + "\n}\n")
    else:
        print(*(" × ".join(x) for x in found["laws"]), sep="\n")
        print(*(f"{kind}: {x}" for kind in ("planted", "bad input") for x in found[kind]), sep="\n")
    print(counts(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
