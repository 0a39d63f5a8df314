"""Cases of the Triton kernels against the float64 reference, without a GPU.

Deterministic mode fills new memory with NaN, which exposes unwritten elements.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmkernels.linear_scan import triton_kernels as linear
from wmkernels.linear_scan.meta import LinearScanInputs
from wmkernels.linear_scan.reference import linear_scan_reference
from wmkernels.selective_scan import triton_kernels as selective
from wmkernels.selective_scan.meta import ScanInputs
from wmkernels.selective_scan.reference import selective_scan_reference
from wmkernels.selective_step import triton_kernels as selective_step
from wmkernels.selective_step.meta import StepInputs
from wmkernels.selective_step.reference import per_channel, selective_step_reference

# Largest error relative to the tensor's largest magnitude. Sums and exponentials lose a few 2^-24 in float32;
# float16 rounds to 2^-11, bfloat16 to 2^-7 (the interpreter truncates).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 6e-4}
Case = dict[str, Any]


class Failures:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.cases = 0

    def check(self, case: Any, name: str, found: Tensor, expected: Tensor, roundings: int = 1) -> None:
        """``expected`` is float64; ``roundings``: number of roundings to this dtype."""
        tolerance = roundings * TOLERANCE[found.dtype]
        if found.shape != expected.shape:
            self.lines.append(f"{case}: {name} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
            return
        if found.numel() == 0:
            return
        scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item() + 1e-3
        error = (found.double() - expected).abs().max().item() / scale
        same = torch.isclose(found.double(), expected, rtol=0, atol=tolerance * scale, equal_nan=True).all()
        if not same:
            self.lines.append(f"{case}: {name} is off by {error:.3g} of its largest magnitude, allowed {tolerance:g}")


def strided(x: Tensor, layout: str) -> Tensor:
    """ "first": time contiguous; "last": channels contiguous; "gaps": neither."""
    if layout == "last":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "gaps":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype)
        wide[..., 1 : 2 * x.shape[-1] + 1 : 2] = x
        return wide[..., 1 : 2 * x.shape[-1] + 1 : 2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


def draw(case: Case, generator: torch.Generator) -> dict[str, Any]:
    dtype = case.get("dtype", torch.float32)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    batch, channels = case.get("batch", 2), case.get("channels", 5)
    state, time = case.get("state", 3), case.get("time", 19)
    groups, layout = case.get("groups", 1), case.get("layout", "first")
    cu_seqlens = None
    if "lengths" in case:
        bounds = np.cumsum([0, *case["lengths"]])
        cu_seqlens, batch, time = torch.tensor(bounds), 1, int(bounds[-1])
    sequences = batch if cu_seqlens is None else len(case["lengths"])

    def random(*shape: int, to: torch.dtype = parameter) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to)

    def projection(varies: bool) -> Tensor:
        return strided(random(batch, groups, state, time, to=dtype), layout) if varies else random(channels, state)

    optional = case.get("optional", "D z delta_bias initial_state").split()
    reset = torch.rand((batch, time), generator=generator) < case["reset"] if "reset" in case else None
    if reset is not None:
        reset[:, 0] = case.get("reset_first", False)
    # Bounded: without softplus, negative steps make states grow.
    spread, shift = (2.0, -1.0) if case.get("softplus", True) else (0.2, 0.3)
    return {
        "u": strided(random(batch, channels, time, to=dtype), layout),
        "delta": strided(random(batch, channels, time, to=dtype) * spread + shift, layout),
        "A": strided(-random(channels, state).abs(), "gaps"),
        "B": projection(case.get("B_varies", True)),
        "C": projection(case.get("C_varies", True)),
        "D": random(channels) if "D" in optional else None,
        "z": strided(random(batch, channels, time, to=dtype), layout) if "z" in optional else None,
        "delta_bias": random(channels) * 0.2 if "delta_bias" in optional else None,
        "initial_state": random(sequences, channels, state) if "initial_state" in optional else None,
        "reset": reset,
        "cu_seqlens": cu_seqlens,
    }


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def check_scan(case: Case, failures: Failures) -> None:
    failures.cases += 1
    generator = torch.Generator().manual_seed(failures.cases)
    inputs = draw(case, generator)
    softplus, chunk, segment = case.get("softplus", True), case.get("chunk", 8), case.get("segment", 0)
    channel_last = case.get("layout") == "last"
    exact = {k: v.double().requires_grad_() if k in NAMES and v is not None else v for k, v in inputs.items()}
    out, last = selective_scan_reference(ScanInputs(**exact, delta_softplus=softplus))
    dtype = inputs["u"].dtype
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    grad_last = None
    if case.get("grad_last", True):
        grad_last = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(inputs["A"].dtype)
    present = [exact[name] for name in NAMES if exact[name] is not None]
    total = (out * grad_out.double()).sum() + (0 if grad_last is None else (last * grad_last.double()).sum())
    exact_gradients = torch.autograd.grad(total, present, materialize_grads=True)
    expected = dict(zip([n for n in NAMES if exact[n] is not None], exact_gradients, strict=True))
    scan = ScanInputs(**inputs, delta_softplus=softplus, channel_last=channel_last)
    found, found_last, chunk_states = selective.forward(scan, chunk, segment_length=segment)
    failures.check(case, "out", found, out.detach())
    failures.check(case, "last_state", found_last, last.detach())
    if not case.get("gradients", True):
        return
    gradients = selective.backward(grad_out, grad_last, scan, chunk_states, chunk, segment_length=segment)
    for name, gradient in zip(NAMES, gradients, strict=True):
        if name in expected:
            failures.check(case, f"grad_{name}", gradient, expected[name])
        elif gradient.shape != (0,):
            failures.lines.append(f"{case}: grad_{name} has shape {tuple(gradient.shape)}, expected (0,)")


def check_step(case: Case, failures: Failures) -> None:
    failures.cases += 1
    generator = torch.Generator().manual_seed(failures.cases)
    inputs = draw({**case, "time": 1, "layout": "first"}, generator)
    batch, channels, _ = inputs["u"].shape
    state_dtype = case.get("state_dtype", inputs["A"].dtype)
    state = torch.randn((batch + 2, channels, inputs["A"].shape[1]), generator=generator).to(state_dtype)
    if case.get("layout") == "gaps":
        state = strided(state, "gaps")
    flat = {k: inputs[k] if inputs[k] is None else inputs[k][..., 0] for k in ("u", "delta", "z", "B", "C")}
    reset = None if inputs["reset"] is None else inputs["reset"][:, 0]
    indices = torch.tensor([batch + 1, -1, 0, 1][:batch]) if case.get("indices") else None
    rows = torch.arange(batch) if indices is None else indices.clamp(min=0)
    if indices is None:
        state = state[:batch]
    parameters = {k: inputs[k] for k in ("A", "D", "delta_bias")}
    exact = {k: None if v is None else v.double() for k, v in {**flat, **parameters}.items()}
    B, C = (per_channel(exact.pop(k), channels) for k in ("B", "C"))
    softplus = case.get("softplus", True)
    out, new = selective_step_reference(
        StepInputs(state[rows].double(), B=B, C=C, reset=reset, delta_softplus=softplus, **exact)
    )
    expected = state.double().clone()
    for b in range(batch):
        if indices is not None and indices[b] < 0:
            out[b] = 0
        else:
            expected[rows[b]] = new[b]
    target = state if case.get("in_place", True) else torch.full_like(state, float("nan"))
    if not case.get("in_place", True) and indices is not None:
        target = state.clone()
    step = StepInputs(state, **flat, **parameters, reset=reset, delta_softplus=softplus)
    found = selective_step.step(step, target, indices)
    failures.check(case, "out", found, out)
    failures.check(case, "state", target, expected)


def check_linear(case: Case, failures: Failures) -> None:
    failures.cases += 1
    generator = torch.Generator().manual_seed(failures.cases)
    dtype = case.get("dtype", torch.float32)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    batch, channels, time = case.get("batch", 2), case.get("channels", 5), case.get("time", 19)
    layout, reverse, segment = case.get("layout", "first"), case.get("reverse", False), case.get("segment", 0)

    def random(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to)

    gates = strided((random(batch, channels, time) * 0.6).to(dtype), layout)
    tokens, initial = strided(random(batch, channels, time), layout), random(batch, channels, to=parameter)
    reset = torch.rand((batch, time), generator=generator) < case["reset"] if "reset" in case else None
    if reset is not None and "reset_first" in case:
        reset[:, 0] = case["reset_first"]
    initial_state = initial if case.get("initial", True) else None
    grad_out = random(batch, channels, time)
    grad_last = random(batch, channels, to=parameter) if case.get("grad_last", True) else None
    exact = [x.double().requires_grad_() for x in (gates, tokens, initial)]
    first = None if initial_state is None else exact[2]
    out, last = linear_scan_reference(LinearScanInputs(exact[0], exact[1], first, reset, reverse))
    total = (out * grad_out.double()).sum() + (0 if grad_last is None else (last * grad_last.double()).sum())
    expected = torch.autograd.grad(total, exact, allow_unused=True)
    channel_last = layout == "last"
    scan = LinearScanInputs(gates, tokens, initial_state, reset, reverse, channel_last)
    found, found_last = linear.forward(scan, segment_length=segment)
    failures.check(case, "out", found, out.detach())
    failures.check(case, "last_state", found_last, last.detach())
    gradients = linear.backward(grad_out, grad_last, scan, found, segment_length=segment)
    # dL/dgates reads the rounded forward output.
    for name, gradient, right in zip(("gates", "tokens", "initial_state"), gradients, expected, strict=True):
        if right is not None:
            failures.check(case, f"grad_{name}", gradient, right, 2 if name == "gates" else 1)
        elif gradient.shape != (0,):
            failures.lines.append(f"{case}: grad_{name} has shape {tuple(gradient.shape)}, expected (0,)")


def product(**options: list[Any]) -> list[Case]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


SIXTEEN_BITS = [torch.bfloat16, torch.float16]
GROUPS: dict[str, tuple[Callable[[Case, Failures], None], list[Case]]] = {
    "scan: state sizes": (
        check_scan,
        [
            *product(state=[1, 2, 3, 16, 17], layout=["first", "last"], time=[21]),
            {"state": 64, "channels": 3, "time": 9},
            {"state": 256, "channels": 2, "time": 5, "batch": 1},
        ],
    ),
    "scan: time": (
        check_scan,
        [
            *product(time=[1, 7, 16], chunk=[16], segment=[0]),
            *product(time=[37], chunk=[1, 3, 4, 16, 64], segment=[0]),
            *[{"time": 37, "chunk": c, "segment": s} for c, s in ((1, 5), (4, 4), (4, 12), (8, 16), (16, 32))],
            {"time": 1100, "channels": 1, "batch": 1, "chunk": 64, "optional": ""},
        ],
    ),
    "scan: resets": (
        check_scan,
        [
            *product(reset=[0.3], reset_first=[False, True], segment=[0, 8], z=[1]),
            {"reset": 1.0, "reset_first": True},
            {"reset": 0.2, "B_varies": False, "C_varies": False, "segment": 16},
            {"reset": 0.2, "dtype": torch.float64, "chunk": 4, "segment": 8},
        ],
    ),
    "scan: packed": (
        check_scan,
        [
            *product(lengths=[[5, 0, 14, 7]], segment=[0, 8], chunk=[4, 8], reset=[0.2]),
            *product(lengths=[[0, 3, 0], [1, 1, 1], [16, 16]], segment=[0, 16], chunk=[8]),
            {"lengths": [9, 8, 0], "optional": "", "grad_last": False, "layout": "last"},
        ],
    ),
    "scan: options": (
        check_scan,
        [
            *product(optional=["", "D", "z", "delta_bias", "initial_state", "D z"], softplus=[True, False]),
            *product(B_varies=[True, False], C_varies=[True, False], layout=["gaps"]),
            *product(channels=[6, 70], groups=[2], segment=[0, 8], time=[12]),
            {"layout": "expanded", "grad_last": False},
            {"channels": 6, "groups": 6},
            {"gradients": False, "chunk": 0},
            {"gradients": False, "chunk": 0, "segment": 8, "reset": 0.2},
        ],
    ),
    "scan: dtypes": (
        check_scan,
        [
            *product(dtype=[*SIXTEEN_BITS, torch.float64], layout=["first", "last", "gaps"], segment=[0, 8]),
            *product(dtype=[torch.bfloat16], B_varies=[False], C_varies=[False]),
        ],
    ),
    "step": (
        check_step,
        [
            *product(indices=[False, True], in_place=[False, True], reset=[0.5], reset_first=[False, True], batch=[4]),
            *product(state=[1, 17, 256], groups=[1, 2], channels=[6], layout=["gaps"], indices=[True]),
            *product(dtype=[*SIXTEEN_BITS, torch.float64], optional=["", "D z delta_bias"], softplus=[False, True]),
            *product(dtype=SIXTEEN_BITS, state_dtype=SIXTEEN_BITS),
            {"channels": 700, "state": 3},
        ],
    ),
    "linear": (
        check_linear,
        [
            *product(reverse=[False, True], layout=["first", "last", "gaps"], segment=[0, 8], reset=[0.3]),
            *product(reverse=[False, True], reset=[0.3], reset_first=[False, True], segment=[0, 5]),
            *product(reverse=[False, True], dtype=[*SIXTEEN_BITS, torch.float64], layout=["first", "last"]),
            *product(reverse=[False, True], initial=[False, True], grad_last=[False, True]),
            *product(reverse=[False, True], time=[1, 64, 300], channels=[37], batch=[1], layout=["first", "last"]),
            *product(reverse=[False, True], time=[1100], channels=[1], batch=[1]),
        ],
    ),
}


def check_poison(_: Case, failures: Failures) -> None:
    """NaN and infinity do not cross a reset in either direction, in any pass."""
    for segment in (0, 8):
        failures.cases += 1
        generator = torch.Generator().manual_seed(failures.cases)
        inputs = draw({"time": 24, "optional": "D z"}, generator)
        reset = torch.zeros((2, 24), dtype=torch.bool)
        reset[:, 12] = True
        tensors = [inputs[n] for n in NAMES] + [reset, None]
        grad = torch.randn((2, 5, 24), generator=generator)

        def run(u: Tensor, grad: Tensor, tensors: list[Any] = tensors, segment: int = segment) -> tuple[Tensor, ...]:
            scan = ScanInputs(u, *tensors[1:], delta_softplus=True)
            out, last, saved = selective.forward(scan, 4, segment_length=segment)
            gradients = selective.backward(grad, None, scan, saved, 4, segment_length=segment)
            return out, last, gradients[0], gradients[1]

        clean = run(inputs["u"], grad)
        for value in (float("nan"), float("inf")):
            u, later = inputs["u"].clone(), grad.clone()
            u[:, :, 3] = value
            spoiled = run(u, grad)
            same = all(torch.equal(a[..., 12:], b[..., 12:]) for a, b in zip(clean[::2], spoiled[::2], strict=True))
            if not same or not torch.equal(clean[1], spoiled[1]):
                failures.lines.append(f"segment {segment}: {value} in u crosses a reset forwards")
            later[:, :, 20] = value
            spoiled = run(inputs["u"], later)
            if not all(torch.equal(clean[i][..., :12], spoiled[i][..., :12]) for i in (2, 3)):
                failures.lines.append(f"segment {segment}: {value} in the gradient crosses a reset backwards")
    for reverse, segment in itertools.product((False, True), (0, 8)):
        failures.cases += 1
        generator = torch.Generator().manual_seed(failures.cases)
        gates, tokens = (torch.randn((1, 3, 24), generator=generator) for _ in range(2))
        reset = torch.zeros((1, 24), dtype=torch.bool)
        reset[:, 12] = True
        before, after = (slice(12, 24), slice(0, 12)) if reverse else (slice(0, 12), slice(12, 24))
        clean_out = linear.forward(LinearScanInputs(gates, tokens, None, reset, reverse), segment_length=segment)[0]
        clean = linear.backward(
            tokens, None, LinearScanInputs(gates, None, None, reset, reverse), clean_out, segment_length=segment
        )
        spoiled = tokens.clone()
        spoiled[..., before] = float("nan")
        out = linear.forward(LinearScanInputs(gates, spoiled, None, reset, reverse), segment_length=segment)[0]
        if not torch.equal(out[..., after], clean_out[..., after]):
            failures.lines.append(f"linear, reverse {reverse}, segment {segment}: NaN crosses a reset forwards")
        spoiled = tokens.clone()
        spoiled[..., after] = float("nan")
        gradients = linear.backward(
            spoiled, None, LinearScanInputs(gates, None, None, reset, reverse), clean_out, segment_length=segment
        )
        pairs = [(a[..., before], b[..., before]) for a, b in zip(gradients[:2], clean[:2], strict=True)]
        if not all(torch.equal(a, b) for a, b in pairs):
            failures.lines.append(f"linear, reverse {reverse}, segment {segment}: NaN crosses a reset backwards")


GROUPS["poison"] = (check_poison, [{}])


def check_special(case: Case, failures: Failures) -> None:
    """Infinite rates beside padding steps and resets, overflowing products of gates, rows past the states."""
    failures.cases += 1
    generator = torch.Generator().manual_seed(failures.cases)
    segment, inputs = case["segment"], draw({"time": 19, **case}, generator)
    inputs["delta"][:, :, ::2] = -100.0  # softplus is subnormal
    inputs["A"] = inputs["A"].contiguous()
    finite = inputs["A"].double()
    inputs["A"][0], finite[0] = -torch.inf, -1e300
    exact = {k: v.double() if k in NAMES and v is not None else v for k, v in inputs.items()} | {"A": finite}
    leaves = {k: exact[k].requires_grad_() for k in NAMES if exact[k] is not None}
    out, last = selective_scan_reference(ScanInputs(**exact, delta_softplus=True))
    expected = torch.autograd.grad(out.sum(), list(leaves.values()), materialize_grads=True)
    scan = ScanInputs(**inputs, delta_softplus=True)
    found, found_last, saved = selective.forward(scan, 8, segment_length=segment)
    failures.check(case, "out", found, out.detach())
    failures.check(case, "last_state", found_last, last.detach())
    gradients = dict(
        zip(
            NAMES, selective.backward(torch.ones_like(found), None, scan, saved, 8, segment_length=segment), strict=True
        )
    )
    for name, right in zip(leaves, expected, strict=True):
        failures.check(case, f"grad_{name}", gradients[name], right)


def check_overflow(case: Case, failures: Failures) -> None:
    failures.cases += 1
    reverse, segment = case["reverse"], case["segment"]
    gates, tokens = torch.full((1, 3, 64), 0.5), torch.randn((1, 3, 64), generator=torch.Generator().manual_seed(1))
    gates[..., 32:], tokens[..., 32:] = 1e30, 0.0
    reset = torch.zeros((1, 64), dtype=torch.bool)
    reset[:, 32] = True
    scan = LinearScanInputs(gates, tokens, None, reset, reverse)
    out, last = linear_scan_reference(scan)
    found, found_last = linear.forward(scan, segment_length=segment)
    failures.check(case, "out", found, out.double())
    failures.check(case, "last_state", found_last, last.double())
    grad = torch.ones_like(out)
    grad[..., 32:] = 0.0
    leaves = [gates.requires_grad_(), tokens.requires_grad_()]
    expected = torch.autograd.grad(linear_scan_reference(scan)[0], leaves, grad)
    with torch.no_grad():
        gradients = linear.backward(grad, None, scan, found, segment_length=segment)
    for name, gradient, right in zip(("gates", "tokens"), gradients, expected, strict=False):
        failures.check(case, f"grad_{name}", gradient, right.double())


def check_rows_past_the_states(case: Case, failures: Failures) -> None:
    failures.cases += 1
    inputs = draw({"time": 1, "batch": 3}, torch.Generator().manual_seed(1))
    flat = {k: inputs[k][..., 0] for k in ("u", "delta", "z", "B", "C")}
    held = torch.randn(2, 5, 3)
    state, step = held.clone(), {k: inputs[k] for k in ("A", "D", "delta_bias")}
    scan = StepInputs(state, **flat, **step, reset=None, delta_softplus=True)
    out = selective_step.step(scan, state, torch.tensor([2, 1, 10**9]))
    failures.check(case, "state", state[:1], held[:1].double())
    failures.check(case, "out", out[::2], torch.zeros(2, 5, dtype=torch.float64))


SPECIAL: dict[str, Callable[[Case, Failures], None]] = {
    "scan": check_special,
    "linear": check_overflow,
    "step": check_rows_past_the_states,
}
GROUPS["special"] = (
    lambda case, failures: SPECIAL[case["op"]](case, failures),
    [
        *product(op=["scan"], segment=[0, 8]),
        *product(op=["scan"], segment=[0, 8], reset=[0.3]),
        *product(op=["linear"], segment=[0, 8], reverse=[False, True]),
        {"op": "step"},
    ],
)
