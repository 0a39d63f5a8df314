import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("triton_interpreted.py")
GROUPS = {
    "scan: state sizes": 12,
    "scan: time": 14,
    "scan: resets": 7,
    "scan: packed": 11,
    "scan: options": 24,
    "scan: dtypes": 19,
    "step": 31,
    "linear": 54,
    "place": 14,
    "place: states": 3,
    "delta rule": 29,
    "causal convolution": 30,
    "SSD scan": 23,
    "poison": 6,
    "special": 9,
    "interpreter": 2,
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed (it exists for Linux)"
)


def run_python(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    path = [str(PROGRAM.parent.parent), str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize("program", ["triton_interpreted", "conv_lstm_interpreted"])
def test_a_program_leaves_alone_the_process_that_imports_it(program: str) -> None:
    code = f"import os; before = dict(os.environ); import {program}; assert dict(os.environ) == before"
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr[-4000:]


def test_the_program_asks_for_the_interpreter() -> None:
    run = run_python(PROGRAM, "step", TRITON_INTERPRET="0")
    assert run.returncode == 1
    assert "run this program with TRITON_INTERPRET=1" in run.stderr


@pytest.mark.gated("Triton interpreted")
@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=pytest.mark.canary if group == "step" else ()) for group in GROUPS]
)
def test_interpreted_kernels_match_the_float64_reference(group: str) -> None:
    run = run_python(PROGRAM, group, TRITON_INTERPRET="1")
    print(f"{group}: {run.stdout.splitlines()[-1] if run.stdout else 'nothing ran'}")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == f"{GROUPS[group]} cases"
