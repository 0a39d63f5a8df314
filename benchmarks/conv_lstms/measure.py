from typing import Any

import torch
from torch import Tensor

from conv_lstms.baselines import Implementation
from conv_lstms.correctness import TOLERANCES, error
from conv_lstms.plan import Group
from conv_lstms.problems import Inputs, Problem, limit_seconds, make_inputs
from harness.memory import saved_bytes
from harness.progress import Progress
from harness.timer import Entry, Timer, Work


class Runner:
    def __init__(self, device: torch.device, progress: Progress):
        self.device, self.progress = device, progress
        self.timer = Timer(device)
        self.rows: list[dict[str, Any]] = []
        self._timed: list[tuple[dict[str, Any], Problem]] = []

    def run(self, group: Group) -> None:
        self.progress.step(group.title)
        inputs = make_inputs(group.problem, self.device, group.measure == "training")
        ready = []
        for implementation in group.implementations:
            self.progress.detail(f"{group.title}: {implementation.name}")
            row = {
                "group": group.title,
                "measure": group.measure,
                "implementation": implementation.name,
                "backend": implementation.backend,
                **group.problem.describe(),
            }
            entry = None
            try:
                entry = self._prepare(group, implementation, inputs, row)
            except Exception as failure:  # a baseline may fail in any way
                row["error"] = _one_line(failure)
            ready.append((entry, row))
        self.timer.interleave([entry for entry, _ in ready if entry is not None], group.budget)
        for entry, row in ready:
            if entry is not None:
                low, high = entry.spread
                row |= {
                    "milliseconds": entry.seconds * 1e3,
                    "quartiles": [low * 1e3, high * 1e3],
                    "repeats": len(entry.samples),
                    "calls_per_repeat": entry.calls,
                    "threads": entry.threads if self.device.type == "cpu" else None,
                    "peak_bytes": entry.peak,
                }
                self._timed.append((row, group.problem))
        base = ready[0][1].get("milliseconds")
        for _, row in ready:
            if base and "milliseconds" in row:
                row["ratio"] = row["milliseconds"] / base
        self.rows.extend(row for _, row in ready)

    def _prepare(
        self, group: Group, implementation: Implementation, inputs: Inputs, row: dict[str, Any]
    ) -> Entry | None:
        training = group.measure == "training"
        row["error_against_float64"] = error(implementation, group.problem, training, self.device)
        row["tolerance"] = TOLERANCES[group.problem.dtype]
        if row["error_against_float64"] > row["tolerance"]:
            row["error"] = f"wrong: off by {row['error_against_float64']:.1e} on a small problem"
            return None
        given = implementation.prepare(inputs)
        if training:
            row["saved_bytes"] = saved_bytes(lambda: implementation.run(given), given.values())
            x, out = given["x"].nbytes, group.problem.elements * group.problem.dtype.itemsize
            # Input and output are not counted; c has h's shape.
            row["activation_bytes"] = {"x": x, "h": out}
        work = _work(training, implementation, given)
        if implementation.graph:
            with torch.set_grad_enabled(training):
                work = _graphed(work)
        entry = Entry(work, grad=training, best_threads=not implementation.ours)
        self.timer.warm_up(entry)
        return entry

    def apply_limits(self, rates: dict[str, Any]) -> None:
        for row, problem in self._timed:
            limit = limit_seconds(problem, row["measure"], rates, self.device.type)
            if limit is not None:
                fraction = limit[0] * 1e3 / row["milliseconds"]
                row |= {"limit_milliseconds": limit[0] * 1e3, "limit": limit[1], "roofline_fraction": fraction}


def _work(training: bool, implementation: Implementation, inputs: Inputs) -> Work:
    if not training:
        return lambda: implementation.run(inputs)
    leaves = list(inputs.values())
    with torch.no_grad():
        grad = torch.randn_like(implementation.run(inputs))

    def train() -> tuple[Tensor, ...]:
        out = implementation.run(inputs)
        return out, *torch.autograd.grad(out, leaves, grad)

    return train


def _graphed(work: Work) -> Work:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def _one_line(failure: Exception) -> str:
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0] if text else ''}"[:300]
