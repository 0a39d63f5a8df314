"""GPU cases: 16-bit data, 16 states per channel, called as by a Mamba layer (z, bias, softplus); heads of 64 x 64."""

from dataclasses import replace
from typing import Any

import torch

from harness.timer import Entry, Timer, Work
from scans.baselines import Implementation, baselines, ours
from scans.correctness import SLICE_STEPS, TOLERANCES, slice_error, tail_error
from scans.measure import Case, Group
from scans.problems import Inputs, Problem, make_inputs

LENGTHS = (1024, 4096, 16384, 65536, 262144)
LONG_TIMES = (4096, 262144)
MEMORY_TIME = 65536
# mamba_ssm's 32-bit offsets overflow past about 61,000 steps.
LONGEST = {
    "best loop": 4096,
    "compiled loop": 1024,
    "mambapy": 4096,
    "mamba_ssm": 32768,
    "causal attention": 65536,
    "loop": 4096,
}
GRAPH_STEPS = 64
DELTA_HEAD = 64
SSD_STATE = 128
VERY_LONG_TIME = 1 << 20
WIDTH = 4  # of the convolution
BASELINES = (
    "selective_scan",
    "selective_step",
    "linear_scan",
    "gated_delta_rule",
    "causal_conv1d",
    "causal_conv1d_step",
    "ssd_scan",
    "attention",
)


