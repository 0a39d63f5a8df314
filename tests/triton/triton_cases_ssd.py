"""Cases of the SSD scan's Triton kernels against a float64 loop."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from triton_cases import GROUPS, SIXTEEN_BITS, Case, Failures, product, strided

from wmkernels.packed import by_sequence
from wmkernels.ssd_scan import triton_kernels as ssd
from wmkernels.ssd_scan.meta import DIFFERENTIABLE, SSDInputs, kept_interval

NAMES = SSDInputs._fields[:DIFFERENTIABLE]


def loop(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """(out, last state) of one sequence per batch element, or of packed ones, step by step."""
    if inputs.cu_seqlens is not None:
        timed = ("x", "gate", "weight", "B", "C", "own_weight", "z", "reset")
        return by_sequence("ssd_scan", loop, inputs, timed, ("initial_state",), 1)
    x, gate, weight, B, C, own_weight, D, z, state, reset, _ = inputs
    has_state, outputs = state is not None, []
    state = x.new_zeros(inputs.state_shape) if state is None else state
    for t in range(x.shape[1]):
        B_t, C_t = (v[:, t].repeat_interleave(x.shape[2] // v.shape[2], 1) for v in (B, C))
        decayed = gate[:, t].exp()[..., None, None] * state if has_state or t else state
        if reset is not None:
            decayed = torch.where(reset[:, t, None, None, None], 0, decayed)
        here = x[:, t, :, :, None] * B_t[:, :, None]
        state = decayed + weight[:, t, :, None, None] * here
        seen = state if own_weight is None else decayed + own_weight[:, t, :, None, None] * here
        y = (seen * C_t[:, :, None]).sum(-1) + (0 if D is None else D * x[:, t])
        outputs.append(y if z is None else y * F.silu(z[:, t]))
    return (torch.stack(outputs, 1) if outputs else x.clone()), state


def draw(case: Case, generator: torch.Generator) -> SSDInputs:
    dtype = case.get("dtype", torch.float32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch, groups, time = case.get("batch", 1), case.get("groups", 1), case.get("time", 7)
    heads, d, n, bounds = groups * case.get("repeats", 2), case.get("d", 3), case.get("n", 5), None
    layout, optional = case.get("layout", "first"), case.get("optional", "own D z initial").split()
    if "lengths" in case:
        bounds = torch.tensor([0, *case["lengths"]]).cumsum(0)
        batch, time = 1, int(bounds[-1])
    sequences = batch if bounds is None else len(case["lengths"])

    def normal(*shape: int, to: torch.dtype = wide) -> Tensor:
        return strided(torch.randn(shape, generator=generator, dtype=torch.float64).to(to), layout)

    return SSDInputs(
        normal(batch, time, heads, d, to=dtype),
        -normal(batch, time, heads).abs(),
        normal(batch, time, heads).abs(),
        normal(batch, time, groups, n, to=dtype),
        normal(batch, time, groups, n, to=dtype),
        normal(batch, time, heads) if "own" in optional else None,
        normal(heads, d) if "D" in optional else None,
        normal(batch, time, heads, d, to=dtype) if "z" in optional else None,
        normal(sequences, heads, d, n) if "initial" in optional else None,
        torch.rand((batch, time), generator=generator) < case["reset"] if "reset" in case else None,
        bounds,
    )


def check(case: Case, failures: Failures) -> None:
    failures.cases += 1
    generator = torch.Generator().manual_seed(failures.cases)
    inputs, chunk = draw(case, generator), case.get("chunk", 4)
    kept = case.get("kept", 2) * chunk
    exact = [x if x is None or not x.is_floating_point() else x.double().requires_grad_() for x in inputs]
    out, last = loop(SSDInputs(*exact))
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(inputs.x.dtype)
    grad_last = None
    if case.get("grad_last", True):
        grad_last = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(inputs.gate.dtype)
    total = (out * grad_out.double()).sum() + (0 if grad_last is None else (last * grad_last.double()).sum())
    leaves = [x for x in exact[:DIFFERENTIABLE] if x is not None]
    expected = iter(torch.autograd.grad(total, leaves, materialize_grads=True))
    found, found_last, states = ssd.forward(inputs, chunk, kept)
    failures.check(case, "out", found, out.detach())
    failures.check(case, "last_state", found_last, last.detach())
    gradients = ssd.backward(grad_out, grad_last, inputs, states, chunk, kept)
    for name, given, gradient in zip(NAMES, inputs, gradients, strict=False):
        if given is not None:
            failures.check(case, f"grad_{name}", gradient, next(expected))
        elif gradient.shape != (0,):
            failures.lines.append(f"{case}: grad_{name} has shape {tuple(gradient.shape)}, expected (0,)")
    inferred = ssd.forward(inputs, chunk, 0)
    if not torch.equal(inferred[0], found) or inferred[2].numel():
        failures.lines.append(f"{case}: without a backward pass, the output differs or a state is kept")


def check_poison(value: float, failures: Failures) -> None:
    """NaN and infinity do not cross a reset in either direction."""
    failures.cases += 1
    generator = torch.Generator().manual_seed(1)
    inputs, kept = draw({"time": 12, "repeats": 1}, generator), kept_interval(4)
    reset = torch.zeros((1, 12), dtype=torch.bool)
    reset[:, 6] = True
    grad = torch.randn(inputs.x.shape, generator=generator)

    def run(x: Tensor, gate: Tensor, grad: Tensor) -> list[Tensor]:
        given = inputs._replace(x=x, gate=gate, reset=reset)
        out, last, states = ssd.forward(given, 4, kept)
        return [out, last, *ssd.backward(grad, None, given, states, 4, kept)]

    clean = run(inputs.x, inputs.gate, grad)
    x, gate, later = inputs.x.clone(), inputs.gate.clone(), grad.clone()
    x[:, 3], gate[:, 6], later[:, 8] = value, value, value
    spoiled = run(x, gate, grad)
    if not torch.equal(spoiled[0][:, 6:], clean[0][:, 6:]) or not torch.equal(spoiled[1], clean[1]):
        failures.lines.append(f"{value} crosses a reset forwards")
    spoiled = run(inputs.x, inputs.gate, later)
    if not all(torch.equal(a[:, :6], b[:, :6]) for a, b in zip(spoiled[2:8], clean[2:8], strict=True)):
        failures.lines.append(f"{value} in the gradient crosses a reset backwards")


def run(case: Case, failures: Failures) -> None:
    if "poison" in case:
        check_poison(case["poison"], failures)
    else:
        check(case, failures)


GROUPS["SSD scan"] = (
    run,
    [
        {"d": 1, "n": 20},
        {"d": 17, "n": 1, "layout": "last"},
        {"d": 17, "n": 20, "layout": "gaps", "batch": 2},
        *product(optional=["", "own z", "D", "initial"], reset=[0.3]),
        *product(chunk=[1, 5, 20], reset=[0.3], layout=["last"], time=[11]),
        *product(dtype=[*SIXTEEN_BITS, torch.float64], reset=[0.3]),
        *product(lengths=[[5, 0, 6], [0, 3]], optional=["initial", "own z"], reset=[0.2]),
        {"optional": "", "grad_last": False, "groups": 2, "repeats": 1, "time": 9},
        {"reset": 1.0, "optional": "", "time": 5},
        {"d": 40, "n": 300, "time": 5, "repeats": 1},
        {"time": 140, "chunk": 66, "kept": 1, "repeats": 1, "reset": 0.01},
        {"poison": math.nan},
        {"poison": math.inf},
    ],
)
