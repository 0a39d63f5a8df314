"""Cases of the gated delta rule's Triton kernels against the float64 reference."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from triton_cases import GROUPS, SIXTEEN_BITS, Case, Failures, product, strided

from wmkernels.gated_delta_rule import triton_kernels as delta_rule
from wmkernels.gated_delta_rule.meta import DIFFERENTIABLE, DeltaRuleInputs
from wmkernels.gated_delta_rule.reference import gated_delta_rule_reference

NAMES = DeltaRuleInputs._fields[:DIFFERENTIABLE]


def draw(case: Case, generator: torch.Generator) -> DeltaRuleInputs:
    dtype = case.get("dtype", torch.float32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch, heads, time = case.get("batch", 2), case.get("heads", 1), case.get("time", 7)
    d_k, d_v, layout = case.get("d_k", 3), case.get("d_v", 5), case.get("layout", "first")
    bounds = None
    if "lengths" in case:
        bounds = torch.tensor([0, *case["lengths"]]).cumsum(0)
        batch, time = 1, int(bounds[-1])
    sequences = batch if bounds is None else len(case["lengths"])

    def normal(*shape: int, to: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to)

    return DeltaRuleInputs(
        strided(normal(batch, heads, d_k, time, to=dtype), layout),
        strided(F.normalize(normal(batch, heads, d_k, time), dim=2).to(dtype), layout),
        strided(normal(batch, heads, d_v, time, to=dtype), layout),
        strided(-normal(batch, heads, time).abs(), layout),
        strided(normal(batch, heads, time).sigmoid(), layout),
        normal(sequences, heads, d_k, d_v) if case.get("initial", True) else None,
        torch.rand((batch, time), generator=generator) < case["reset"] if "reset" in case else None,
        bounds,
        0.7,
        layout == "last",
    )


def check(case: Case, failures: Failures) -> None:
    failures.cases += 1
    generator = torch.Generator().manual_seed(failures.cases)
    inputs, chunk = draw(case, generator), case.get("chunk", 4)
    exact = [x if x is None or not x.is_floating_point() else x.double().requires_grad_() for x in inputs[:8]]
    out, last = gated_delta_rule_reference(DeltaRuleInputs(*exact, *inputs[8:]))
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(inputs.v.dtype)
    grad_last = None
    if case.get("grad_last", True):
        grad_last = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(inputs.gate.dtype)
    total = (out * grad_out.double()).sum() + (0 if grad_last is None else (last * grad_last.double()).sum())
    leaves = [x for x in exact[:DIFFERENTIABLE] if x is not None]
    expected = torch.autograd.grad(total, leaves, materialize_grads=True)
    found, found_last, *kept = delta_rule.forward(inputs, chunk)
    failures.check(case, "out", found, out.detach())
    failures.check(case, "last_state", found_last, last.detach())
    gradients = delta_rule.backward(grad_out, grad_last, inputs, *kept, chunk)
    for name, gradient, right in zip(NAMES, gradients, expected, strict=False):
        failures.check(case, f"grad_{name}", gradient, right)
    if inputs.initial_state is None and gradients[-1].shape != (0,):
        failures.lines.append(f"{case}: grad_initial_state has shape {tuple(gradients[-1].shape)}, expected (0,)")
    inferred = delta_rule.forward(inputs, 0)
    if not torch.equal(inferred[0], found) or inferred[2].numel() or inferred[3].numel():
        failures.lines.append(f"{case}: without a backward pass, the output differs or something is kept")


def check_poison(value: float, failures: Failures) -> None:
    """NaN and infinity do not cross a reset in either direction."""
    failures.cases += 1
    generator = torch.Generator().manual_seed(1)
    inputs = draw({"time": 12, "heads": 2}, generator)
    reset = torch.zeros((2, 12), dtype=torch.bool)
    reset[:, 6] = True
    grad = torch.randn(inputs.v.shape, generator=generator)

    def run(k: Tensor, gate: Tensor, grad: Tensor) -> list[Tensor]:
        given = inputs._replace(k=k, gate=gate, reset=reset)
        out, last, *kept = delta_rule.forward(given, 4)
        return [out, last, *delta_rule.backward(grad, None, given, *kept, 4)]

    clean = run(inputs.k, inputs.gate, grad)
    k, gate, later = inputs.k.clone(), inputs.gate.clone(), grad.clone()
    k[..., 3], gate[..., 6], later[..., 8] = value, value, value
    spoiled = run(k, gate, grad)
    if not torch.equal(spoiled[0][..., 6:], clean[0][..., 6:]) or not torch.equal(spoiled[1], clean[1]):
        failures.lines.append(f"{value} crosses a reset forwards")
    spoiled = run(inputs.k, inputs.gate, later)
    if not all(torch.equal(a[..., :6], b[..., :6]) for a, b in zip(spoiled[2:7], clean[2:7], strict=True)):
        failures.lines.append(f"{value} in the gradient crosses a reset backwards")


def run(case: Case, failures: Failures) -> None:
    if "poison" in case:
        check_poison(case["poison"], failures)
    else:
        check(case, failures)


GROUPS["delta rule"] = (
    run,
    [
        *product(d_k=[1, 8, 17], d_v=[1, 16], layout=["first", "last"]),
        *product(chunk=[1, 5, 32], reset=[0.3], layout=["gaps"]),
        *product(dtype=[*SIXTEEN_BITS, torch.float64], reset=[0.3]),
        *product(lengths=[[5, 0, 6], [0, 3, 0], [4, 4]], initial=[True, False], reset=[0.2]),
        {"initial": False, "grad_last": False, "heads": 3},
        {"reset": 1.0, "initial": False},
        {"d_k": 70, "d_v": 40, "time": 5, "chunk": 3, "batch": 1, "reset": 0.3, "layout": "last"},
        {"poison": math.nan},
        {"poison": math.inf},
    ],
)
