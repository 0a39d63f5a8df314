"""Random calls of place_memory, and a small fixed one."""

from typing import Any

import torch
from hypothesis import strategies as st
from problems import DTYPES, LAYOUTS, Problem, laid_out
from torch import Tensor

import wmkernels
from wmkernels.checks import state_dtype


def view_keys(places: int, frequencies: int, symmetric: bool, generator: torch.Generator) -> Tensor:
    """(places, 2 frequencies), float32; half of the places may lie opposite to the others."""
    offsets = torch.randn(places, 2, generator=generator)
    if symmetric:
        half = places // 2
        offsets[half : 2 * half] = -offsets[:half]
        offsets[2 * half :] = 0
    angle = offsets @ torch.randn(2, frequencies, generator=generator)
    return torch.cat([angle.cos(), angle.sin()], 1) / frequencies**0.5


def inverse_of(keys: Tensor) -> Tensor:
    """With a ridge so large that rounding errors do not grow over time."""
    keys = keys.double()
    return torch.linalg.inv(keys @ keys.t() + 0.3 * torch.eye(len(keys), dtype=torch.float64)).float()


def phases(shape: list[int], frequencies: int, generator: torch.Generator) -> Tensor:
    angle = 3 * torch.randn([*shape, frequencies], generator=generator, dtype=torch.float64)
    return torch.cat([angle.cos(), angle.sin()], -1)


@st.composite
def place_memories(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    device: str = "cpu",
    max_time: int = 24,
    max_places: int = 14,
    max_frequencies: int = 20,
    max_channels: int = 20,
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    time, places = draw(st.integers(1, max_time)), draw(st.integers(1, max_places))
    frequencies, groups = draw(st.integers(1, max_frequencies)), draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, max(1, max_channels // groups)))
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 3))
    sequences = draw(st.integers(1, 4)) if packed else batch
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    keys = view_keys(places, frequencies, draw(st.booleans()), generator)

    def placed(values: Tensor, kind: torch.dtype) -> Tensor:
        return laid_out(values.to(kind), draw(st.sampled_from(LAYOUTS)), seed).to(device)

    def normal(*shape: int, kind: torch.dtype) -> Tensor:
        return placed(torch.randn(shape, generator=generator, dtype=torch.float64), kind)

    held = state_dtype(dtype)
    tensors: dict[str, Tensor | None] = {
        "values": normal(batch, time, places, channels, kind=dtype),
        "phase": placed(phases([batch, time, groups], frequencies, generator), held),
        "keys": keys.to(held).to(device),
    }
    if draw(st.booleans()):
        tensors["inverse"] = placed(inverse_of(keys), held)
    if draw(st.booleans()):
        gate = torch.rand((batch, time, places, groups), generator=generator).round(decimals=1)
        tensors["gate"] = placed(gate, draw(st.sampled_from([dtype, held])))
    if draw(st.booleans()):
        tensors["initial_state"] = normal(sequences, groups, 2 * frequencies, channels // groups, kind=held)
    if draw(st.booleans()):
        tensors["initial_phase"] = placed(phases([sequences, groups], frequencies, generator), held)
    if draw(st.booleans()):
        tensors["reset"] = (torch.rand((batch, time), generator=generator) < 0.2).to(device)
    if packed:
        inner = sorted(draw(st.integers(0, time)) for _ in range(sequences - 1))
        tensors["cu_seqlens"] = torch.tensor([0, *inner, time], device=device)
    return Problem(
        wmkernels.place_memory,
        tensors,
        {"return_last_state": True},
        chunk=draw(st.sampled_from([None, 1, 5])),
        grad_layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        unused_output=draw(st.sampled_from([None, 0, 1])),
        seed=seed,
    )


def small_place_memory(
    device: str, dtype: torch.dtype = torch.float64, batch: int = 2, time: int = 2, **options: Any
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    keys, held = view_keys(2, 1, True, generator), state_dtype(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "values": normal(batch, time, 2, 4).to(dtype),
        "phase": phases([batch, time, 2], 1, generator).to(held),
        "keys": keys.to(held),
        "inverse": inverse_of(keys).to(held),
        "gate": torch.rand((batch, time, 2, 2), generator=generator).to(held),
        "initial_state": normal(batch, 2, 2, 2).to(held),
        "initial_phase": phases([batch, 2], 1, generator).to(held),
    }
    placed: dict[str, Tensor | None] = {name: x.to(device) for name, x in tensors.items()}
    return Problem(wmkernels.place_memory, placed, {"return_last_state": True, **options})
