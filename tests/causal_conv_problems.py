"""Random calls of the causal convolution."""

import torch
from hypothesis import strategies as st
from problems import DTYPES, LAYOUTS, Problem, laid_out, resets

import wmkernels
from wmkernels.checks import state_dtype

WIDTHS = [1, 2, 3, 4, 4, 5, 17, 70]
CHANNELS = [1, 2, 7, 8, 16, 17, 33, 70]


@st.composite
def causal_convs(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    device: str = "cpu",
    max_time: int = 150,
    channels: list[int] = CHANNELS,
    widths: list[int] = WIDTHS,
    layouts: list[str] = LAYOUTS,
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    count, width, time = draw(st.sampled_from(channels)), draw(st.sampled_from(widths)), draw(st.integers(1, max_time))
    seed, channel_last, packed = draw(st.integers(0, 2**16)), draw(st.booleans()), draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(seed)
    held = draw(st.sampled_from([dtype, state_dtype(dtype)]))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        if channel_last and values.dim() == 3:
            values = values.mT
        return laid_out(values.to(kind), draw(st.sampled_from(layouts)), seed).to(device)

    bounds = None
    if packed:
        inner = draw(st.lists(st.integers(0, time), max_size=4))
        bounds = torch.tensor([0, *sorted(inner), time], device=device)
    sequences = batch if bounds is None else len(bounds) - 1
    tensors = {
        "x": placed(normal(batch, count, time), dtype),
        "weight": placed(normal(count, width), held),
        "bias": placed(normal(count), held) if draw(st.booleans()) else None,
        "initial_state": placed(normal(sequences, count, width - 1), held) if draw(st.booleans()) else None,
        "reset": draw(resets(batch, time, device)),
        "cu_seqlens": bounds,
    }
    options = {
        "activation": draw(st.sampled_from([None, "silu"])),
        "channel_last": channel_last,
        "return_last_state": True,
    }
    return Problem(
        wmkernels.causal_conv1d,
        tensors,
        options,
        grad_layouts=(draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))),
        unused_output=draw(st.sampled_from([None, 0, 1])),
        seed=seed,
    )


def small_causal_conv(
    device: str,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    time: int = 5,
    channels: int = 3,
    width: int = 3,
) -> Problem:
    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(kind).to(device)

    held = state_dtype(dtype)
    tensors = {
        "x": normal(batch, channels, time),
        "weight": normal(channels, width, kind=held),
        "bias": normal(channels, kind=held),
        "initial_state": normal(batch, channels, width - 1, kind=held),
    }
    return Problem(wmkernels.causal_conv1d, tensors, {"activation": "silu", "return_last_state": True})


def big_causal_conv(device: str = "cpu", packed: bool = False, channel_last: bool = False) -> Problem:
    batch, time = (1, 4000) if packed else (5, 1500)
    problem = small_causal_conv(device, torch.float32, batch, time, 70, 4)
    generator = torch.Generator().manual_seed(0)
    problem.tensors["reset"] = torch.rand((batch, time), generator=generator).to(device) < 0.02
    if packed:
        problem.tensors["cu_seqlens"] = torch.tensor([0, 3, 3, 1200, time], device=device)
        problem.tensors["initial_state"] = None
    if channel_last:
        problem.options["channel_last"] = True
        for name in ("x", "initial_state"):
            x = problem.tensors[name]
            problem.tensors[name] = None if x is None else x.mT.contiguous()
    return problem
