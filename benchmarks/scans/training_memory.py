"""Memory of one training step beyond its inputs, outputs and gradients.

Counted: tensors that autograd saves. Measured: peak resident memory above the level before the step, less output and
gradients; includes workspace and pages of libraries.
"""

from typing import Any

import torch
from torch import Tensor

from harness.memory import available_bytes, peak_bytes, saved_bytes
from scans.baselines import Implementation
from scans.problems import Problem, gradient_names, make_inputs


def measure(implementation: Implementation, problem: Problem, device: torch.device) -> dict[str, Any]:
    try:
        return {
            **problem.describe(),
            "implementation": implementation.name,
            **_measure(implementation, problem, device),
        }
    except Exception as error:  # keep measured rows
        return {
            **problem.describe(),
            "implementation": implementation.name,
            "error": f"{type(error).__name__}: {error}",
        }


def _measure(implementation: Implementation, problem: Problem, device: torch.device) -> dict[str, Any]:
    need = 8 * problem.elements * problem.dtype.itemsize
    free = available_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if free is not None and free < 1.3 * need:
        return {"error": f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"}
    inputs = make_inputs(problem, device, requires_grad=True)
    names = gradient_names(inputs)
    leaves = [inputs[name] for name in names]
    grad_out = torch.ones_like(inputs["x" if "x" in inputs else "u"], requires_grad=False)
    saved = saved_bytes(lambda: implementation.run(inputs), inputs.values())

    def step() -> tuple[Tensor, ...]:
        out = implementation.run(inputs)
        return out, *torch.autograd.grad(out, leaves, grad_out)

    warm = make_inputs(problem.smaller(256, problem.channels), device, requires_grad=True)
    out = implementation.run(warm)
    torch.autograd.grad(out, [warm[name] for name in names], torch.ones_like(out))
    out_bytes, gradient_bytes = grad_out.nbytes, sum(x.nbytes for x in leaves)
    counted = sum(x.nbytes for x in inputs.values()) + 2 * out_bytes + gradient_bytes
    peak = peak_bytes(step, device)
    measured = None if peak is None else max(0, peak - out_bytes - gradient_bytes)
    return {
        "inputs_outputs_gradients_bytes": counted,
        "saved_bytes": saved,
        "peak_bytes": peak,
        "beyond_bytes": measured,
        "fraction": None if measured is None else measured / counted,
        "saved_fraction": saved / counted,
    }
