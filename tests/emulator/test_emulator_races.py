"""The emulator finds shared-memory races; removing any barrier of the project's kernels causes one."""

import functools
import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from emulated_cuda import EmulatedCuda

import wmkernels
from wmkernels import SSDState
from wmkernels.conv_lstm import cuda_persistent

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emulator.build import build, find_compiler  # noqa: E402
from emulator.client import Emulator, EmulatorError  # noqa: E402

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

# The package attribute is the function, not the module.
delta_module = importlib.import_module("wmkernels.gated_delta_rule.function")

# Planted races (emulator/sample_kernels_races.cu) and their reports.
PLANTS = {
    "nothing": "",
    "a shuffle for a barrier": r"of slots(.|\n)*(wrote|read) there(.|\n)*or __syncwarp of both",
    "a vote for a barrier": r"of slots(.|\n)*(wrote|read) there(.|\n)*or __syncwarp of both",
    "the other half of a warp": r"of slots(.|\n)*(wrote|read) there(.|\n)*or __syncwarp of both",
    "a reader that was not met": r"of slots(.|\n)*or __syncwarp of both",
    "a write after reads": r"of slots(.|\n)*no __syncthreads lies between",
    "the same value twice": r"writes 4 bytes.* of slots(.|\n)*wrote there(.|\n)*no __syncthreads lies between",
    "a copy without a barrier": r"of dynamic shared memory(.|\n)*(wrote|read|copies) there",
    "a barrier before the wait": r"of dynamic shared memory(.|\n)*(wrote|read|copies) there",
    "a write under a copy": r"writes 4 bytes.* of dynamic shared memory(.|\n)*copies there asynchronously",
    "a plain read of an atomic": r"changes atomically(.|\n)*of counter(.|\n)*read there|of counter(.|\n)*wrote there",
    "one barrier a round short": r"of slots(.|\n)*no __syncthreads",
}
SEEDS = range(4)


@pytest.fixture(scope="module")
def sample_kernels():
    sources = [ROOT / "emulator" / name for name in ("sample_kernels.cu", "sample_kernels_races.cu")]
    emulator = Emulator(build("sample_kernels_races", sources, races=True))
    yield emulator
    emulator.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_ordered_accesses_are_no_race_under_any_order(sample_kernels, seed):
    answers = torch.zeros(64)
    sample_kernels.call("sample_races", [torch.randn(256), answers, 0], seed=seed)
    numbers, result = torch.randn(192), torch.randn(32)
    for name, words in (("sample_reverse", [numbers, 192, 1, 0, 0]), ("sample_rotate", [result, 0])):
        sample_kernels.call(name, words, seed=seed)


@pytest.mark.parametrize("plant", list(PLANTS)[1:])
def test_a_race_is_reported_under_every_order(sample_kernels, plant):
    for seed in SEEDS:
        with pytest.raises(EmulatorError, match="a race: this thread") as report:
            sample_kernels.call(
                "sample_races", [torch.randn(256), torch.zeros(64), list(PLANTS).index(plant)], seed=seed
            )
        report.match(PLANTS[plant])
        # both accesses; atomics are in the emulator's header
        assert len(re.findall(r"(sample_kernels_races\.cu|cuda_emulator\.h):\d+", str(report.value))) >= 2


def test_a_barrier_can_be_left_out(sample_kernels):
    numbers = torch.randn(64)
    (barrier,) = sample_kernels.call("sample_reverse", [numbers, 64, 1, 0, 0]).barriers
    with pytest.raises(EmulatorError, match=r"reverse_kernel.*a race"):
        sample_kernels.call("sample_reverse", [numbers, 64, 1, 0, 0], disabled_barrier=barrier)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def differentiate(outputs, leaves):
    torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


