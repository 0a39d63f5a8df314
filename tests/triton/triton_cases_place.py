"""Cases of the place memory's Triton kernels; adds groups to ``triton_cases.GROUPS``."""

import numpy as np
import torch
from torch import Tensor
from triton_cases import GROUPS, SIXTEEN_BITS, Case, Failures, product, strided

from wmkernels.place_memory import triton_kernels as place
from wmkernels.place_memory.meta import DIFFERENTIABLE, PlaceMemoryInputs
from wmkernels.place_memory.reference import place_memory_reference


def draw_places(case: Case, generator: torch.Generator) -> PlaceMemoryInputs:
    dtype = case.get("dtype", torch.float32)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    batch, time, places, channels = (
        case.get(k, d) for k, d in (("batch", 1), ("time", 3), ("places", 3), ("channels", 2))
    )
    groups, frequencies, layout = case.get("groups", 1), case.get("frequencies", 4), case.get("layout", "")
    optional = case.get("optional", "inverse gate initial_state initial_phase").split()
    cu_seqlens = None
    if "lengths" in case:
        bounds = np.cumsum([0, *case["lengths"]])
        cu_seqlens, batch, time = torch.tensor(bounds), 1, int(bounds[-1])
    sequences = batch if cu_seqlens is None else len(case["lengths"])

    def random(*shape: int, to: torch.dtype = parameter) -> Tensor:
        return strided(torch.randn(shape, generator=generator, dtype=torch.float64).to(to), layout)

    def turned(*shape: int) -> Tensor:
        angle = 3 * torch.randn((*shape, frequencies), generator=generator, dtype=torch.float64)
        return strided(torch.cat([angle.cos(), angle.sin()], -1).to(parameter), layout)

    keys = random(places, 2 * frequencies, to=torch.float64) / (2 * frequencies) ** 0.5
    inverse = torch.linalg.inv(keys @ keys.mT + 0.1 * torch.eye(places, dtype=torch.float64))
    reset = torch.rand((batch, time), generator=generator) < case["reset"] if "reset" in case else None
    state = (sequences, groups, 2 * frequencies, channels // groups)
    given = {
        "inverse": strided(inverse.to(parameter), layout),
        "gate": random(batch, time, places, groups).sigmoid(),
        "initial_state": random(*state),
        "initial_phase": turned(sequences, groups),
    }
    return PlaceMemoryInputs(
        random(batch, time, places, channels, to=dtype),
        turned(batch, time, groups),
        strided(keys.to(parameter), layout),
        **{name: x if name in optional else None for name, x in given.items()},
        reset=reset,
        cu_seqlens=cu_seqlens,
    )


def check_places(case: Case, failures: Failures) -> None:
    failures.cases += 1
    generator = torch.Generator().manual_seed(failures.cases)
    inputs = draw_places(case, generator)
    phases = case.get("phase_gradient", True)
    exact = inputs._replace(
        **{k: v.double() for k, v in inputs._asdict().items() if v is not None and v.is_floating_point()}
    )
    keys = case.get("key_gradient", True)
    left_out = (() if phases else (1, 6)) + (() if keys else (2, 3))
    wanted = [i for i in range(DIFFERENTIABLE) if exact[i] is not None and i not in left_out]
    leaves = [exact[i].requires_grad_() for i in wanted]
    out, last = place_memory_reference(exact)
    grads = (
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(inputs.values.dtype),
        torch.randn(last.shape, generator=generator, dtype=torch.float64).to(inputs.keys.dtype),
    )
    wants = case.get("grads", "out last")
    grad_out, grad_last = (grads[0] if "out" in wants else None), (grads[1] if "last" in wants else None)
    total = sum((y * g.double()).sum() for y, g in ((out, grad_out), (last, grad_last)) if g is not None)
    right = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    expected = dict(zip(wanted, right, strict=True))
    found, found_last, residual = place.forward(inputs, True)
    failures.check(case, "out", found, out.detach())
    failures.check(case, "last_state", found_last, last.detach())
    alone, alone_last, nothing = place.forward(inputs, False)
    if nothing.numel() or not (torch.equal(alone, found) and torch.equal(alone_last, found_last)):
        failures.lines.append(f"{case}: without a residual, the outputs differ")
    for i, gradient in zip(
        range(DIFFERENTIABLE), place.backward(grad_out, grad_last, inputs, residual, (phases, keys)), strict=True
    ):
        name = f"grad_{PlaceMemoryInputs._fields[i]}"
        if i in expected:
            failures.check(case, name, gradient, expected[i])
        elif gradient.shape != (0,):
            failures.lines.append(f"{case}: {name} has shape {tuple(gradient.shape)}, expected (0,)")


def check_poisoned_places(_: Case, failures: Failures) -> None:
    failures.cases += 1
    inputs = draw_places({"time": 4}, torch.Generator().manual_seed(1))
    reset = torch.tensor([[False, False, True, False]])
    inputs = inputs._replace(reset=reset, initial_state=torch.full_like(inputs.initial_state, float("nan")))
    out, last, residual = place.forward(inputs, True)
    if not (out[:, :2].isnan().all() and out[:, 2:].isfinite().all() and last.isfinite().all()):
        failures.lines.append("place: NaN in a state crosses a reset forwards, or is lost before it")
    grad = torch.ones_like(out)
    found = place.backward(grad, None, inputs, residual, (True, False))
    later = [found[i][:, 2:] for i in (0, 1, 4)]
    if not all(g.isfinite().all() for g in later):
        failures.lines.append("place: NaN in a state crosses a reset into later gradients")
    inputs = inputs._replace(initial_state=None)
    _, _, residual = place.forward(inputs, True)
    clean = place.backward(grad, None, inputs, residual, (True, False))
    grad[:, 2:] = float("nan")
    spoiled = place.backward(grad, torch.full_like(last, float("nan")), inputs, residual, (True, False))
    if not all(torch.equal(a[:, :2], b[:, :2]) for a, b in ((clean[i], spoiled[i]) for i in (0, 1, 4))):
        failures.lines.append("place: NaN in a gradient crosses a reset backwards")


def check_unread_places(_: Case, failures: Failures) -> None:
    """Where nothing reads or writes at the initial phase, or only writes do."""
    failures.cases += 1
    inputs = draw_places({"time": 3}, torch.Generator().manual_seed(1))
    cut = inputs._replace(
        reset=torch.tensor([[True, False, False]]),
        initial_state=torch.full_like(inputs.initial_state, float("inf")),
        initial_phase=torch.full_like(inputs.initial_phase, float("nan")),
    )
    additive = inputs._replace(inverse=None, initial_phase=cut.initial_phase)
    for name, given, right in (("reset", cut, range(DIFFERENTIABLE)), ("additive", additive, (5,))):
        out, last, residual = place.forward(given, True)
        found = place.backward(torch.ones_like(out), torch.ones_like(last), given, residual, (True, True))
        for i in right:
            if not found[i].isfinite().all():
                failures.lines.append(f"place, {name}: grad_{PlaceMemoryInputs._fields[i]} of an unread phase is NaN")


def check_shut_gate(_: Case, failures: Failures) -> None:
    failures.cases += 1
    inputs = draw_places({}, torch.Generator().manual_seed(1))
    first = inputs.initial_state
    first[0, 0, :4, 0] = torch.tensor([-0.0, 0.0, 1e-42, -3e38])
    inputs = inputs._replace(gate=torch.zeros_like(inputs.gate))
    _, last, _ = place.forward(inputs, False)
    if not torch.equal(last.view(torch.int32), first.view(torch.int32)):
        failures.lines.append("place: a shut gate changes the state")


GROUPS["place"] = (
    check_places,
    [
        {"time": 18, "reset": 0.2, "optional": "inverse gate initial_state initial_phase"},
        *product(optional=["inverse", "gate initial_phase", ""], reset=[0.3]),
        *product(dtype=[*SIXTEEN_BITS, torch.float64], groups=[2], channels=[4], layout=["gaps"], batch=[2]),
        {"frequencies": 33, "places": 34, "channels": 17, "time": 2},
        {"lengths": [3, 0, 17, 1], "reset": 0.2},
        {"lengths": [16, 1], "optional": ""},
        *product(grads=["out", "last"], reset=[0.3], phase_gradient=[False, True], key_gradient=[False]),
    ],
)
STATES = {"shut": check_shut_gate, "poisoned": check_poisoned_places, "unread": check_unread_places}
GROUPS["place: states"] = (lambda case, failures: STATES[case["kind"]](case, failures), product(kind=list(STATES)))
