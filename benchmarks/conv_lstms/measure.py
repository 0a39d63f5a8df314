"""Runs a group of contenders, which take turns, and makes the rows of the result."""

from typing import Any

import torch
from torch import Tensor

from conv_lstms.baselines import Contender
from conv_lstms.correctness import TOLERANCES, error
from conv_lstms.plan import Group
from conv_lstms.problems import Inputs, Problem, limit_seconds, make_inputs
from harness.memory import saved_bytes
from harness.progress import Progress
from harness.timer import Clock, Entry, Work


class Runner:
    """Measures groups on one device."""

    def __init__(self, device: torch.device, progress: Progress):
        self.device, self.progress = device, progress
        self.clock = Clock(device)
        self.rows: list[dict[str, Any]] = []
        self._timed: list[tuple[dict[str, Any], Problem]] = []

    def run(self, group: Group) -> None:
        self.progress.step(group.title)
        inputs = make_inputs(group.problem, self.device, group.measure == "training")
        ready = []
        for contender in group.contenders:
            self.progress.detail(f"{group.title}: {contender.name}")
            row = {
                "group": group.title,
                "measure": group.measure,
                "contender": contender.name,
                "backend": contender.backend,
                **group.problem.describe(),
            }
            entry = None
            try:
                entry = self._prepare(group, contender, inputs, row)
            except Exception as failure:  # a contender may fail in any way; its row says so and the others go on
                row["error"] = _one_line(failure)
            ready.append((entry, row))
        self.clock.interleave([entry for entry, _ in ready if entry is not None], group.budget)
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

    def _prepare(self, group: Group, contender: Contender, inputs: Inputs, row: dict[str, Any]) -> Entry | None:
        training = group.measure == "training"
        row["error_against_float64"] = error(contender, group.problem, training, self.device)
        row["tolerance"] = TOLERANCES[group.problem.dtype]
        if row["error_against_float64"] > row["tolerance"]:
            row["error"] = f"wrong: off by {row['error_against_float64']:.1e} on a small problem"
            return None
        given = contender.prepare(inputs)
        if training:
            row["saved_bytes"] = saved_bytes(lambda: contender.run(given), given.values())
            x, out = given["x"].nbytes, group.problem.elements * group.problem.dtype.itemsize
            # What the output is, and the input, do not count as saved: h and c are of the output's shape.
            row["activation_bytes"] = {"x": x, "h": out}
        work = _work(training, contender, given)
        if contender.graph:
            with torch.set_grad_enabled(training):
                work = _graphed(work)
        entry = Entry(work, grad=training, best_threads=not contender.ours)
        self.clock.settle(entry)
        return entry

    def apply_limits(self, rates: dict[str, Any]) -> None:
        """Adds to every timed row the least time that these rates allow."""
        for row, problem in self._timed:
            limit = limit_seconds(problem, row["measure"], rates, self.device.type)
            if limit is not None:
                share = limit[0] * 1e3 / row["milliseconds"]
                row |= {"limit_milliseconds": limit[0] * 1e3, "limit": limit[1], "share_of_limit": share}


def _work(training: bool, contender: Contender, inputs: Inputs) -> Work:
    if not training:
        return lambda: contender.run(inputs)
    leaves = list(inputs.values())
    with torch.no_grad():
        grad = torch.randn_like(contender.run(inputs))

    def train() -> tuple[Tensor, ...]:
        out = contender.run(inputs)
        return out, *torch.autograd.grad(out, leaves, grad)

    return train


def _graphed(work: Work) -> Work:
    """The work captured once, to be replayed."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
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
