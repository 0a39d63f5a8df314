"""Random calls of the gated delta rule."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from problems import DTYPES, LAYOUTS, Problem, laid_out, resets

import wmkernels
from wmkernels.checks import state_dtype

SIZES = [1, 2, 5, 8, 16, 17, 31, 48, 70]


@st.composite
def delta_rules(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    device: str = "cpu",
    max_time: int = 40,
    sizes: list[int] = SIZES,
    layouts: list[str] = LAYOUTS,
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    heads, repeats, time = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, max_time))
    d_k, d_v = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    seed, channel_last, packed = draw(st.integers(0, 2**16)), draw(st.booleans()), draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 2))
    value_heads = heads * repeats
    generator = torch.Generator().manual_seed(seed)
    held = draw(st.sampled_from([dtype, state_dtype(dtype)]))

    def placed(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        if channel_last:
            values = values.movedim(-1, 1)
        return laid_out(values.to(kind), draw(st.sampled_from(layouts)), seed).to(device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    bounds = None
    if packed:
        inner = draw(st.lists(st.integers(0, time), max_size=4))
        bounds = torch.tensor([0, *sorted(inner), time], device=device)
    sequences = batch if bounds is None else len(bounds) - 1
    strength = draw(st.sampled_from([0.0, 0.1, 1.0, 30.0]))
    tensors = {
        "q": placed(normal(batch, heads, d_k, time), dtype),
        # longer keys would make the correction unstable
        "k": placed(F.normalize(normal(batch, heads, d_k, time), dim=2), dtype),
        "v": placed(normal(batch, value_heads, d_v, time), dtype),
        "gate": placed(-strength * normal(batch, value_heads, time).abs(), held),
        "beta": placed(normal(batch, value_heads, time).sigmoid(), held),
        "initial_state": laid_out(normal(sequences, value_heads, d_k, d_v).to(held), "permuted", seed).to(device)
        if draw(st.booleans())
        else None,
        "reset": draw(resets(batch, time, device)),
        "cu_seqlens": bounds,
    }
    options = {"channel_last": channel_last, "return_last_state": True, "scale": draw(st.sampled_from([None, 0.5]))}
    return Problem(
        wmkernels.gated_delta_rule,
        tensors,
        options,
        chunk=draw(st.sampled_from([None, 1, 3, 16, 37, 64])),
        grad_layouts=(draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))),
        unused_output=draw(st.sampled_from([None, 0, 1])),
        seed=seed,
    )


def small_delta_rule(
    device: str,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    time: int = 3,
    heads: int = 2,
    size: int = 2,
    values: int = 2,
) -> Problem:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)

    tensors = {
        "q": normal(batch, 1, size, time),
        "k": F.normalize(normal(batch, 1, size, time), dim=2),
        "v": normal(batch, heads, values, time),
        "gate": -normal(batch, heads, time).abs(),
        "beta": normal(batch, heads, time).sigmoid(),
        "initial_state": normal(batch, heads, size, values),
    }
    return Problem(wmkernels.gated_delta_rule, tensors, {"return_last_state": True})


def big_delta_rule(device: str = "cpu", dtype: torch.dtype = torch.float32, packed: bool = False) -> Problem:
    problem = small_delta_rule(device, dtype, 1 if packed else 2, 200, 4, 20)
    generator = torch.Generator().manual_seed(0)
    problem.tensors["reset"] = torch.rand((1 if packed else 2, 200), generator=generator).to(device) < 0.02
    if packed:
        problem.tensors["cu_seqlens"] = torch.tensor([0, 3, 3, 120, 200], device=device)
        problem.tensors["initial_state"] = None
    return problem
