from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.progress import Progress
from harness.timer import Entry, Timer, Work
from scans.baselines import Implementation
from scans.correctness import SLICE_STEPS, TOLERANCES, slice_error, small_problem_error, tail_error
from scans.problems import Inputs, Problem, limit_seconds, make_inputs

GRADIENTS = ("training", "backward")


@dataclass(frozen=True)
class Case:
    """One implementation on one problem.

    Attributes:
        probe_time: sequence length that selects the thread count of a call so slow that it runs once.
        build: makes the timed call, if not ``run(inputs)``.
        units: problems per call.
        check_tail: also compare the last steps.
    """

    implementation: Implementation
    problem: Problem
    probe_time: int | None = None
    build: Callable[[Implementation, Inputs], Work] | None = None
    units: int = 1
    check_tail: bool = False
    note: str = ""


@dataclass
class Group:
    """The first case is the base of ratios."""

    title: str
    measure: str  # forward, backward, training, step
    cases: list[Case] = field(default_factory=list)
    budget: float = 5.0


class Runner:
    """Caches errors on small problems."""

    def __init__(self, device: torch.device, progress: Progress):
        self.device, self.progress = device, progress
        self.timer = Timer(device)
        self.rows: list[dict[str, Any]] = []
        self._errors: dict[Any, float] = {}
        self._timed: list[tuple[dict[str, Any], Problem]] = []

    def run(self, group: Group) -> None:
        self.progress.step(group.title)
        inputs: dict[tuple[Problem, bool], Inputs] = {}
        ready: list[tuple[Case, Entry | None, dict[str, Any]]] = []
        for case in group.cases:
            self.progress.detail(f"{group.title}: {case.implementation.name}")
            row = {
                "group": group.title,
                "measure": group.measure,
                "implementation": case.implementation.name,
                "backend": case.implementation.backend,
                "source": case.implementation.source if not case.implementation.ours else None,
                **case.problem.describe(),
                "note": case.note,
            }
            entry = None
            try:
                entry = self._prepare(group, case, inputs, row)
            except Exception as error:  # a baseline may fail in any way
                row["error"] = _one_line(error)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            ready.append((case, entry, row))
        self.progress.detail(group.title)
        self.timer.interleave([entry for _, entry, _ in ready if entry is not None], group.budget)
        for case, entry, row in ready:
            if entry is not None:
                self._fill(row, case, entry)
                self._timed.append((row, case.problem))
        _add_ratios([row for _, _, row in ready])
        self.rows.extend(row for _, _, row in ready)
        inputs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare(self, group: Group, case: Case, cache: dict[Any, Inputs], row: dict[str, Any]) -> Entry | None:
        gradients = group.measure in GRADIENTS
        row["error_against_float64"] = self._small_error(case, gradients)
        tolerance = row["tolerance"] = TOLERANCES[case.problem.dtype]
        if row["error_against_float64"] > tolerance:
            row["error"] = f"wrong: off by {row['error_against_float64']:.1e} on a small problem"
            return None
        key = (case.problem, gradients)
        if key not in cache:
            cache[key] = make_inputs(case.problem, self.device, gradients)
        inputs = cache[key]
        if group.measure == "forward":
            row["error_against_float64"] = max(row["error_against_float64"], self._slice_error(case, inputs))
            if row["error_against_float64"] > tolerance:
                row["error"] = f"wrong: off by {row['error_against_float64']:.1e} on the problem itself"
                return None
        if case.implementation.prepare is not None:
            made = case.implementation.prepare({name: x.detach() for name, x in inputs.items()})
            inputs = {name: x.requires_grad_(gradients) for name, x in made.items()}
        work = (
            case.build(case.implementation, inputs) if case.build else _work(group.measure, case.implementation, inputs)
        )
        probe = None
        if case.probe_time is not None:
            short = make_inputs(case.problem.smaller(case.probe_time, case.problem.channels), self.device, gradients)
            probe = _work(group.measure, case.implementation, short)
        entry = Entry(work, grad=gradients, best_threads=not case.implementation.ours, probe=probe)
        self.timer.warm_up(entry)
        return entry

    def _small_error(self, case: Case, gradients: bool) -> float:
        problem = case.problem
        key = (case.implementation.name, problem.op, gradients, problem.dtype, problem.channel_last, problem.gated)
        if key not in self._errors:
            self._errors[key] = small_problem_error(case.implementation, problem, gradients, self.device)
        return self._errors[key]

    def _slice_error(self, case: Case, inputs: Inputs) -> float:
        if case.probe_time is not None:
            return 0.0
        with torch.no_grad():
            out = case.implementation.run(
                case.implementation.prepare(inputs) if case.implementation.prepare else inputs
            )
            error = slice_error(case.problem, inputs, out)
            if case.check_tail:
                state = _state_near_end(case, inputs)
                error = max(error, tail_error(case.problem, inputs, out, state))
        return error

    def _fill(self, row: dict[str, Any], case: Case, entry: Entry) -> None:
        seconds = entry.seconds / case.units
        low, high = (x / case.units for x in entry.spread)
        row |= {
            "milliseconds": seconds * 1e3,
            "quartiles": [low * 1e3, high * 1e3],
            "ns_per_element": seconds / case.problem.elements * 1e9,
            "repeats": len(entry.samples),
            "calls_per_repeat": entry.calls * case.units,
            "threads": entry.threads if self.device.type == "cpu" else None,
            "peak_bytes": entry.peak,
        }

    def apply_limits(self, rates: dict[str, Any]) -> None:
        for row, problem in self._timed:
            limit = limit_seconds(problem, row["measure"], rates, self.device.type)
            if limit is not None:
                fraction = limit[0] * 1e3 / row["milliseconds"]
                row |= {"limit_milliseconds": limit[0] * 1e3, "limit": limit[1], "roofline_fraction": fraction}


def _work(measure: str, implementation: Implementation, inputs: Inputs) -> Work:
    if measure not in GRADIENTS:
        return lambda: implementation.run(inputs)
    leaves = [x for x in inputs.values() if x.requires_grad]
    with torch.enable_grad():
        out = implementation.run(inputs) if measure == "backward" else None
    time_like = out if out is not None else next(iter(inputs.values()))  # shaped as the output
    grad_out = torch.randn_like(time_like, requires_grad=False)
    if out is not None:
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    def train() -> tuple[Tensor, ...]:
        result = implementation.run(inputs)
        return result, *torch.autograd.grad(result, leaves, grad_out)

    return train


def _state_near_end(case: Case, inputs: Inputs) -> Tensor:
    import wmkernels

    time = 1 if case.problem.channel_last else 2
    cut = {n: x.narrow(time, 0, x.shape[time] - SLICE_STEPS) if x.dim() == 3 else x for n, x in inputs.items()}
    options: dict[str, Any] = {"delta_softplus": case.problem.gated, "channel_last": case.problem.channel_last}
    return wmkernels.selective_scan(**cut, **options, return_last_state=True, backend=case.implementation.backend)[1]


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    base = rows[0].get("ns_per_element") if rows else None
    for row in rows:
        if base and "ns_per_element" in row:
            row["ratio"] = row["ns_per_element"] / base


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
