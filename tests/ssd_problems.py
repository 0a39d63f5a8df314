"""Random calls of the SSD scan."""

import torch
from hypothesis import strategies as st
from problems import DTYPES, LAYOUTS, Problem, laid_out, resets
from torch import Tensor

import wmkernels
from wmkernels import SSDState
from wmkernels.checks import state_dtype

SIZES = [1, 2, 5, 8, 16, 17, 31, 48, 70]
STATES = ("initial_state", "phase", "previous_B", "previous_x")  # fields of SSDState


def flat_ssd_scan(
    *, initial_state: Tensor, phase: Tensor | None, previous_B: Tensor | None, previous_x: Tensor | None, **arguments
) -> tuple[Tensor, ...]:
    """``ssd_scan`` with the fields of the state as arguments and outputs."""
    state = SSDState(initial_state, phase, previous_B, previous_x)
    out, last = wmkernels.ssd_scan(initial_state=state, return_last_state=True, **arguments)
    return out, *(x for x in last if x is not None)


@st.composite
def ssd_scans(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    device: str = "cpu",
    max_time: int = 40,
    sizes: list[int] = SIZES,
    layouts: list[str] = LAYOUTS,
    mamba3: bool = True,
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    groups, repeats, time = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, max_time))
    d, n, seed, packed = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes)), draw(st.integers(0, 2**16)), False
    packed = draw(st.booleans())
    batch, heads = 1 if packed else draw(st.integers(1, 2)), groups * repeats
    generator = torch.Generator().manual_seed(seed)
    held = draw(st.sampled_from([dtype, state_dtype(dtype)]))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        return laid_out(values.to(kind), draw(st.sampled_from(layouts)), seed).to(device)

    bounds = None
    if packed:
        inner = draw(st.lists(st.integers(0, time), max_size=4))
        bounds = torch.tensor([0, *sorted(inner), time], device=device)
    sequences = batch if bounds is None else len(bounds) - 1
    softplus = draw(st.booleans())
    rate = (batch, time, heads) if draw(st.booleans()) else (heads,)
    tensors = {
        "x": placed(normal(batch, time, heads, d), dtype),
        "dt": placed(normal(batch, time, heads) if softplus else normal(batch, time, heads).abs(), held),
        "A": placed(-draw(st.sampled_from([0.0, 0.1, 1.0, 30.0])) * normal(*rate).abs(), held),
        "B": placed(normal(batch, time, groups, n), dtype),
        "C": placed(normal(batch, time, groups, n), dtype),
        "reset": draw(resets(batch, time, device)),
        "cu_seqlens": bounds,
    }
    for name, shape, kind in (
        ("D", (heads, d) if draw(st.booleans()) else (heads,), held),
        ("z", (batch, time, heads, d), dtype),
        ("dt_bias", (heads,), held),
    ):
        tensors[name] = placed(normal(*shape), kind) if draw(st.booleans()) else None
    options = {"dt_softplus": softplus, "dt_limit": draw(st.sampled_from([(0.0, float("inf")), (0.05, 4.0)]))}
    turns, averages = (mamba3 and draw(st.booleans()) for _ in range(2))
    turns = turns and n > 1
    state = normal(sequences, heads, d, n)
    if turns:
        pairs = draw(st.integers(1, n // 2))
        tensors["angle"] = placed(3 * normal(batch, time, draw(st.sampled_from([1, heads])), pairs), held)
    if averages:
        tensors["trapezoid"] = placed(normal(batch, time, heads).sigmoid(), held)
    function = wmkernels.ssd_scan
    if turns or averages:
        function = flat_ssd_scan
        fields = (
            state,
            normal(sequences, heads, pairs) if turns else None,
            normal(sequences, groups, n) if averages else None,
            normal(sequences, heads, d) if averages else None,
        )
        for name, value in zip(STATES, fields, strict=True):
            kind = torch.float64 if name == "phase" else held
            tensors[name] = None if value is None else laid_out(value.to(kind), "permuted", seed).to(device)
    else:
        tensors["initial_state"] = (
            laid_out(state.to(held), "permuted", seed).to(device) if draw(st.booleans()) else None
        )
        options["return_last_state"] = True
    count = 2 + turns + 2 * averages
    return Problem(
        function,
        tensors,
        options,
        chunk=draw(st.sampled_from([None, 1, 3, 16, 37, 64])),
        grad_layouts=tuple(draw(st.sampled_from(layouts)) for _ in range(count)),
        unused_output=draw(st.sampled_from([None, 0, 1])),
        seed=seed,
    )


def small_ssd(
    device: str,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    time: int = 3,
    heads: int = 2,
    d: int = 2,
    n: int = 2,
) -> Problem:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)

    tensors = {
        "x": normal(batch, time, heads, d),
        "dt": normal(batch, time, heads).abs(),
        "A": -normal(heads).abs(),
        "B": normal(batch, time, 1, n),
        "C": normal(batch, time, 1, n),
        "D": normal(heads),
        "z": normal(batch, time, heads, d),
        "initial_state": normal(batch, heads, d, n),
    }
    return Problem(wmkernels.ssd_scan, tensors, {"return_last_state": True})


def big_ssd(device: str = "cpu", packed: bool = False) -> Problem:
    batch, time = (1, 1500) if packed else (2, 300)
    problem = small_ssd(device, torch.float32, batch, time, 14, 20, 33)
    generator = torch.Generator().manual_seed(0)
    problem.tensors["reset"] = torch.rand((batch, time), generator=generator).to(device) < 0.02
    if packed:
        problem.tensors["cu_seqlens"] = torch.tensor([0, 3, 3, 1200, time], device=device)
        problem.tensors["initial_state"] = None
    return problem


def big_mamba3(device: str = "cpu") -> Problem:
    problem, pairs = big_ssd(device), 7
    batch, time, heads, d = problem.tensors["x"].shape
    first = problem.tensors["B"][:, 0]
    problem.tensors |= {
        "angle": torch.randn(batch, time, heads, pairs).to(device),
        "trapezoid": torch.rand(batch, time, heads).to(device),
        "phase": torch.randn(batch, heads, pairs, dtype=torch.float64).to(device),
        "previous_B": torch.randn_like(first),
        "previous_x": torch.randn(batch, heads, d).to(device),
    }
    return Problem(flat_ssd_scan, problem.tensors, {}, grad_layouts=("contiguous",) * 5)