def scan(dtype, channels, state, time, full=False, channel_last=False):
    """``full``: packed, with resets, a gate, an initial state and a constant C."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch = 1 if full else 2
    shape = (batch, time, channels) if channel_last else (batch, channels, time)
    projection = (batch, 1, time, state) if channel_last else (batch, 1, state, time)
    leaves = {
        "u": random(*shape, dtype=dtype),
        "delta": random(*shape, dtype=dtype),
        "A": (-torch.rand(channels, state, dtype=wide)).requires_grad_(),
        "B": random(*projection, dtype=dtype),
        "C": random(channels, state, dtype=wide) if full else random(*projection, dtype=dtype),
    }
    options = {"delta_softplus": True, "return_last_state": True, "channel_last": channel_last, "backend": "cuda"}
    if full:
        leaves |= {"D": random(channels, dtype=wide), "delta_bias": random(channels, dtype=wide)}
        leaves |= {"z": random(*shape, dtype=dtype), "initial_state": random(2, channels, state, dtype=wide)}
        options |= {"reset": torch.rand(batch, time) < 0.1, "cu_seqlens": torch.tensor([0, time // 3, time])}
    differentiate(wmkernels.selective_scan(**leaves, **options), list(leaves.values()))


def linear(dtype, channels, time, reverse=False, channel_last=False):
    shape = (1, time, channels) if channel_last else (1, channels, time)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [torch.rand(shape).to(dtype).requires_grad_(), random(*shape, dtype=dtype)]
    leaves.append(random(1, channels, dtype=wide))
    options = {"reset": torch.rand(1, time) < 0.1, "reverse": reverse, "channel_last": channel_last}
    differentiate(wmkernels.linear_scan(*leaves, **options, return_last_state=True, backend="cuda"), leaves)


def step(dtype, state):
    leaves = [random(2, 6, state), *(random(2, 6, dtype=dtype) for _ in range(2))]
    others = [-torch.rand(6, state), random(2, state, dtype=dtype), random(2, state, dtype=dtype)]
    differentiate(wmkernels.selective_step(*leaves, *others, delta_softplus=True, backend="cuda"), leaves)


def places(dtype, channels, frequencies=5, constant=()):
    """``constant``: inputs without a gradient."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        "values": random(1, 18, 5, channels, dtype=dtype),
        "phase": random(1, 18, 1, 2 * frequencies, dtype=wide),
        "keys": random(5, 2 * frequencies, dtype=wide),
        "inverse": random(5, 5, dtype=wide),
        "gate": random(1, 18, 5, 1, dtype=wide),
        "initial_state": random(2, 1, 2 * frequencies, channels, dtype=wide),
    }
    options = {"reset": torch.rand(1, 18) < 0.1, "cu_seqlens": torch.tensor([0, 1, 18])}
    for name in constant:
        leaves[name] = leaves[name].detach()
    outputs = wmkernels.place_memory(**leaves, **options, return_last_state=True, backend="cuda")
    differentiate(outputs, [x for x in leaves.values() if x.requires_grad])


def delta_rule(dtype, d_k, d_v, chunk):
    """Packed, with resets, an initial state and tiles past the first."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = random(1, 2, d_k, 40, dtype=dtype), random(1, 2, d_k, 40, dtype=dtype)
    leaves = [q, k, random(1, 2, d_v, 40, dtype=dtype)]
    leaves += [(-torch.rand(1, 2, 40, dtype=wide)).requires_grad_(), random(1, 2, 40, dtype=wide)]
    options = {"reset": torch.arange(40)[None] == 38, "cu_seqlens": torch.tensor([0, 3, 40])}
    options["initial_state"] = random(2, 2, d_k, d_v, dtype=wide)
    with mock.patch.object(delta_module, "CHUNK", chunk):
        outputs = wmkernels.gated_delta_rule(*leaves, **options, return_last_state=True, backend="cuda")
    differentiate(outputs, [*leaves, options["initial_state"]])


def convolution(dtype, channels, time, width, channel_last=False):
    """Packed, with resets, silu and initial windows; at 152 steps whole tiles are followed by a partial one."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = random(*((1, time, channels) if channel_last else (1, channels, time)), dtype=dtype)
    leaves = [x, random(channels, width, dtype=wide), random(channels, dtype=wide)]
    window = (2, width - 1, channels) if channel_last else (2, channels, width - 1)
    leaves.append(random(*window, dtype=wide))
    options = {"reset": torch.rand(1, time) < 0.1, "cu_seqlens": torch.tensor([0, 2, time])}
    outputs = wmkernels.causal_conv1d(
        *leaves[:3],
        activation="silu",
        initial_state=leaves[3],
        channel_last=channel_last,
        return_last_state=True,
        backend="cuda",
        **options,
    )
    differentiate(outputs, leaves)


