"""Compares outputs and gradients with the float64 reference before timing."""

import torch

from conv_lstms.baselines import Implementation
from conv_lstms.problems import Inputs, Problem, make_inputs
from wmkernels.conv_lstm.meta import ConvLSTMInputs
from wmkernels.conv_lstm.reference import conv_lstm_reference

# float32: sums of some hundred products. 16 bits: h is rounded at every step, a loop's gates as well.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def error(implementation: Implementation, problem: Problem, gradients: bool, device: torch.device) -> float:
    """Largest difference over largest value."""
    small = problem.small()
    inputs = make_inputs(small, device, requires_grad=gradients)
    exact = {name: x.detach().cpu().double().requires_grad_(gradients) for name, x in inputs.items()}
    kernel = small.kernel // 2
    weights = (exact["weight_ih"], exact["weight_hh"], exact["bias"], None)
    state = (exact.get("h"), exact.get("c"), None)
    expected = conv_lstm_reference(ConvLSTMInputs(exact["x"], *weights, *state, (1, 1), (kernel,) * 4, (1, 1)))[0]
    given = implementation.prepare(inputs)
    with torch.set_grad_enabled(gradients):
        found = implementation.run(given)
    pairs = [(found, expected)]
    if gradients:
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
        grads = torch.autograd.grad(found, list(given.values()), grad.to(device))
        right = torch.autograd.grad(expected, list(exact.values()), grad.double())
        pairs += list(zip(grads, _arranged(dict(zip(exact, right, strict=True)), given), strict=True))
    return max(_relative(a, b) for a, b in pairs)


def _arranged(gradients: dict[str, torch.Tensor], given: Inputs) -> list[torch.Tensor]:
    joined = torch.cat([gradients["weight_ih"], gradients["weight_hh"]], 1)
    return [joined if name == "weight" else gradients[name] for name in given]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.abs().max().clamp(min=1e-6)
    return ((found.detach().cpu().double() - expected.detach()).abs().max() / scale).item()
