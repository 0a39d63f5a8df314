"""Random calls of every op for some minutes: values, laws, memory.

    python scripts/fuzz.py --minutes 30
    python scripts/fuzz.py --seed 1234 --only selective_scan --rounds 1      # a failure again

Checks (``fuzz_checks.py``) are those of the test suite with other random inputs: kernels against the float64 reference
on every backend and instruction set, which also give equal bits with another number of threads and leave their inputs
unchanged; the laws of every recurrent op and module; numbers that are infinite, NaN, huge or tiny; and bad calls, which
are refused in the function's own words, or give what the reference gives. In half of the rounds every tensor ends, or
begins, at an inaccessible page (``guard_pages.c``; needs a C compiler and Linux), so that an access outside is a crash.
A worker that crashes is replaced; its call is printed.

Exit code: 0 if every case passed.
"""

import argparse
import ctypes
import faulthandler
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GUARDS = ("none", "after", "none", "before")  # of successive rounds


# The worker: PyTorch is imported after the parent's choice of preloaded libraries.


def work(arguments: argparse.Namespace) -> None:
    """Rounds from ``--seed`` in steps of ``--stride``, until ``--minutes`` or ``--rounds`` are over."""
    faulthandler.enable()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "core"), str(ROOT / "python"), str(ROOT)]
    import torch
    from fuzz_checks import Recorder, checks

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    guard = getattr(ctypes.CDLL(None), "guard_pages", lambda mode: None) if arguments.guards else lambda mode: None
    available = {name: check for name, check in checks().items() if arguments.only in name}
    if not available:
        sys.exit(f"--only {arguments.only!r} names no check")
    names = sorted(available)
    end = time.monotonic() + 60 * arguments.minutes
    number = 0
    while time.monotonic() < end and (arguments.rounds is None or number < arguments.rounds):
        seed = arguments.seed + number * arguments.stride
        rng = random.Random(seed)
        name, guards = rng.choice(names), rng.choice(GUARDS)
        threads = rng.choice([1, 1, 2, 3])
        torch.set_num_threads(threads)
        recorder, failure = Recorder(), None
        print(json.dumps({"round": name, "seed": seed, "guards": guards, "threads": threads}), flush=True)
        guard({"none": 0, "after": 1, "before": 2}[guards])
        try:
            available[name](recorder, seed)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}\nin {recorder.last}"  # shrunk
        finally:
            guard(0)
        print(json.dumps({"done": recorder.number, "distinct": len(recorder.cases), "failure": failure}), flush=True)
        number += 1


# The parent.


def guard_library(folder: Path) -> Path | None:
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    built = folder / f"guard_pages{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(built), str(ROOT / "scripts/guard_pages.c"), "-ldl"]
    subprocess.run(command, check=True)
    return built


class Worker(threading.Thread):
    """Runs a worker process, and another from the next seed after a crash."""

    def __init__(self, index: int, arguments: argparse.Namespace, guards: Path | None) -> None:
        super().__init__()
        self.arguments, self.guards = arguments, guards
        self.seed = arguments.seed + index
        self.rounds, self.cases, self.guarded = 0, Counter[str](), 0
        self.failures: list[str] = []

    def run(self) -> None:
        end = time.monotonic() + 60 * self.arguments.minutes
        while True:
            minutes = (end - time.monotonic()) / 60
            left = None if self.arguments.rounds is None else self.arguments.rounds - self.rounds
            if minutes <= 0 or left == 0 or not self._process(minutes, left):
                return

    def _process(self, minutes: float, rounds: int | None) -> bool:
        """Whether another process has to go on."""
        command = [sys.executable, __file__, "--worker", "--minutes", str(minutes), "--seed", str(self.seed)]
        command += ["--stride", str(self.arguments.jobs), "--only", self.arguments.only]
        command += [] if rounds is None else ["--rounds", str(rounds)]
        environment = dict(os.environ)
        if self.guards:
            command.append("--guards")
            environment["LD_PRELOAD"] = " ".join(x for x in (str(self.guards), environment.get("LD_PRELOAD")) if x)
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            current, running = self._read(process)
            code = process.wait()
            errors.seek(0)
            said = errors.read()[-4000:]
        if code and not current:
            self.failures.append("no round")
            print(f"FAILED a worker, outside of its rounds:\n{said}", flush=True)
            return False
        if code:
            self._fail(current, f"exit code {code} in {running}\n{said}")
            self.rounds += 1
            self.seed = current["seed"] + self.arguments.jobs
        return bool(code)

    def _read(self, process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
        """Counts rounds; returns the one that did not end, and its last call."""
        assert process.stdout is not None
        current: dict[str, Any] = {}
        running = ""
        for line in process.stdout:
            said = json.loads(line)
            if "round" in said:
                current, running = said, ""
            elif "running" in said:
                running = said["running"]
            else:
                self._count(current, said)
                current = {}
        return current, running

    def _count(self, current: dict[str, Any], said: dict[str, Any]) -> None:
        self.rounds += 1
        self.seed = current["seed"] + self.arguments.jobs
        self.cases[current["round"]] += said["distinct"]
        self.guarded += said["distinct"] if current["guards"] != "none" else 0
        if said["failure"]:
            self._fail(current, said["failure"])

    def _fail(self, current: dict[str, Any], why: str) -> None:
        again = f"--seed {current['seed']} --rounds 1 --jobs 1"
        text = f"{current['round']}, guard pages {current['guards']}, {current['threads']} threads ({again}):\n{why}"
        self.failures.append(text)
        print(f"FAILED {text}\n", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; by default another one each time")
    parser.add_argument("--rounds", type=int, default=None, help="per worker")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--guards", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stride", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(2**31)
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        guards = guard_library(Path(folder))
        print(f"seed {arguments.seed}, {arguments.minutes:g} minutes, {arguments.jobs} workers", end="")
        print("" if guards else "; no guard pages: they need Linux and a C compiler", flush=True)
        workers = [Worker(index, arguments, guards) for index in range(arguments.jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    cases = sum((worker.cases for worker in workers), Counter[str]())
    for name, number in sorted(cases.items()):
        print(f"{number:8,}  {name}")
    failures = [failure for worker in workers for failure in worker.failures]
    guarded = sum(worker.guarded for worker in workers)
    print(f"{sum(cases.values()):,} distinct cases, {guarded:,} between guard pages, {len(failures)} failures")
    return 0 if cases and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
