"""CPU cases: batch 1, 1536 channels (a Mamba of width 768), 16 states per channel, 4 taps; 8 heads of 64 x 64.

The SSD scan has 24 heads of 64 channels and 128 states.
"""

import functools
from dataclasses import replace

import torch

from scans.baselines import Implementation, baselines, ours, state_update
from scans.measure import Case, Group
from scans.problems import Problem

CHANNELS, LONG_CHANNELS = 1536, 96
LENGTHS = (512, 2048, 8192, 32768)
QUICK_CHANNELS, QUICK_LENGTHS = 64, (64, 256)
DELTA_HEAD = 64
SSD_STATE = 128
WIDTH = 4  # of the convolution
LONG_TIMES = (4096, 1048576)
MEMORY_TIME = 65536
# Longer sequences take seconds or gigabytes.
LONGEST = {
    "forward": {
        "best loop": 8192,
        "plain loop": 2048,
        "mambapy": 2048,
        "materialising loop": 512,
        "causal attention": 8192,
    },
    "training": {"best loop": 2048, "plain loop": 512, "mambapy": 512, "materialising loop": 512},
}
PROBE_TIME = 32  # the materialising loop's training step takes tens of seconds


OPS = (
    "selective_scan",
    "selective_step",
    "linear_scan",
    "gated_delta_rule",
    "ssd_scan",
    "causal_conv1d",
    "causal_conv1d_step",
    "attention",
)


