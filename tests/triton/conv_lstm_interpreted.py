"""Runs one group of the ConvLSTM's Triton kernels in Triton's interpreter; start with TRITON_INTERPRET=1.

bfloat16 uses the separate convolutions only: the interpreter multiplies bfloat16 matrices as integers.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from conv_lstm_problems import conv_lstm
from torch import Tensor
from triton_interpreted import interpreter_of, require_interpreter

from wmkernels import dispatch
from wmkernels.checks import state_dtype
from wmkernels.conv_lstm import per_step, triton_convolution

# Largest error relative to the tensor's largest magnitude. Sums have about a hundred terms; in 16 bits, the
# convolutions' sums and h are rounded once per step (2^-11, or 2^-7 for truncated bfloat16).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Case = dict[str, Any]


def draw(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    dtype = case.get("dtype", torch.float32)
    time, batch, inputs, hidden = (case.get(k, d) for k, d in (("time", 3), ("batch", 2), ("inputs", 3), ("hidden", 4)))
    x_size, size = case.get("x_size", (4, 5)), case.get("size", case.get("x_size", (4, 5)))
    kernel, kernel_hh = case.get("kernel", (3, 3)), case.get("kernel_hh", (3, 3))

    def random(*shape: int, to: torch.dtype = dtype, scale: float = 0.5) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(to)

    state = state_dtype(dtype)
    tensors = {
        "x": random(time, batch, inputs, *x_size, scale=1.0),
        "weight_ih": random(4 * hidden, inputs, *kernel, scale=0.3),
        "weight_hh": random(4 * hidden, hidden, *kernel_hh, scale=0.2),
    }
    if case.get("bias", True):
        tensors["bias"] = random(4 * hidden, to=state)
    if case.get("state", True):
        tensors |= {"h": random(batch, hidden, *size), "c": random(batch, hidden, *size, to=state)}
    if "peephole" in case:
        tensors["peephole"] = random(3, hidden, *(size if case["peephole"] == "position" else ()), to=state)
    if "reset" in case:
        tensors["reset"] = torch.rand((time, batch), generator=generator) < case["reset"]
    return tensors


def options_of(case: Case) -> dict[str, Any]:
    return {k: case[k] for k in ("stride", "padding", "dilation", "keep_gates") if k in case}


def check(case: Case, failures: list[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors, options = draw(case, generator), options_of(case)
    leaves = {k: v.requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    limits = {"HOISTED_BYTES": 1, "CHUNK_BYTES": 1} if case.get("stretches") else {}
    with (
        mock.patch.multiple(per_step, **limits) if limits else mock.patch.object(per_step, "HOISTED_BYTES", 1 << 20),
        mock.patch.object(triton_convolution, "is_profitable", lambda *_: case.get("at_once", False)),
    ):
        found = conv_lstm(**tensors, **options, backend="triton")
        cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in found]
        grads = torch.autograd.grad(found, list(leaves.values()), cotangents)
        with torch.no_grad():  # saves no tensors and updates the cell in place
            alone = conv_lstm(**tensors, **options, backend="triton")
    if not all(torch.equal(a, b.detach()) for a, b in zip(alone, found, strict=True)):
        failures.append(f"{case}: without gradients the outputs differ")
    expected = conv_lstm(**{**tensors, **exact}, **options, backend="reference")
    right = torch.autograd.grad(expected, list(exact.values()), [x.double() for x in cotangents])
    names = ("outputs", "h", "c", *(f"gradient of {name}" for name in leaves))
    for name, value, fp64_reference in zip(names, (*found, *grads), (*expected, *right), strict=True):
        dtype = tensors["x"].dtype
        error = (value.detach().double() - fp64_reference.detach()).abs().max().item() / (
            fp64_reference.abs().max().item() + 1e-3
        )
        if not error <= TOLERANCE[dtype]:
            failures.append(
                f"{case}: {name} is off by {error:.3g} of its largest magnitude, allowed {TOLERANCE[dtype]}"
            )


def check_poison(case: Case, failures: list[str]) -> None:
    """NaN and infinity do not cross a reset in either direction."""
    tensors = draw({**case, "time": 4, "peephole": "channel"}, torch.Generator().manual_seed(1))
    tensors["reset"] = torch.zeros((4, 2), dtype=torch.bool)
    where = case["where"]
    tensors["reset"][where, 1] = True
    tensors["h"][1], tensors["c"][1] = float("nan"), float("inf")
    tensors["x"][:where, 1] = float("nan")
    x, h, c = (tensors[name].requires_grad_() for name in ("x", "h", "c"))
    with mock.patch.object(triton_convolution, "is_profitable", lambda *_: case["at_once"]):
        out, last_h, last_c = conv_lstm(**tensors, backend="triton")
        total = out[where:].sum() + last_h.sum() + last_c.sum()
        grads = torch.autograd.grad(total, (x, h, c))
    if not (out[where:].isfinite().all() and last_h.isfinite().all() and last_c.isfinite().all()):
        failures.append(f"{case}: what is before a reset crosses it forwards")
    if not grads[0][where:].isfinite().all() or (where == 0 and any(g[1].any() for g in grads[1:])):
        failures.append(f"{case}: what is before a reset crosses it backwards")
    out, _, _ = conv_lstm(**{**tensors, "x": x.nan_to_num(), "h": None, "c": None}, backend="triton")
    if where > 0:
        cotangent = torch.zeros_like(out)
        cotangent[where:, 1] = float("inf")
        (grad,) = torch.autograd.grad(out, x, cotangent)
        if not grad[:where].nan_to_num(7.0, 7.0, 7.0).eq(0).all():
            failures.append(f"{case}: an infinite gradient after a reset crosses it backwards")


def check_infinite_state(case: Case, failures: list[str]) -> None:
    """Without a peephole, gates do not see the state."""
    tensors = draw({**case, "time": 2}, torch.Generator().manual_seed(1))
    tensors["c"][1, 0, 1, 1] = float("inf")
    leaves = tensors["x"].requires_grad_(), tensors["c"].requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        with mock.patch.object(triton_convolution, "is_profitable", lambda *_: case["at_once"]):
            out, _, last = conv_lstm(**tensors, backend=backend)
        results.append((out, last, *torch.autograd.grad(out[0].sum(), leaves)))
    for name, found, expected in zip(("output", "state", "gradient of x", "gradient of c"), *results, strict=True):
        if not torch.allclose(found, expected, atol=1e-5, equal_nan=True):
            failures.append(f"{case}: {name} is off beside an infinite state")


def product(**options: list[Any]) -> list[Case]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


HALF, WIDE = torch.float16, torch.float32
GROUPS: dict[str, tuple[Callable[[Case, list[str]], None], list[Case]]] = {
    "update": (
        check,
        [
            *product(dtype=[torch.float64, WIDE, torch.bfloat16, HALF], keep_gates=[True, False], reset=[0.4]),
            *product(peephole=["channel", "position"], keep_gates=[True, False], reset=[0.4], state=[True, False]),
            *product(bias=[False], state=[False], keep_gates=[True, False]),
            *product(stretches=[True], keep_gates=[True, False], reset=[0.4], state=[True, False]),
            {"hidden": 9, "batch": 3, "x_size": (13, 11)},
        ],
    ),
    "at once": (
        check,
        [
            *product(at_once=[True], dtype=[WIDE, HALF], peephole=["channel", "position"], reset=[0.4]),
            *product(at_once=[True], keep_gates=[True, False], bias=[False], state=[False]),
            {"at_once": True, "hidden": 33, "inputs": 70, "x_size": (3, 2), "time": 2},
            {"at_once": True, "kernel": (2, 3), "kernel_hh": (1, 5), "x_size": (1, 7), "reset": 0.4},
            {"at_once": True, "x_size": (7, 6), "size": (4, 2), "stride": (2, 3), "dilation": (1, 2)},
            {"at_once": True, "x_size": (7, 6), "size": (5, 4), "padding": "valid"},
        ],
    ),
    "poison": (check_poison, product(at_once=[False, True], where=[0, 2])),
    "infinite": (check_infinite_state, product(at_once=[False, True])),
}


def main(group: str) -> int:
    require_interpreter()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    run, cases = GROUPS[group]
    failures: list[str] = []
    dispatch._device_reasons.cache_clear()
    with mock.patch.object(dispatch, "_triton_reasons", lambda *_: ()), interpreter_of(whole_arrays=True):
        for case in cases:
            run(case, failures)
    print(*failures, f"{len(cases)} cases", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