def ssd_scan(dtype, d, n, chunk, gated=True):
    """Packed, with resets, an initial state and tiles past the first; ``gated``: with D, z and Mamba-3's options."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {"x": random(1, 40, 2, d, dtype=dtype), "dt": torch.rand(1, 40, 2, dtype=wide).requires_grad_()}
    leaves |= {"A": (-torch.rand(2, dtype=wide)).requires_grad_()}
    leaves |= {name: random(1, 40, 1, n, dtype=dtype) for name in "BC"}
    options = {"reset": torch.arange(40)[None] == 38, "cu_seqlens": torch.tensor([0, 3, 40]), "chunk": chunk}
    state = random(2, 2, d, n, dtype=wide)
    if gated:
        leaves |= {"D": random(2, dtype=wide), "z": random(1, 40, 2, d, dtype=dtype)}
        leaves["trapezoid"] = torch.rand(1, 40, 2, dtype=wide).requires_grad_()
        options["initial_state"] = SSDState(state, B=random(2, 1, n, dtype=wide), x=random(2, 2, d, dtype=wide))
    else:
        options["initial_state"] = state
    out, last = wmkernels.ssd_scan(**leaves, **options, return_last_state=True, backend="cuda")
    differentiate([out, last.state if gated else last], [*leaves.values(), state])


def conv_lstm(persistent):
    hidden = 16
    tensors = [torch.randn(2, 1, 2, 5, 5), torch.randn(4 * hidden, 2, 3, 3), torch.randn(4 * hidden, hidden, 3, 3)]
    leaves = [x.bfloat16().requires_grad_(not persistent) for x in tensors]
    with (
        mock.patch.object(cuda_persistent, "ENABLED", persistent),
        mock.patch.object(cuda_persistent, "processors", lambda device: 4),
    ):
        out, (h, c) = wmkernels.conv_lstm(*leaves, backend="cuda")
    if not persistent:
        differentiate([out, h, c], leaves)


FLOATS = (torch.float32, torch.bfloat16, torch.float64)
# Multiprocessors (many split time) and call: partial and full channel tiles, time tiles and chunks.
CASES = {
    **{f"scan {t}": (1, functools.partial(scan, t, 32, 16, 44)) for t in FLOATS},
    **{f"full scan {t}": (1, functools.partial(scan, t, 35, 5, 40, full=True)) for t in FLOATS},
    **{f"split scan {t}": (1000, functools.partial(scan, t, 32, 16, 200)) for t in FLOATS[:2]},
    "split full scan": (1000, functools.partial(scan, torch.float32, 5, 16, 200, full=True)),
    "scan by channels": (1, functools.partial(scan, torch.bfloat16, 32, 16, 64, channel_last=True)),
    "64 states": (1, functools.partial(scan, torch.float32, 8, 64, 40)),
    "full, 64 states": (1, functools.partial(scan, torch.bfloat16, 9, 33, 40, full=True)),
    "256 states": (1, functools.partial(scan, torch.float32, 4, 200, 20)),
    "full, 256 states": (1000, functools.partial(scan, torch.float16, 5, 256, 36, full=True)),
    "256 states in float64": (1000, functools.partial(scan, torch.float64, 4, 130, 19)),
    "full, 256 states in float64": (1, functools.partial(scan, torch.float64, 5, 17, 11, full=True)),
    **{f"linear scan {t}": (1, functools.partial(linear, t, 19, 300)) for t in FLOATS},
    "split linear scan": (1000, functools.partial(linear, torch.float32, 16, 1500, reverse=True)),
    "linear scan by channels": (1, functools.partial(linear, torch.bfloat16, 32, 256, channel_last=True)),
    "small step": (1, functools.partial(step, torch.bfloat16, 5)),
    "large step": (1, functools.partial(step, torch.float32, 130)),
    "places": (1, functools.partial(places, torch.float32, 17)),
    "places without states": (1, functools.partial(places, torch.float32, 4, constant=("phase", "keys", "inverse"))),
    "many places' rows": (1, functools.partial(places, torch.bfloat16, 4, 150)),
    "delta rule": (1, functools.partial(delta_rule, torch.float32, 5, 3, 32)),
    "delta rule, wide": (1, functools.partial(delta_rule, torch.bfloat16, 20, 36, 64)),
    "delta rule in float64": (1, functools.partial(delta_rule, torch.float64, 9, 5, 64)),
    **{f"convolution {t}": (1, functools.partial(convolution, t, 35, 152, 4)) for t in FLOATS},
    "convolution by channels": (1, functools.partial(convolution, torch.bfloat16, 32, 128, 2, channel_last=True)),
    "convolution of many taps": (1, functools.partial(convolution, torch.float32, 3, 9, 6)),
    "SSD": (1, functools.partial(ssd_scan, torch.float32, 5, 3, 32)),
    "SSD, wide": (1000, functools.partial(ssd_scan, torch.bfloat16, 36, 20, 64)),
    "SSD in float64": (1, functools.partial(ssd_scan, torch.float64, 5, 9, 64, gated=False)),
    "ConvLSTM": (1, functools.partial(conv_lstm, False)),
    "ConvLSTM in one kernel": (4, functools.partial(conv_lstm, True)),
}
# grid_barrier orders global memory, which the detector ignores.
FOR_GLOBAL_MEMORY = "mma.cuh"


@pytest.fixture(scope="module")
def cuda():
    emulated = EmulatedCuda(races=True)
    with emulated.installed():
        yield emulated
    emulated.close()


def run(cuda, case, disabled_barrier=""):
    """Returns the executed barriers."""
    cuda.multiprocessors, call = CASES[case]
    cuda.disabled_barrier, cuda.ran = disabled_barrier, []
    torch.manual_seed(0)
    call()
    return {barrier for result in cuda.ran for barrier in result.barriers}


@pytest.fixture(scope="module")
def passed_by(cuda):
    """The cases that execute each barrier, fastest first."""
    found = defaultdict(list)
    for case in CASES:
        barriers = run(cuda, case)
        work = sum(result.switches for result in cuda.ran)
        for barrier in barriers:
            found[barrier].append((work, case))
    return {barrier: [case for _, case in sorted(cases)] for barrier, cases in found.items()}


def barriers_of(path):
    """Source lines by "file:line"."""
    lines = enumerate(path.read_text().splitlines(), 1)
    return {f"{path.name}:{n}": line for n, line in lines if re.search(r"__sync(threads|warp)\(", line.split("//")[0])}


@pytest.mark.gated("CUDA races")
@pytest.mark.canary
def test_the_step_has_no_race(cuda):
    cuda.ran = []
    h, x, b = torch.randn(2, 6, 130), torch.randn(2, 6), torch.randn(2, 130)
    wmkernels.selective_step(h, x, x, -torch.rand(6, 130), b, b, backend="cuda")
    assert cuda.kernels == {"selective_step_kernel"}


@pytest.mark.gated("CUDA races")
def test_no_kernel_has_a_race(cuda, passed_by):
    headers = (ROOT / "csrc" / "cuda").glob("*/*.cuh")
    assert passed_by.keys() == {barrier for path in headers for barrier in barriers_of(path)}


def has_race_without(cuda, case, barrier):
    try:
        run(cuda, case, disabled_barrier=barrier)
    except EmulatorError as error:
        assert "a race: this thread" in str(error), f"{case} without {barrier}: {error}"
        return True
    return False


@pytest.mark.gated("CUDA races")
def test_a_race_is_found_that_changes_no_result_here(cuda):
    """Shuffles order the reads of step sizes and the writes of y, whatever the thread order."""
    barriers = barriers_of(ROOT / "csrc" / "cuda" / "selective_scan" / "selective_scan_forward_kernel.cuh")
    (barrier,) = (barrier for barrier, line in barriers.items() if "step sizes have been read" in line)
    assert has_race_without(cuda, "full scan torch.float32", barrier)


@pytest.mark.gated("CUDA races")
def test_every_barrier_is_needed(cuda, passed_by):
    barriers = {barrier for barrier in passed_by if not barrier.startswith(FOR_GLOBAL_MEMORY)}
    needed = {
        barrier for barrier in barriers if any(has_race_without(cuda, case, barrier) for case in passed_by[barrier])
    }
    assert needed == barriers