class CudaPlan:
    def __init__(self, backends: list[str], lengths: list[int] | None, dtype: torch.dtype, quick: bool):
        self.backends, self.dtype, self.quick = backends, dtype, quick
        self.lengths = lengths or ([256, 1024] if quick else list(LENGTHS))
        self.budget = 0.1 if quick else 1.0
        device = torch.device("cuda")
        self.missing: dict[str, str] = {}
        self.baselines: dict[str, list[Implementation]] = {}
        for op in BASELINES:
            self.baselines[op], missing = baselines(op, device)
            self.missing |= missing

    def problem(self, batch: int, channels: int, time: int, op: str = "selective_scan") -> Problem:
        if self.quick:
            batch, channels, time = min(batch, 2), min(channels, 128), min(time, 1024)
        return Problem(op, batch, channels, time, self.dtype, gated=op == "selective_scan")

    def groups(self) -> list[Group]:
        found = []
        for batch, channels, time in ((8, 1536, 4096), (1, 128, 32768)):
            found += [self.scan(measure, batch, channels, time) for measure in ("forward", "backward")]
        found += [self.sweep(time) for time in self.lengths]
        found += [self.long(measure) for measure in ("forward", "backward")]
        found += [self.variants(measure) for measure in ("forward", "backward")]
        found += [self.linear(measure) for measure in ("forward", "backward")]
        found += [self.delta(measure) for measure in ("forward", "training")]
        found += [self.convolution(measure) for measure in ("forward", "training")]
        found += [self.ssd(measure) for measure in ("forward", "training")]
        found += [self.step(), self.convolution_step()]
        return found

    def scan(self, measure: str, batch: int, channels: int, time: int) -> Group:
        problem = self.problem(batch, channels, time)
        cases = [Case(ours("selective_scan", backend), problem) for backend in self.backends]
        cases += [
            Case(baseline, problem)
            for baseline in self._asked("selective_scan", problem.time)
            if baseline.name == "mamba_ssm"
        ]
        return Group(f"{measure}, {_sizes(problem)}", measure, cases, self.budget)

    def sweep(self, time: int) -> Group:
        problem = self.problem(1, 1536, time)
        cases = [Case(ours("selective_scan", backend), problem) for backend in self.backends]
        for baseline in [*self._asked("selective_scan", time), *self._asked("attention", time)]:
            if baseline.name not in ("materialising loop", "plain loop"):
                cases.append(Case(baseline, replace(problem, op=baseline.op, gated=baseline.op == "selective_scan")))
        return Group(f"forward, {_sizes(problem)}", "forward", cases, self.budget)

    def long(self, measure: str) -> Group:
        """Tests whether the time per element is constant."""
        short, long = (self.problem(1, 1536, time) for time in LONG_TIMES)
        cases = []
        for backend in self.backends:
            implementation = ours("selective_scan", backend)
            cases += [
                Case(implementation, short),
                Case(implementation, long, check_tail=measure == "forward" and not self.quick),
            ]
        return Group(f"{measure}, B1 D1536, short and long sequence", measure, cases, self.budget)

    def variants(self, measure: str) -> Group:
        problem = self.problem(8, 1536, 2048)
        cases = []
        for backend in self.backends:
            plain = ours("selective_scan", backend)
            last = ours("selective_scan", backend, channel_last=True)
            cases += [
                Case(plain, problem),
                Case(plain, replace(problem, gated=False)),
                Case(last, replace(problem, channel_last=True)),
                Case(plain, replace(problem, dtype=torch.float32)),
            ]
        return Group(f"{measure}, {_sizes(problem)}, variants", measure, cases, self.budget)

    def linear(self, measure: str) -> Group:
        problem = self.problem(8, 1536, 4096, "linear_scan")
        cases = [Case(ours("linear_scan", backend), problem) for backend in self.backends]
        cases += [
            Case(baseline, problem) for baseline in self._asked("linear_scan", problem.time) if baseline.name != "loop"
        ]
        wide = replace(problem, dtype=torch.float32)
        cases += [Case(ours("linear_scan", backend), wide) for backend in self.backends]
        last = replace(problem, channel_last=True)
        cases += [Case(ours("linear_scan", backend, channel_last=True), last) for backend in self.backends]
        return Group(f"linear scan, {measure}, {_sizes(problem)}", measure, cases, self.budget)

    def delta(self, measure: str) -> Group:
        """Eight heads, as on a CPU, and as many as fill a GPU."""
        few = replace(self.problem(1, 8 * DELTA_HEAD, 2048, "gated_delta_rule"), dtype=torch.float32, state=DELTA_HEAD)
        many = replace(self.problem(8, 16 * DELTA_HEAD, 4096, "gated_delta_rule"), state=DELTA_HEAD)
        cases = []
        for backend in self.backends:
            plain, last = (ours("gated_delta_rule", backend, channel_last=x) for x in (False, True))
            cases += [Case(plain, few), Case(plain, many), Case(last, replace(many, channel_last=True))]
        cases.append(Case(ours("gated_delta_rule", "chunked"), few))
        cases += [Case(baseline, few) for baseline in self.baselines["gated_delta_rule"]]
        return Group(f"gated delta rule, {measure}, {_sizes(few)} and {_sizes(many)}", measure, cases, self.budget)

    def ssd(self, measure: str) -> Group:
        """24 heads of one sequence, and of as many as fill a GPU."""
        few = replace(self.problem(1, 1536, 2048, "ssd_scan"), dtype=torch.float32, state=SSD_STATE)
        many = replace(self.problem(8, 1536, 4096, "ssd_scan"), state=SSD_STATE)
        cases = []
        for backend in self.backends:
            kernel = ours("ssd_scan", backend)
            cases += [Case(kernel, few), Case(kernel, many)]
        cases.append(Case(ours("ssd_scan", "chunked"), few))
        cases += [Case(baseline, few) for baseline in self.baselines["ssd_scan"]]
        return Group(f"SSD scan, {measure}, {_sizes(few)} and {_sizes(many)}", measure, cases, self.budget / 4)

    def step(self) -> Group:
        problem = self.problem(1, 1536, 1, "selective_step")
        implementations = [
            *(ours("selective_step", backend) for backend in self.backends),
            *self.baselines["selective_step"],
        ]
        note = f"device time per step of {GRAPH_STEPS} consecutive steps in one CUDA graph"
        cases = [Case(c, problem, build=_graph, units=GRAPH_STEPS, note=note) for c in implementations]
        return Group("one step in a CUDA graph, B1 D1536", "step", cases, self.budget)

    def convolution(self, measure: str) -> Group:
        problem = replace(self.problem(8, 1536, 4096, "causal_conv1d"), state=WIDTH)
        wide, last = replace(problem, dtype=torch.float32), replace(problem, channel_last=True)
        cases = []
        for backend in self.backends:
            plain = ours("causal_conv1d", backend)
            cases += [Case(plain, problem), Case(plain, wide)]
            cases.append(Case(ours("causal_conv1d", backend, channel_last=True), last))
        cases += [Case(baseline, x) for x in (problem, wide) for baseline in self.baselines["causal_conv1d"]]
        return Group(f"causal convolution, {measure}, {_sizes(problem)}", measure, cases, self.budget / 4)

    def convolution_step(self) -> Group:
        problem = replace(self.problem(1, 1536, 1, "causal_conv1d_step"), state=WIDTH)
        implementations = [
            *(ours("causal_conv1d_step", backend) for backend in self.backends),
            *self.baselines["causal_conv1d_step"],
        ]
        note = f"device time per step of {GRAPH_STEPS} consecutive steps in one CUDA graph"
        cases = [Case(c, problem, build=_graph, units=GRAPH_STEPS, note=note) for c in implementations]
        return Group("one convolution step in a CUDA graph, B1 D1536", "step", cases, self.budget / 4)

    def memory(self) -> dict[str, tuple[Implementation, Problem]]:
        """By name in the result."""
        problem = self.problem(1, 1536, MEMORY_TIME)
        return {"training_memory": (ours("selective_scan", self.backends[0]), problem)}

    def very_long(self, device: torch.device) -> list[dict[str, Any]]:
        """A million steps, and more than 2^31 elements."""
        if self.quick:
            return []
        found = []
        for backend in self.backends:
            for channels in (96, (1 << 31) // VERY_LONG_TIME + 64):
                problem = replace(self.problem(1, channels, VERY_LONG_TIME), gated=False)
                for measure in ("forward", "backward"):
                    found.append(_very_long(ours("selective_scan", backend), problem, measure, device))
                    torch.cuda.empty_cache()
        return found

    def _asked(self, op: str, time: int) -> list[Implementation]:
        return [baseline for baseline in self.baselines[op] if time <= LONGEST.get(baseline.name, 1 << 62)]


def _sizes(problem: Problem) -> str:
    return f"B{problem.batch} D{problem.channels} L{problem.time:,}"


def _graph(implementation: Implementation, inputs: Inputs) -> Work:
    """All steps start from the same state: implementations return only outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            implementation.run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for _ in range(GRAPH_STEPS):
            implementation.run(inputs)
    return graph.replay


def _very_long(implementation: Implementation, problem: Problem, measure: str, device: torch.device) -> dict[str, Any]:
    """Compares first and last steps (backward: gradients at the last) of two channels."""
    elements = f"{problem.elements / 2**31:.2f} × 2^31 elements"
    name = f"{implementation.name}, {measure}, {problem.time:,} steps, {problem.channels} channels ({elements})"
    entry: dict[str, Any] = {**problem.describe(), "name": name, "measure": measure}
    try:
        if measure == "forward":
            inputs = make_inputs(problem, device)
            with torch.no_grad():
                out = implementation.run(inputs)
                error = slice_error(problem, inputs, out)
                error = max(error, tail_error(problem, inputs, out, _state_before_tail(implementation, inputs)))
            del out
            work, grad = (lambda: implementation.run(inputs)), False
        else:
            inputs = make_inputs(problem, device, requires_grad=True)
            leaves = [inputs["u"], inputs["delta"], inputs["A"], inputs["B"], inputs["C"], inputs["D"]]
            with torch.enable_grad():
                out = implementation.run(inputs)
            grad_out = torch.randn(problem.batch, problem.channels, problem.time, device=device, dtype=problem.dtype)
            gradients = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
            error = _tail_gradient_error(implementation, problem, inputs, grad_out, gradients)
            del gradients
            work, grad = (lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)), True
        timer = Timer(device)
        timed = Entry(work, grad=grad)
        samples = sorted(timer.sample(timed) for _ in range(3))
        entry |= {"milliseconds": samples[1] * 1e3, "ns_per_element": samples[1] / problem.elements * 1e9}
        entry |= {"worst_error": error, "correct": error <= TOLERANCES[problem.dtype]}
    except Exception as error:  # mostly out of memory
        entry["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        entry["correct"] = None
    return entry


def _state_before_tail(implementation: Implementation, inputs: Inputs) -> torch.Tensor:
    import wmkernels

    cut = {n: x[..., : x.shape[2] - SLICE_STEPS] if x.dim() == 3 else x for n, x in inputs.items()}
    return wmkernels.selective_scan(**cut, return_last_state=True, backend=implementation.backend)[1]


def _tail_gradient_error(
    implementation: Implementation,
    problem: Problem,
    inputs: Inputs,
    grad_out: torch.Tensor,
    gradients: tuple[torch.Tensor, ...],
) -> float:
    import wmkernels
    from scans.correctness import relative_error

    channels, tail = [0, problem.channels - 1], slice(problem.time - SLICE_STEPS, problem.time)
    with torch.no_grad():
        state = _state_before_tail(implementation, inputs)[:, channels].to("cpu", torch.float64)
    part = {}
    for name, x in inputs.items():
        if name in ("u", "delta"):
            x = x[:, channels, tail]
        elif name in ("B", "C"):
            x = x[..., tail]
        else:
            x = x[channels]
        part[name] = x.detach().to("cpu", torch.float64).requires_grad_(True)
    out = wmkernels.selective_scan(**part, initial_state=state, backend="reference")
    upstream = grad_out[:, channels, tail].to("cpu", torch.float64)
    truth = torch.autograd.grad(out, [part["u"], part["delta"]], upstream)
    return max(relative_error(g[:, channels, tail], t) for g, t in zip(gradients[:2], truth, strict=True))
