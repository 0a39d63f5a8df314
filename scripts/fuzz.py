"""Random calls of every op for some minutes: values, laws, memory.

    python scripts/fuzz.py --minutes 30
    python scripts/fuzz.py --seed 1234 --only selective_scan --rounds 1      # a failure again

Checks are those of the test suite with other random inputs: kernels against the float64 reference on every backend and
instruction set, and the laws of every recurrent op and module. In half of the rounds every tensor ends, or begins, at
an inaccessible page (``guard_pages.c``; needs a C compiler and Linux), so that an access outside is a crash. Each value
check also asks for equal bits with another number of threads and for unchanged inputs. A worker that crashes is
replaced; its call is printed.

Exit code: 0 if every case passed.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import functools
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = 25  # per round: Hypothesis begins each with small ones
GUARDS = ("none", "after", "none", "before")  # of successive rounds
SUMMED_PER_THREAD = ("weight_ih", "weight_hh", "bias", "peephole")  # gradients of the ConvLSTM
Check = Callable[["Recorder", int], None]


class Recorder:
    """Reports cases to the parent as lines of JSON, before they run."""

    def __init__(self) -> None:
        self.cases: set[int] = set()
        self.number = 0
        self.last = ""

    def case(self, description: str) -> None:
        self.number += 1
        self.last = description
        self.cases.add(hash(description))
        print(json.dumps({"running": description[:2000]}), flush=True)


# The worker: imports of PyTorch come after the parent's choice of preloaded libraries.


def checks() -> dict[str, Check]:
    """By name, each with the number of examples of a round bound late."""
    import backends

    found: dict[str, Check] = {}
    for op in ("selective_scan", "selective_step", "linear_scan", "conv_lstm"):
        for backend, device in backends.targets(op, without=("reference",)):
            if device == "cpu":
                levels = backends.instruction_sets() if backend == "cpu" else [""]
                for level in levels:
                    name = f"{op} {backend} {level}".strip()
                    found[name] = functools.partial(check_values, op, backend, level)
    found["selective_state_update"] = check_state_update
    return found | laws()


def check_values(op: str, backend: str, level: str, recorder: Recorder, seed: int) -> None:
    """A kernel is as accurate as the reference, deterministic over threads, and leaves its inputs alone."""
    import torch
    from conv_lstm_problems import conv_lstms
    from problems import assert_as_accurate_as_the_reference, linear_scans, scans, steps

    strategy = {
        "selective_scan": scans,
        "selective_step": steps,
        "linear_scan": linear_scans,
        "conv_lstm": conv_lstms,
    }[op]()

    def check(problem: Any) -> None:
        recorder.case(f"{problem} on {backend} {level}")
        before = {name: x.clone() for name, x in problem.tensors.items() if x is not None}
        assert_as_accurate_as_the_reference(problem, backend)
        one = problem.solve(backend)
        threads = torch.get_num_threads()
        torch.set_num_threads(3 if threads == 1 else 1)
        try:
            other = problem.solve(backend)
        finally:
            torch.set_num_threads(threads)
        for name, value in one.items():
            summed = op == "conv_lstm" and (backend == "chunked" or name.endswith(SUMMED_PER_THREAD))
            assert summed or same_bits(value, other[name]), f"{name} depends on the number of threads"
        for name, value in before.items():
            assert same_bits(problem.tensors[name], value), f"{name}, an input, was changed"

    with instruction_set(level):
        examples(strategy, check, seed)


def check_state_update(recorder: Recorder, seed: int) -> None:
    """The update in place equals a step of the rows it names; other rows keep their bits."""
    import torch
    from hypothesis import strategies as st
    from problems import laid_out, steps

    import wmkernels

    def check(drawn: tuple[Any, int, bool, str]) -> None:
        problem, extra, indexed, layout = drawn
        tensors = dict(problem.tensors)
        tensors.pop("reset")
        softplus, rows = problem.options["delta_softplus"], tensors["state"].shape[0]
        generator = torch.Generator().manual_seed(problem.seed)
        recorder.case(f"selective_state_update of {problem}, indexed={indexed}, {extra} more rows, state {layout}")
        state, indices = tensors["state"].contiguous(), None
        if indexed:
            more = torch.randn((extra, *state.shape[1:]), generator=generator, dtype=torch.float64).to(state.dtype)
            indices = torch.randperm(rows + extra, generator=generator)[:rows].to(torch.int32)
            indices[torch.rand(rows, generator=generator) < 0.2] = -1
            state = torch.cat((state, more))
        named = indices is None or indices >= 0
        taken = torch.arange(rows) if indices is None else indices.clamp(min=0).long()
        # The step keeps state and accumulation in float32, as the update does before it rounds to the state's dtype.
        expected, new = wmkernels.selective_step(
            **{**tensors, "state": state[taken]}, delta_softplus=softplus, backend="reference"
        )
        held = laid_out(state, layout, problem.seed)
        before = held.clone()
        positional = [tensors[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
        out = wmkernels.selective_state_update(held, *positional, softplus, indices)
        kept = torch.ones(len(held), dtype=torch.bool)
        kept[taken[named] if indices is not None else taken] = False
        assert same_bits(held[kept], before[kept]), "a row that was not named changed"
        if indices is not None:
            assert (out[~named] == 0).all(), "a negative index gave an output"
            expected, new, out = expected[named], new[named], out[named]
        close(out, expected, "the output")
        close(held[taken[named] if indices is not None else taken], new.to(held.dtype), "the new state")

    drawn = st.tuples(steps(), st.integers(0, 3), st.booleans(), st.sampled_from(["contiguous", "permuted", "strided"]))
    examples(drawn, check, seed)


def close(found: Any, expected: Any, what: str) -> None:
    import torch

    if expected.numel() == 0:
        return
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    scale = expected.abs().max().item()
    error = (found.double() - expected.double()).abs().max().item()
    assert error <= 64 * eps * scale + 1e-30, f"{what} differs by {error:.3g} of {scale:.3g}"


def laws() -> dict[str, Check]:
    """Of tests/core/test_laws.py, on the backend of each case."""
    import test_laws

    found: dict[str, Check] = {}
    for (memory, target), name in zip(test_laws.CASES, test_laws.IDS, strict=True):
        if target.device == "cpu" and target.backend != "reference":
            found[f"laws of {name}"] = functools.partial(check_laws, memory, target)
    return found


def check_laws(memory: Any, target: Any, recorder: Recorder, seed: int) -> None:
    import inspect
    from unittest import mock

    import test_laws
    from hypothesis import strategies as st

    from wmkernels import chunked, dispatch

    def bound(body: Any, name: str, poison: dict[str, float]) -> Callable[[Any], None]:
        def check(data: Any) -> None:
            recorder.case(f"{name} of {memory.name} on {target.backend}, seed {seed}, case {recorder.number}")
            body(memory=memory, target=target, data=data, **poison)

        return check

    for name, test in vars(test_laws).items():
        if not name.startswith("test_") or not hasattr(test, "hypothesis"):
            continue
        body = test.hypothesis.inner_test
        parameters = set(inspect.signature(body).parameters) - {"memory", "target", "data"}
        if parameters - {"poison"} or ("packed" in name and not memory.packed):
            continue
        poison = {"poison": random.Random(seed).choice([float("nan"), float("inf")])} if parameters else {}
        with (
            mock.patch.object(dispatch, "REQUESTED", target.backend),
            mock.patch.object(chunked, "steps_per_chunk", lambda _: 3),
        ):
            examples(st.data(), bound(body, name, poison), seed, max(2, EXAMPLES // 6))


def examples(strategy: Any, check: Callable[[Any], None], seed: int, number: int = EXAMPLES) -> None:
    """Runs and, on a failure, shrinks random examples."""
    import hypothesis

    hypothesis.seed(seed)(
        hypothesis.settings(
            max_examples=number,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )(hypothesis.given(strategy)(check))
    )()


def same_bits(one: Any, other: Any) -> bool:
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    kind = whole[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


@contextlib.contextmanager
def instruction_set(level: str) -> Iterator[None]:
    from wmkernels.dispatch import load_native

    native = load_native()
    if not level or native is None:
        yield
        return
    before = native.cpu_isa()
    native.cpu_set_isa(level)
    try:
        yield
    finally:
        native.cpu_set_isa(before)


def work(arguments: argparse.Namespace) -> None:
    """Rounds from ``--seed`` in steps of ``--stride``, until ``--minutes`` or ``--rounds`` are over."""
    faulthandler.enable()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "core"), str(ROOT / "python"), str(ROOT)]
    import torch

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
