"""Cases of the causal convolution's Triton kernels against the float64 reference."""

import torch
from torch import Tensor
from triton_cases import GROUPS, SIXTEEN_BITS, Case, Failures, product, strided

from wmkernels.causal_conv1d import triton_kernels as convolution
from wmkernels.causal_conv1d.meta import DIFFERENTIABLE, TENSORS, ConvInputs
from wmkernels.causal_conv1d.reference import causal_conv1d_reference

NAMES = ConvInputs._fields[:DIFFERENTIABLE]


def draw(case: Case, generator: torch.Generator) -> ConvInputs:
    dtype = case.get("dtype", torch.float32)
    held = torch.float64 if dtype == torch.float64 else torch.float32
    batch, channels, time = case.get("batch", 2), case.get("channels", 3), case.get("time", 9)
    width, layout, bounds = case.get("width", 4), case.get("layout", "first"), None
    if "lengths" in case:
        bounds = torch.tensor([0, *case["lengths"]]).cumsum(0)
        batch, time = 1, int(bounds[-1])
    sequences = batch if bounds is None else len(case["lengths"])

    def normal(*shape: int, kind: torch.dtype = held) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    initial = case.get("initial", True)
    return ConvInputs(
        strided(normal(batch, channels, time, kind=dtype), layout),
        normal(channels, width),
        normal(channels) if initial else None,
        strided(normal(sequences, channels, width - 1), layout) if initial else None,
        torch.rand((batch, time), generator=generator) < case["reset"] if "reset" in case else None,
        bounds,
        case.get("silu", True),
        layout == "last",
    )


def run(case: Case, failures: Failures) -> None:
    failures.cases += 1
    generator = torch.Generator().manual_seed(failures.cases)
    inputs = draw(case, generator)
    exact = [x if x is None or not x.is_floating_point() else x.double().requires_grad_() for x in inputs[:TENSORS]]
    out, last = causal_conv1d_reference(ConvInputs(*exact, *inputs[TENSORS:]))
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(inputs.x.dtype)
    grad_last = None
    if case.get("grad_last", True):
        grad_last = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(inputs.weight.dtype)
    total = (out * grad_out.double()).sum() + (0 if grad_last is None else (last * grad_last.double()).sum())
    leaves = [x for x in exact[:DIFFERENTIABLE] if x is not None]
    expected = iter(torch.autograd.grad(total, leaves, materialize_grads=True))
    found, found_last = convolution.forward(inputs)
    failures.check(case, "out", found, out.detach())
    failures.check(case, "last_state", found_last, last.detach())
    gradients = convolution.backward(grad_out, grad_last, inputs)
    for name, given, gradient in zip(NAMES, inputs, gradients, strict=False):
        if given is not None:
            failures.check(case, f"grad_{name}", gradient, next(expected))
        elif gradient.shape != (0,):
            failures.lines.append(f"{case}: grad_{name} has shape {tuple(gradient.shape)}, expected (0,)")


GROUPS["causal convolution"] = (
    run,
    [
        *product(width=[1, 2, 4, 7], silu=[True, False], layout=["first", "last"]),
        *product(reset=[0.3], layout=["gaps"], width=[3, 12]),
        *product(dtype=[*SIXTEEN_BITS, torch.float64], reset=[0.3]),
        *product(lengths=[[5, 0, 6], [0, 3, 0], [1, 1, 2]], initial=[True, False], reset=[0.2]),
        {"initial": False, "grad_last": False, "silu": False},
        {"reset": 1.0},
        {"time": 130, "channels": 35, "reset": 0.02, "batch": 1},
    ],
)