class CpuPlan:
    def __init__(self, backends: list[str], lengths: list[int] | None, dtype: torch.dtype, quick: bool):
        self.backends, self.dtype, self.quick = backends, dtype, quick
        self.lengths = lengths or list(QUICK_LENGTHS if quick else LENGTHS)
        self.channels = QUICK_CHANNELS if quick else CHANNELS
        self.budget = 0.2 if quick else 3.0
        device = torch.device("cpu")
        self.missing: dict[str, str] = {}
        self.baselines: dict[str, list[Implementation]] = {}
        for op in OPS:
            self.baselines[op], missing = baselines(op, device)
            self.missing |= missing

    def problem(self, time: int, op: str = "selective_scan") -> Problem:
        return Problem(op, 1, self.channels, time, self.dtype)

    def groups(self) -> list[Group]:
        found = [self.sweep("forward", time) for time in self.lengths]
        found += [self.sweep("training", time) for time in self.lengths if time <= 8192]
        found += [self.variants(measure) for measure in ("forward", "training")]
        found += [self.step(), self.linear("forward"), self.linear("training")]
        found += [self.delta(measure) for measure in ("forward", "training")]
        found += [self.ssd(measure) for measure in ("forward", "training")]
        found += [self.convolution(measure) for measure in ("forward", "training", "step")]
        if not self.quick:
            found.append(self.long())
        return found

    def sweep(self, measure: str, time: int) -> Group:
        problem = self.problem(time)
        group = Group(f"{measure}, {time:,} steps", measure, budget=self.budget)
        group.cases = [Case(ours("selective_scan", backend), problem) for backend in self.backends]
        for baseline in [*self.baselines["selective_scan"], *self.baselines["attention"]]:
            if time > LONGEST[measure].get(baseline.name, 0):
                continue
            slow = baseline.name == "materialising loop" and measure == "training" and time > PROBE_TIME
            probe = PROBE_TIME if slow and not self.quick else None
            note = "timed once: a call takes tens of seconds" if probe else ""
            group.cases.append(Case(baseline, replace(problem, op=baseline.op), probe, note=note))
        return group

    def variants(self, measure: str) -> Group:
        """Other dtypes, layouts and options."""
        problem = self.problem(256 if self.quick else 2048)
        backend = self.backends[0]
        case = functools.partial(Case, ours("selective_scan", backend))
        last = Case(ours("selective_scan", backend, channel_last=True), replace(problem, channel_last=True))
        half = replace(problem, dtype=torch.bfloat16)
        both = Case(last.implementation, replace(half, channel_last=True))
        cases = [case(problem), last, case(half), both, case(replace(problem, gated=True))]
        return Group(f"{measure}, {problem.time:,} steps, variants", measure, cases, self.budget)

    def step(self) -> Group:
        problem = replace(self.problem(1, "selective_step"))
        cases = [Case(ours("selective_step", backend), problem) for backend in self.backends]
        if "cpu" in self.backends:
            cases.append(Case(state_update(), problem))
        cases += [Case(baseline, problem) for baseline in self.baselines["selective_step"]]
        return Group("one step", "step", cases, self.budget / 4)

    def linear(self, measure: str) -> Group:
        time = 256 if self.quick else 4096
        problem = self.problem(time, "linear_scan")
        cases = [Case(ours("linear_scan", backend), problem) for backend in self.backends]
        last = replace(problem, channel_last=True)
        cases += [Case(ours("linear_scan", backend, channel_last=True), last) for backend in self.backends]
        slow = "training" if measure == "training" else ""
        cases += [
            Case(baseline, problem)
            for baseline in self.baselines["linear_scan"]
            if not (slow and baseline.name == "mambapy")
        ]
        return Group(f"linear scan, {measure}, {time:,} steps", measure, cases, self.budget)

    def delta(self, measure: str) -> Group:
        channels, time = (DELTA_HEAD, 128) if self.quick else (8 * DELTA_HEAD, 2048)
        problem = Problem("gated_delta_rule", 1, channels, time, self.dtype, state=DELTA_HEAD)
        cases = [Case(ours(problem.op, backend), problem) for backend in self.backends]
        last = replace(problem, channel_last=True)
        cases += [Case(ours(problem.op, backend, channel_last=True), last) for backend in self.backends]
        cases += [Case(ours(problem.op, "chunked"), problem)]
        cases += [Case(baseline, problem) for baseline in self.baselines[problem.op]]
        return Group(f"gated delta rule, {measure}, {time:,} steps", measure, cases, self.budget)

    def ssd_problem(self) -> Problem:
        return Problem("ssd_scan", 1, self.channels, 256 if self.quick else 2048, self.dtype, state=SSD_STATE)

    def ssd(self, measure: str) -> Group:
        problem = self.ssd_problem()
        backends = [*self.backends, *(["chunked"] if "chunked" not in self.backends else [])]
        cases = [Case(ours(problem.op, backend), problem) for backend in backends]
        cases += [Case(baseline, problem) for baseline in self.baselines[problem.op]]
        return Group(f"SSD scan, {measure}, {problem.time:,} steps", measure, cases, self.budget)

    def convolution(self, measure: str) -> Group:
        time = 1 if measure == "step" else 256 if self.quick else 2048
        op = "causal_conv1d_step" if measure == "step" else "causal_conv1d"
        problem = Problem(op, 1, self.channels, time, self.dtype, state=WIDTH)
        cases = [Case(ours(op, backend), problem) for backend in self.backends]
        if measure != "step":
            last = replace(problem, channel_last=True)
            cases += [Case(ours(op, backend, channel_last=True), last) for backend in self.backends]
        cases += [Case(baseline, problem) for baseline in self.baselines[op]]
        return Group(f"causal convolution, {measure}, {time:,} steps", measure, cases, self.budget / 4)

    def long(self) -> Group:
        """Tests whether the time per step is constant."""
        implementation = ours("selective_scan", self.backends[0])
        short, long = (Problem("selective_scan", 1, LONG_CHANNELS, time, self.dtype) for time in LONG_TIMES)
        cases = [Case(implementation, short), Case(implementation, long, check_tail=True)]
        return Group(f"forward, {LONG_CHANNELS} channels, short and long sequence", "forward", cases, self.budget)

    def memory(self) -> dict[str, tuple[Implementation, Problem]]:
        """By name in the result."""
        time, backend = 2048 if self.quick else MEMORY_TIME, self.backends[0]
        return {
            "training_memory": (ours("selective_scan", backend), self.problem(time)),
            "ssd_training_memory": (ours("ssd_scan", backend), self.ssd_problem()),
        }
