"""Compares every implementation with the float64 reference before timing.

Small problem: outputs and all gradients. Timed problem: first and last channel, at the first steps and, given the
state, the last. Errors are relative to the largest absolute value.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from scans.baselines import Implementation, ours
from scans.problems import Inputs, Problem, gradient_names, make_inputs
from wmkernels.linear_scan.meta import LinearScanInputs
from wmkernels.linear_scan.reference import linear_scan_reference
from wmkernels.selective_scan.meta import ScanInputs
from wmkernels.selective_scan.reference import selective_scan_reference

# float32: sums of a hundred reordered terms. 16 bits: rounded outputs, and a baseline's intermediate gradients.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
SMALL_TIME, SMALL_CHANNELS = 64, 64
SLICE_STEPS = 192


def small_problem_error(
    implementation: Implementation, problem: Problem, gradients: bool, device: torch.device
) -> float:
    problem = problem.smaller(SMALL_TIME, SMALL_CHANNELS)
    inputs = make_inputs(problem, device, requires_grad=gradients, seed=1)
    exact = {name: x.detach().to("cpu", torch.float64).requires_grad_(gradients) for name, x in inputs.items()}
    with torch.set_grad_enabled(gradients):
        out = implementation.run(implementation.prepare(inputs) if implementation.prepare else inputs)
        expected = reference(problem)(exact)
    error = relative_error(out, expected)
    if gradients:
        names = gradient_names(inputs)
        generator = torch.Generator().manual_seed(2)
        grad_out = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(problem.dtype)
        ours = torch.autograd.grad(out, [inputs[n] for n in names], grad_out.to(device), allow_unused=True)
        exact_gradients = torch.autograd.grad(expected, [exact[n] for n in names], grad_out.double(), allow_unused=True)
        error = max(
            [error, *(relative_error(a, b) for a, b in zip(ours, exact_gradients, strict=True) if b is not None)]
        )
    return error


def slice_error(problem: Problem, inputs: Inputs, out: Tensor) -> float:
    """Compares the first steps."""
    if problem.op not in ("selective_scan", "linear_scan"):
        return 0.0
    return relative_error(_part(out, problem, slice(0, SLICE_STEPS)), _expected_part(problem, inputs))


def tail_error(problem: Problem, inputs: Inputs, out: Tensor, state_before: Tensor) -> float:
    """Compares the last steps, from the state (batch, channels, state) ``SLICE_STEPS`` before the end."""
    channels = [0, problem.channels - 1]
    steps = slice(problem.time - SLICE_STEPS, problem.time)
    state = state_before[:, channels].to("cpu", torch.float64)
    expected = _scan_part(problem, inputs, steps, state)
    return relative_error(_part(out, problem, steps), expected)


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    if found is None:
        return float("inf")
    difference = (found.detach().to("cpu", torch.float64) - expected.detach()).abs()
    if difference.numel() == 0:
        return 0.0
    error = (difference.max() / expected.detach().abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")  # NaN: infinite error


def reference(problem: Problem) -> Callable[[Inputs], Tensor]:
    return _attention if problem.op == "attention" else ours(problem.op, "reference", problem.channel_last).run


def _attention(inputs: Inputs) -> Tensor:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return F.softmax(scores.masked_fill(future, float("-inf")), -1) @ value


def _part(x: Tensor, problem: Problem, steps: slice) -> Tensor:
    """First and last channel: (batch, 2, steps)."""
    x = x.transpose(1, 2) if problem.channel_last else x
    return x[:, [0, problem.channels - 1]][..., steps]


def _expected_part(problem: Problem, inputs: Inputs) -> Tensor:
    steps = slice(0, SLICE_STEPS)
    if problem.op == "linear_scan":
        gates, tokens = (
            _part(inputs[n], problem, steps).detach().to("cpu", torch.float64) for n in ("gates", "tokens")
        )
        return linear_scan_reference(LinearScanInputs(gates, tokens))[0]
    return _scan_part(problem, inputs, steps, None)


def _scan_part(problem: Problem, inputs: Inputs, steps: slice, state: Tensor | None) -> Tensor:
    channels = [0, problem.channels - 1]
    part: dict[str, Tensor] = {}
    for name, x in inputs.items():
        x = x.detach().transpose(1, 2) if problem.channel_last and x.dim() == 3 else x.detach()
        if name in ("u", "delta", "z"):
            x = x[:, channels][..., steps]
        elif name in ("B", "C"):
            x = x[..., steps][:, None]
        else:
            x = x[channels]
        part[name] = x.to("cpu", torch.float64)
    scan = ScanInputs(**part, delta_softplus="delta_bias" in inputs, initial_state=state)
    return selective_scan_reference(scan)[0]
