"""Runs every GPU kernel on small shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python scripts/gpu_sanitize.py [--quick] [cuda|triton ...]

Results are not checked.
"""

import itertools
import sys

import torch

import wmkernels
from wmkernels import dispatch
from wmkernels.conv_lstm import cuda_persistent

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (channels, states, time): below, at and above a tile and chunk; the last is split in time
SIZES = ((3, 1, 5), (33, 16, 70), (64, 8, 256), (20, 17, 300), (8, 64, 33), (4, 130, 19), (16, 16, 2100))


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def scan(backend: str, dtype: torch.dtype, size: tuple[int, int, int], channel_last: bool, full: bool) -> None:
    channels, state, time = size
    batch = 1 if full else 2
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    groups = 2 if full and channels % 2 == 0 else 1
    shape = (batch, time, channels) if channel_last else (batch, channels, time)
    projection = (batch, groups, time, state) if channel_last else (batch, groups, state, time)
    inputs = {
        "u": random(*shape, dtype=dtype),
        "delta": random(*shape, dtype=dtype),
        "A": -torch.rand(channels, state, device="cuda", dtype=wide),
        "B": random(*projection, dtype=dtype),
        "C": random(channels, state, dtype=wide) if full else random(*projection, dtype=dtype),
    }
    options: dict[str, object] = {}
    if full:
        inputs |= {"D": random(channels, dtype=wide), "z": random(*shape, dtype=dtype)}
        inputs |= {"delta_bias": random(channels, dtype=wide), "initial_state": random(3, channels, state, dtype=wide)}
        options["reset"] = torch.rand(batch, time, device="cuda") < 0.1
        options["cu_seqlens"] = torch.tensor([0, time // 3, time // 3, time], device="cuda")
    for tensor in inputs.values():
        tensor.requires_grad_(True)
    out, last = wmkernels.selective_scan(
        **inputs,  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
        delta_softplus=True,
        return_last_state=True,
        channel_last=channel_last,
        backend=backend,
    )
    torch.autograd.grad([out, last], list(inputs.values()), [torch.randn_like(out), torch.randn_like(last)])


def step(backend: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    channels, state, _ = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    held = random(2, channels, state, dtype=wide).requires_grad_(True)
    u, delta, z = (random(2, channels, dtype=dtype).requires_grad_(True) for _ in range(3))
    A = -torch.rand(channels, state, device="cuda", dtype=wide)
    B, C = (random(2, state, dtype=dtype) for _ in range(2))
    out, new = wmkernels.selective_step(held, u, delta, A, B, C, None, z, delta_softplus=True, backend=backend)
    torch.autograd.grad([out, new], [held, u, delta, z], [torch.randn_like(out), torch.randn_like(new)])


def update(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    channels, state, _ = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cache = random(5, channels, state, dtype=wide)
    x, dt = (random(3, channels, dtype=dtype) for _ in range(2))
    A = -torch.rand(channels, state, device="cuda", dtype=wide)
    B, C = (random(3, state, dtype=dtype) for _ in range(2))
    rows = torch.tensor([4, -1, 0], device="cuda")
    wmkernels.selective_state_update(cache, x, dt, A, B, C, dt_softplus=True, state_batch_indices=rows)


def linear(backend: str, dtype: torch.dtype, size: tuple[int, int, int], channel_last: bool, reverse: bool) -> None:
    channels, _, time = size
    shape = (2, time, channels) if channel_last else (2, channels, time)
    gates, tokens = (torch.rand(shape, device="cuda").to(dtype).requires_grad_(True) for _ in range(2))
    start = torch.randn(2, channels, device="cuda").to(torch.float64 if dtype == torch.float64 else torch.float32)
    start.requires_grad_(True)
    reset = torch.rand(2, time, device="cuda") < 0.1
    out, last = wmkernels.linear_scan(
        gates,
        tokens,
        start,
        reverse=reverse,
        reset=reset,
        channel_last=channel_last,
        return_last_state=True,
        backend=backend,
    )
    torch.autograd.grad([out, last], [gates, tokens, start], [torch.randn_like(out), torch.randn_like(last)])


def places(backend: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    channels, frequencies, time = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        "values": random(2, time, 9, channels, dtype=dtype),
        "phase": random(2, time, 1, 2 * frequencies, dtype=wide),
        "keys": random(9, 2 * frequencies, dtype=wide),
        "inverse": random(9, 9, dtype=wide) / frequencies,
        "gate": random(2, time, 9, 1, dtype=wide),
        "initial_state": random(2, 1, 2 * frequencies, channels, dtype=wide),
    }
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    reset = torch.rand(2, time, device="cuda") < 0.1
    out, last = wmkernels.place_memory(**leaves, reset=reset, return_last_state=True, backend=backend)
    torch.autograd.grad([out, last], list(leaves.values()), [torch.randn_like(out), torch.randn_like(last)])


def delta_rule(backend: str, dtype: torch.dtype, size: tuple[int, int, int], channel_last: bool) -> None:
    values, keys, time = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        x = random(2, *shape, dtype=kind) / keys
        return (x.movedim(-1, 1) if channel_last else x).requires_grad_(True)

    leaves = [leaf(1, keys, time), leaf(1, keys, time), leaf(2, values, time)]
    leaves += [leaf(2, time, kind=wide), leaf(2, time, kind=wide)]
    start = random(2, 2, keys, values, dtype=wide).requires_grad_(True)
    out, last = wmkernels.gated_delta_rule(
        *leaves,
        initial_state=start,
        reset=torch.rand(2, time, device="cuda") < 0.1,
        channel_last=channel_last,
        return_last_state=True,
        backend=backend,
    )
    torch.autograd.grad([out, last], [*leaves, start], [torch.randn_like(out), torch.randn_like(last)])


def convolution(backend: str, dtype: torch.dtype, size: tuple[int, int, int], channel_last: bool, packed: bool) -> None:
    """With up to 17 taps; as one step too."""
    channels, state, time = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch, width = 1 if packed else 2, min(state, 16) + 1
    sequences = 3 if packed else batch
    x = random(batch, channels, time, dtype=dtype)
    start = random(sequences, channels, width - 1, dtype=wide)
    leaves = [x.mT if channel_last else x, random(channels, width, dtype=wide), random(channels, dtype=wide)]
    leaves.append(start.mT if channel_last else start)
    for leaf in leaves:
        leaf.requires_grad_(True)
    out, last = wmkernels.causal_conv1d(
        *leaves[:3],
        activation="silu",
        initial_state=leaves[3],
        reset=torch.rand(batch, time, device="cuda") < 0.1,
        cu_seqlens=torch.tensor([0, time // 3, time // 3, time], device="cuda") if packed else None,
        channel_last=channel_last,
        return_last_state=True,
        backend=backend,
    )
    torch.autograd.grad([out, last], leaves, [torch.randn_like(out), torch.randn_like(last)])
    if not packed:
        now = leaves[0].select(1 if channel_last else 2, 0)
        wmkernels.causal_conv1d_step(leaves[3], now, *leaves[1:3], channel_last=channel_last, backend=backend)


def ssd(backend: str, dtype: torch.dtype, size: tuple[int, int, int], mamba3: bool) -> None:
    """Two heads of one group, forward and backward, and a step without gradients."""
    d, n, time = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {"x": random(2, time, 2, d, dtype=dtype), "dt": torch.rand(2, time, 2, device="cuda", dtype=wide)}
    leaves |= {"A": -torch.rand(2, device="cuda", dtype=wide), "D": random(2, dtype=wide)}
    leaves |= {name: random(2, time, 1, n, dtype=dtype) / n for name in "BC"}
    start: list[torch.Tensor] = [random(2, 2, d, n, dtype=wide)]
    if mamba3:
        leaves["z"] = random(2, time, 2, d, dtype=dtype)
        leaves["trapezoid"] = torch.rand(2, time, 2, device="cuda", dtype=wide)
        start += [random(2, 1, n, dtype=wide), random(2, 2, d, dtype=wide)]
    for leaf in (*leaves.values(), *start):
        leaf.requires_grad_(True)
    state = wmkernels.SSDState(start[0], None, *start[1:]) if mamba3 else start[0]
    reset = torch.rand(2, time, device="cuda") < 0.1
    out, last = wmkernels.ssd_scan(**leaves, initial_state=state, reset=reset, return_last_state=True, backend=backend)
    last_state = last[0] if mamba3 else last
    given = [*leaves.values(), *start]
    torch.autograd.grad([out, last_state], given, [torch.randn_like(out), torch.randn_like(last_state)])
    with torch.no_grad():
        first = {name: x[:, 0] if x.dim() > 1 else x for name, x in leaves.items()}
        wmkernels.ssd_step(last, **first, backend=backend)


def conv_lstm(backend: str, dtype: torch.dtype, hidden: int, persistent: bool) -> None:
    """The persistent kernel is forward only."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight_ih = random(3, 2, 3, 7, 9, dtype=dtype), random(4 * hidden, 3, 3, 3, dtype=dtype)
    weight_hh = 0.1 * random(4 * hidden, hidden, 3, 3, dtype=dtype)
    h, c = random(2, hidden, 7, 9, dtype=dtype), random(2, hidden, 7, 9, dtype=wide)
    bias, peephole = random(4 * hidden, dtype=wide), random(3, hidden, 7, 9, dtype=wide)
    leaves = [x, weight_ih, weight_hh, bias, h, c, peephole]
    for leaf in leaves:
        leaf.requires_grad_(not persistent)
    reset = torch.rand(3, 2, device="cuda") < 0.3
    cuda_persistent.WANTED = persistent
    out, state = wmkernels.conv_lstm(
        x, weight_ih, weight_hh, bias, (h, c), peephole=peephole, reset=reset, backend=backend
    )
    if not persistent:
        torch.autograd.grad([out, *state], leaves, [torch.randn_like(y) for y in (out, *state)])


def main() -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    quick = "--quick" in sys.argv[1:]  # racecheck is slow
    asked = [name for name in sys.argv[1:] if name != "--quick"] or ["cuda"]
    sizes, dtypes = ([size for size in SIZES if size[2] <= 70], DTYPES[:2]) if quick else (SIZES, DTYPES)
    torch.manual_seed(0)
    for backend in asked:
        why = dispatch.reasons("selective_scan", backend, device)
        if why:
            print(f"{backend} cannot run here: {'; '.join(why)}")
            return 1
        calls = 0
        for size, dtype in itertools.product(sizes, dtypes):
            for flag, other in itertools.product((False, True), repeat=2):
                scan(backend, dtype, size, channel_last=flag, full=other)
                linear(backend, dtype, size, channel_last=flag, reverse=other)
                convolution(backend, dtype, size, channel_last=flag, packed=other)
            for flag in (False, True):
                delta_rule(backend, dtype, size, channel_last=flag)
                ssd(backend, dtype, size, mamba3=flag)
            step(backend, dtype, size)
            update(dtype, size)
            places(backend, dtype, size)
            calls += 17
        for dtype, hidden, persistent in itertools.product(dtypes, (6, 16), (False, True)):
            conv_lstm(backend, dtype, hidden, persistent)
            calls += 1
        torch.cuda.synchronize()
        print(f"{backend}: {calls} calls, forward and backward, ran to the end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
