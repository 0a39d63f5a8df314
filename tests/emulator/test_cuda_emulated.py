"""The scans' CUDA kernels agree with the reference; results are bit-identical under every thread order."""

import importlib
import mmap
from unittest import mock

import pytest
import torch
from causal_conv_problems import causal_convs, small_causal_conv
from delta_rule_problems import delta_rules, small_delta_rule
from emulated_cuda import EmulatedCuda
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from place_memory_problems import inverse_of, phases, place_memories, small_place_memory, view_keys
from problems import (
    STATES,
    Problem,
    assert_as_accurate_as_the_reference,
    few_channels,
    laid_out,
    linear_scans,
    scans,
    steps,
)
from special_values import check as check_special_values
from special_values import check_overflowing_gates
from ssd_problems import small_ssd, ssd_scans

import wmkernels
from wmkernels import SSDState, native_call
from wmkernels.causal_conv1d import native as conv_native
from wmkernels.causal_conv1d.meta import ConvInputs
from wmkernels.causal_conv1d.reference import causal_conv1d_reference
from wmkernels.checks import state_dtype
from wmkernels.linear_scan import native as linear_native
from wmkernels.linear_scan.meta import LinearScanInputs
from wmkernels.linear_scan.reference import linear_scan_reference
from wmkernels.selective_scan import native as selective_native
from wmkernels.selective_scan.meta import ScanInputs
from wmkernels.selective_scan.reference import selective_scan_reference
from wmkernels.selective_step import native as step_native
from wmkernels.selective_step.meta import StepInputs
from wmkernels.selective_step.reference import selective_step_reference

from emulator.build import find_compiler  # isort: skip

pytestmark = [
    pytest.mark.gated("CUDA scans emulated"),
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
]

# The package attribute is the function, not the module.
ssd_module = importlib.import_module("wmkernels.ssd_scan.function")
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux constant, in mmap from Python 3.13
ORDERS = (0, 1, 2)  # of the threads: ascending, descending, shuffled
# Multiprocessor counts: with few, time is never split; with many, always.
CHIPS = (1, 8, 1000)
OPS = (
    "selective_scan",
    "selective_step",
    "linear_scan",
    "place_memory",
    "gated_delta_rule",
    "causal_conv1d",
    "ssd_scan",
)
cases = dict.fromkeys(OPS, 0)


@pytest.fixture(scope="module")
def cuda():
    emulated = EmulatedCuda(ORDERS)
    with emulated.installed():
        yield emulated
    emulated.close()


def decaying(problem):
    """A < 0: growing states amplify rounding errors."""
    problem.tensors["A"] = -problem.tensors["A"].abs()
    return problem


def remembering(problem):
    """Gates near one: a state survives hundreds of steps."""
    problem.tensors["gates"] = 1 - 0.004 * problem.tensors["gates"].abs()
    return problem


def check(cuda, problem, multiprocessors=4, shuffle=2):
    cuda.multiprocessors, cuda.seeds, cuda.ran = multiprocessors, (0, 1, shuffle), []
    assert_as_accurate_as_the_reference(problem, "cuda")
    cases[problem.function.__name__.removeprefix("flat_")] += 1


shuffles = st.integers(2, 2**31)
# A case takes up to a second: no shrinking.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
quick = settings(phases=PHASES)


@settings(quick, max_examples=settings().max_examples)
@given(problem=scans(), multiprocessors=st.sampled_from(CHIPS), shuffle=shuffles)
def test_selective_scan(cuda, problem, multiprocessors, shuffle):
    check(cuda, problem, multiprocessors, shuffle)


@settings(quick, max_examples=max(10, settings().max_examples // 2))
@given(problem=scans(max_time=300, max_channels=5, states=[1, 3, 16, 17, 64]).map(decaying), shuffle=shuffles)
def test_selective_scan_split_over_time(cuda, problem, shuffle):
    check(cuda, problem, CHIPS[-1], shuffle)


@settings(quick, max_examples=max(6, settings().max_examples // 6))
@given(
    problem=scans(max_time=24, max_channels=18, states=[*STATES[-3:], 65, 127, 128, 129, 255, 256]), shuffle=shuffles
)
def test_large_states(cuda, problem, shuffle):
    check(cuda, problem, 1000, shuffle)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_time_is_split_where_the_chip_would_be_idle(cuda, dtype, packed):
    many = 333 if dtype == torch.float64 else 700  # more segments than warps that combine them
    for multiprocessors, split, time, channels in ((1, False, 100, 40), (1000, True, many, 2)):
        check(cuda, few_channels(dtype, time, "cpu", packed, channels), multiprocessors)
        # packed batches are split by mean length
        assert packed or ("selective_scan_combine_kernel" in cuda.kernels) == split


@quick
@given(problem=steps(), shuffle=shuffles)
def test_selective_step(cuda, problem, shuffle):
    check(cuda, problem, shuffle=shuffle)


@quick
@given(problem=linear_scans(max_time=90), multiprocessors=st.sampled_from(CHIPS), shuffle=shuffles)
def test_linear_scan(cuda, problem, multiprocessors, shuffle):
    check(cuda, problem, multiprocessors, shuffle)


@settings(quick, max_examples=max(6, settings().max_examples // 4))
@given(problem=linear_scans(max_time=3000).map(remembering), multiprocessors=st.sampled_from(CHIPS), shuffle=shuffles)
def test_linear_scan_over_a_long_time(cuda, problem, multiprocessors, shuffle):
    check(cuda, problem, multiprocessors, shuffle)


@quick
@given(problem=place_memories(max_time=20), shuffle=shuffles)
def test_place_memory(cuda, problem, shuffle):
    check(cuda, problem, shuffle=shuffle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_place_memory_larger_than_shared_memory(cuda, dtype):
    generator = torch.Generator().manual_seed(0)
    frequencies, places = 80, 41
    keys = view_keys(places, frequencies, False, generator)
    tensors = {
        "values": torch.randn(1, 2, places, 9, generator=generator, dtype=dtype),
        "phase": phases([1, 2, 1], frequencies, generator).to(dtype),
        "keys": keys.to(dtype),
        "inverse": inverse_of(keys).to(dtype),
    }
    check(cuda, Problem(wmkernels.place_memory, tensors, {"return_last_state": True}))


def test_a_place_memory_keeps_its_state_bit_for_bit_while_the_gate_is_shut(cuda):
    tensors = dict(small_place_memory("cpu", torch.float32, time=4).tensors)
    tensors["gate"] = torch.zeros_like(tensors["gate"])
    tensors["initial_state"][0, 0] = torch.tensor([[-0.0, 1e-42], [3e38, 1.0]])
    _, last = wmkernels.place_memory(**tensors, return_last_state=True, backend="cuda")
    assert torch.equal(last.view(torch.int32), tensors["initial_state"].view(torch.int32))


def test_nan_does_not_cross_a_reset_of_a_place_memory(cuda):
    tensors = dict(small_place_memory("cpu", torch.float32, batch=1, time=4).tensors)
    tensors["reset"] = torch.tensor([[False, False, True, False]])
    tensors["initial_state"] = torch.full_like(tensors["initial_state"], float("nan"))
    leaves = {name: tensors[name].requires_grad_() for name in ("values", "phase", "gate")}
    out, last = wmkernels.place_memory(**tensors, return_last_state=True, backend="cuda")
    assert out[:, :2].isnan().all() and out[:, 2:].isfinite().all() and last.isfinite().all()
    for gradient in torch.autograd.grad(out[:, 2:].sum() + last.sum(), list(leaves.values())):
        assert gradient[:, 2:].isfinite().all()


@pytest.mark.parametrize(
    "right", [("values", "keys", "inverse", "gate", "initial_state", "initial_phase"), ("initial_state",)]
)
def test_a_phase_that_nothing_reads_may_be_nan(cuda, right):
    """With a reset at the first step, or where only an additive write uses the initial phase."""
    tensors = dict(small_place_memory("cpu", torch.float32, batch=1, time=3).tensors)
    tensors["initial_phase"] = torch.full_like(tensors["initial_phase"], float("nan"))
    if len(right) > 1:
        tensors["reset"] = torch.tensor([[True, False, False]])
        tensors["initial_state"] = torch.full_like(tensors["initial_state"], float("inf"))
    else:
        del tensors["inverse"]
    leaves = [tensors[name].requires_grad_() for name in right]
    out, last = wmkernels.place_memory(**tensors, return_last_state=True, backend="cuda")
    for name, gradient in zip(right, torch.autograd.grad(out.sum() + last.sum(), leaves), strict=True):
        assert gradient.isfinite().all(), name


@quick
@given(problem=delta_rules(max_time=20, sizes=[1, 3, 8, 17, 33]), shuffle=shuffles)
def test_gated_delta_rule(cuda, problem, shuffle):
    check(cuda, problem, shuffle=shuffle)


# A chunk of three tiles; one of a tile.
@pytest.mark.parametrize("chunk", [70, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_delta_rule_of_several_tiles_and_panels(cuda, dtype, chunk):
    torch.manual_seed(0)
    problem = small_delta_rule("cpu", dtype, 1, 75, 1, 37, 41)
    problem.tensors["reset"] = torch.arange(75)[None] == 50
    problem.chunk = chunk
    check(cuda, problem)
    assert "panel_sum_kernel" in cuda.kernels


@pytest.mark.parametrize(("dtype", "keys"), [(torch.float32, 250), (torch.float64, 98)])
def test_a_gated_delta_rule_larger_than_shared_memory(cuda, dtype, keys):
    torch.manual_seed(0)
    check(cuda, small_delta_rule("cpu", dtype, 1, 3, 1, keys, 6))


@quick
@given(problem=causal_convs(max_time=90), shuffle=shuffles)
def test_causal_conv1d(cuda, problem, shuffle):
    check(cuda, problem, shuffle=shuffle)


# Widths of both kernels; several chunks of time, full and partial tiles of channels.
@settings(quick, max_examples=max(6, settings().max_examples // 6))
@given(
    problem=causal_convs(max_time=600, channels=[3, 32, 40], widths=[2, 3, 4, 4, 9], layouts=["contiguous"]),
    shuffle=shuffles,
)
def test_causal_conv1d_over_a_long_time(cuda, problem, shuffle):
    check(cuda, problem, shuffle=shuffle)


# A tile has 128 steps forward (64 in float64) and 64 backward, a chunk 256.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_resets_and_sequences_of_a_causal_conv1d_beside_every_edge(cuda, dtype):
    torch.manual_seed(0)
    problem = small_causal_conv("cpu", dtype, 1, 300, 33, 4)
    edges = [0, 1, 63, 65, 66, 127, 128, 129, 191, 192, 256, 258, 299]
    problem.tensors["reset"] = torch.isin(torch.arange(300), torch.tensor(edges))[None]
    check(cuda, problem)
    bounds = [0, 0, 1, 2, 62, 64, 64, 65, 126, 128, 130, 192, 193, 255, 256, 257, 300, 300]
    problem.tensors["cu_seqlens"] = torch.tensor(bounds)
    problem.tensors["initial_state"] = torch.randn(len(bounds) - 1, 33, 3, dtype=problem.tensors["weight"].dtype)
    check(cuda, problem)
    problem.tensors["reset"] = None
    check(cuda, problem)


@pytest.mark.parametrize("width", [3, 4, 6])
@pytest.mark.parametrize("channel_last", [False, True])
def test_chunks_and_steps_of_a_causal_conv1d_are_the_sequence_bit_for_bit(cuda, width, channel_last):
    cuda.seeds, time = (0,), 1 if channel_last else 2
    problem = small_causal_conv("cpu", torch.float32, time=145, channels=20, width=width)
    x, weight, bias, state = problem.tensors.values()
    reset = torch.rand(2, 145) < 0.1
    if channel_last:
        x, state = x.mT, state.mT
    options = {"activation": "silu", "channel_last": channel_last, "backend": "cuda"}
    whole, last = wmkernels.causal_conv1d(
        x, weight, bias, initial_state=state, reset=reset, return_last_state=True, **options
    )
    for start, length in ((0, 3), (3, 130), (133, 2)):
        part, flags = x.narrow(time, start, length), reset[:, start : start + length]
        y, state = wmkernels.causal_conv1d(
            part, weight, bias, initial_state=state, reset=flags, return_last_state=True, **options
        )
        assert torch.equal(y, whole.narrow(time, start, length))
    cuda.ran = []
    for t in range(135, 145):
        y, state = wmkernels.causal_conv1d_step(state, x.select(time, t), weight, bias, reset=reset[:, t], **options)
        assert torch.equal(y, whole.select(time, t))
    assert torch.equal(state, last)
    assert cuda.kernels == {"causal_conv1d_step_kernel"}


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_nan_of_a_causal_conv1d_reaches_as_far_as_its_taps(cuda, width):
    cuda.seeds, step = (0,), 62
    torch.manual_seed(0)
    problem = small_causal_conv("cpu", torch.float32, batch=1, time=80, channels=5, width=width)
    x, cotangent = problem.tensors["x"], torch.randn(1, 5, 80)

    def run(x, cotangent):
        leaf = x.clone().requires_grad_()
        out, last = wmkernels.causal_conv1d(**{**problem.tensors, "x": leaf}, **problem.options, backend="cuda")
        return out.detach(), last, torch.autograd.grad(out, leaf, cotangent)[0]

    out, last, gradient = run(x, cotangent)
    nan = torch.where(torch.arange(80) == step, float("nan"), 0.0)
    spoiled, spoiled_last, _ = run(x + nan, cotangent)
    spoiled_gradient = run(x, cotangent + nan)[2]
    reached = slice(step, step + width), slice(step - width + 1, step + 1)
    for found, clean, where in zip((spoiled, spoiled_gradient), (out, gradient), reached, strict=True):
        assert found[..., where].isnan().all()
        found[..., where] = clean[..., where]
        assert torch.equal(found, clean)
    assert torch.equal(spoiled_last, last)


# Beside the edge of a tile and of a chunk; with 7 taps from the caches.
@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("edge", [64, 128, 256, 259])
def test_neither_nan_nor_infinity_crosses_a_reset_or_a_sequence_of_a_causal_conv1d(cuda, edge, width):
    cuda.seeds = (0,)
    torch.manual_seed(0)
    problem = small_causal_conv("cpu", torch.float32, batch=1, time=270, channels=5, width=width)
    problem.tensors["initial_state"] = problem.tensors["initial_state"].repeat(2, 1, 1)
    for name, value in (("reset", torch.arange(270)[None] == edge), ("cu_seqlens", torch.tensor([0, edge, 270]))):
        tensors = {"cu_seqlens": torch.tensor([0, 2, 270]), **problem.tensors, name: value}
        for poison in (float("nan"), float("inf")):
            results = []
            for step in (None, edge - 1):
                x, cotangent = tensors["x"].clone(), torch.ones(1, 5, 270)
                if step is not None:
                    x[..., step], cotangent[..., edge] = poison, poison
                leaf = tensors["x"].clone().requires_grad_()
                options = {**problem.options, "backend": "cuda"}
                y, last = wmkernels.causal_conv1d(**{**tensors, "x": x}, **options)
                out, _ = wmkernels.causal_conv1d(**{**tensors, "x": leaf}, **options)
                results.append((y[..., edge:], last[1], torch.autograd.grad(out, leaf, cotangent)[0][..., :edge]))
            for found, clean in zip(results[1], results[0], strict=True):
                assert torch.equal(found, clean)


def test_nan_of_a_gated_delta_rule_reaches_neither_earlier_outputs_nor_later_gradients(cuda):
    cuda.seeds = (0,)
    torch.manual_seed(0)
    clean = small_delta_rule("cpu", torch.float32, time=30, size=5)
    leaves = clean.leaves()
    out, last = clean.call("cuda", leaves)
    cotangents = [torch.randn_like(out), torch.randn_like(last)]
    names = ("q", "k", "v", "gate", "beta")
    gradients = torch.autograd.grad((out, last), [leaves[name] for name in names], cotangents, retain_graph=True)
    for name in names:
        spoiled = clean.mapped(torch.clone)
        spoiled.tensors[name][..., 17] = float("nan")
        found = spoiled.call("cuda")[0]
        assert torch.equal(found[..., :17], clean.call("cuda")[0][..., :17]), name
        assert found[..., 17:].isnan().any(), name
    cotangents[0][..., 17] = float("nan")
    spoiled = torch.autograd.grad((out, last), [leaves[name] for name in names], cotangents)
    for name, gradient, expected in zip(names, spoiled, gradients, strict=True):
        assert torch.equal(gradient[..., 18:], expected[..., 18:]), name
        assert gradient[..., :18].isnan().any(), name


@pytest.mark.parametrize("where", [0, 11, 29])
def test_nan_does_not_cross_a_reset_of_a_gated_delta_rule(cuda, where):
    cuda.seeds = (0,)
    torch.manual_seed(0)
    problem = small_delta_rule("cpu", torch.float32, batch=1, time=30, size=5)
    tensors = problem.tensors
    tensors["reset"] = torch.arange(30)[None] == where
    tensors["initial_state"].fill_(float("nan"))
    for name, poison in (("k", float("nan")), ("gate", float("inf")), ("v", float("inf"))):
        tensors[name][..., :where] = poison
    tensors["gate"][..., where] = float("nan")
    leaves = problem.leaves()
    out, last = problem.call("cuda", leaves)
    assert out[..., where:].isfinite().all() and last.isfinite().all()
    inputs = [leaves[name] for name in ("q", "k", "v", "gate", "beta")]
    for gradient in torch.autograd.grad(out[..., where:].sum() + last.sum(), inputs):
        assert gradient[..., where:].isfinite().all()


@settings(quick, max_examples=max(6, settings().max_examples // 4))
@given(
    problem=ssd_scans(max_time=40, sizes=[1, 3, 8, 17, 33]), multiprocessors=st.sampled_from(CHIPS), shuffle=shuffles
)
def test_ssd_scan(cuda, problem, multiprocessors, shuffle):
    check(cuda, problem, multiprocessors, shuffle)


# A chunk of three tiles; one of a tile. One multiprocessor: a block takes the heads of a group one after another.
@pytest.mark.parametrize(("chunk", "multiprocessors"), [(70, 1), (32, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ssd_scan_of_several_segments_and_panels(cuda, dtype, chunk, multiprocessors):
    torch.manual_seed(0)
    problem = small_ssd("cpu", dtype, 1, 150, 3, 41, 21)
    problem.tensors["reset"] = torch.isin(torch.arange(150), torch.tensor([50, 96]))[None]
    problem.chunk = chunk
    with mock.patch.object(ssd_module, "kept_interval", lambda steps: 2 * steps):
        check(cuda, problem, multiprocessors)
    assert "panel_sum_kernel" in cuda.kernels


@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 250), (torch.float64, 98)])
def test_an_ssd_scan_larger_than_shared_memory(cuda, dtype, n):
    torch.manual_seed(0)
    check(cuda, small_ssd("cpu", dtype, 1, 3, 2, 6, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mamba3", [False, True])
def test_ssd_step_without_gradients_has_a_kernel_of_its_own(cuda, dtype, mamba3):
    torch.manual_seed(0)
    scan, held = small_ssd("cpu", torch.float64, 3, 1, 4, 7, 35).tensors, state_dtype(dtype)
    given = {name: scan[name][:, 0].to(dtype) for name in ("x", "dt", "B", "C", "z")}
    given |= {"A": scan["A"].to(held), "D": scan["D"].to(held), "reset": torch.tensor([False, True, False])}
    state = laid_out(scan["initial_state"].to(held), "permuted", 0)
    if mamba3:
        given |= {"angle": torch.randn(3, 1, 9).to(dtype), "trapezoid": torch.rand(3, 4).to(dtype)}
        previous = torch.randn(3, 1, 35, dtype=held), torch.randn(3, 4, 7, dtype=held)
        state = SSDState(state, torch.randn(3, 4, 9, dtype=torch.float64), *previous)

    def step(backend, state, given):
        out, last = wmkernels.ssd_step(state, **given, backend=backend)
        return [out, *last] if mamba3 else [out, last]

    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    expected = step("reference", SSDState(*(x.double() for x in state)) if mamba3 else state.double(), exact)
    cuda.ran = []
    found = step("cuda", state, given)
    assert "ssd_scan_step_kernel" in cuda.kernels and "ssd_scan_forward_kernel" not in cuda.kernels
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    for value, true in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=accuracy[value.dtype], atol=accuracy[value.dtype])


def test_nan_of_an_ssd_scan_reaches_neither_earlier_outputs_nor_later_gradients(cuda):
    cuda.seeds = (0,)
    torch.manual_seed(0)
    clean = small_ssd("cpu", torch.float32, time=30, d=5)
    leaves = clean.leaves()
    out, last = clean.call("cuda", leaves)
    cotangents = [torch.randn_like(out), torch.randn_like(last)]
    names = ("x", "dt", "B", "C", "z")
    gradients = torch.autograd.grad((out, last), [leaves[name] for name in names], cotangents, retain_graph=True)
    for name in names:
        spoiled = clean.mapped(torch.clone)
        spoiled.tensors[name][:, 17] = float("nan")
        found = spoiled.call("cuda")[0]
        assert torch.equal(found[:, :17], clean.call("cuda")[0][:, :17]), name
        assert found[:, 17:].isnan().any(), name
    cotangents[0][:, 17] = float("nan")
    spoiled = torch.autograd.grad((out, last), [leaves[name] for name in names], cotangents)
    for name, gradient, expected in zip(names, spoiled, gradients, strict=True):
        assert torch.equal(gradient[:, 18:], expected[:, 18:]), name
        assert gradient[:, :18].isnan().any(), name


@pytest.mark.parametrize("where", [0, 11, 29])
def test_nan_does_not_cross_a_reset_of_an_ssd_scan(cuda, where):
    cuda.seeds = (0,)
    torch.manual_seed(0)
    problem = small_ssd("cpu", torch.float32, batch=1, time=30, d=5)
    tensors = problem.tensors
    tensors["reset"] = torch.arange(30)[None] == where
    tensors["initial_state"].fill_(float("nan"))
    for name, poison in (("x", float("nan")), ("dt", float("inf")), ("B", float("inf"))):
        tensors[name][:, :where] = poison
    leaves = problem.leaves()
    out, last = problem.call("cuda", leaves)
    assert out[:, where:].isfinite().all() and last.isfinite().all()
    inputs = [leaves[name] for name in ("x", "dt", "B", "C", "z")]
    for gradient in torch.autograd.grad(out[:, where:].sum() + last.sum(), inputs):
        assert gradient[:, where:].isfinite().all()


# The last three split time; 300 lies in a segment that its warp combines with another.
@pytest.mark.parametrize(
    ("multiprocessors", "time", "where"), [(1, 100, 33), (1000, 700, 0), (1000, 700, 300), (1000, 700, 699)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_does_not_cross_a_reset(cuda, dtype, multiprocessors, time, where):
    cuda.multiprocessors = multiprocessors
    problem = few_channels(dtype, time, "cpu")
    tensors = dict(problem.tensors)
    tensors["reset"] = torch.arange(time)[None] == where
    for name, poison in (("u", float("nan")), ("delta", float("inf")), ("B", float("nan"))):
        tensors[name] = tensors[name].clone()
        tensors[name][..., :where] = poison
    tensors["initial_state"] = torch.full_like(tensors["initial_state"], float("nan"))
    leaves = {k: v.requires_grad_() for k, v in tensors.items() if v is not None and v.is_floating_point()}
    out, last = wmkernels.selective_scan(**{**tensors, **leaves}, return_last_state=True, backend="cuda")
    assert out[..., where:].isfinite().all() and last.isfinite().all()
    gradients = torch.autograd.grad([out[..., where:].sum(), last.sum()], [leaves[k] for k in ("u", "delta", "B", "C")])
    for gradient in gradients:
        assert gradient[..., where:].isfinite().all()


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_a_step_size_of_zero_keeps_a_state_bit_for_bit(cuda, multiprocessors):
    cuda.multiprocessors = multiprocessors
    problem = few_channels(torch.float32, 300, "cpu")
    tensors = {**problem.tensors, "delta": torch.zeros_like(problem.tensors["delta"]), "reset": None}
    _, last = wmkernels.selective_scan(**tensors, return_last_state=True, backend="cuda")
    assert torch.equal(last, tensors["initial_state"])


def spread(values, strides):
    """Copies to strides of gigabytes; only touched pages use memory."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    memory = mmap.mmap(-1, elements * values.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    tensor = torch.frombuffer(memory, dtype=values.dtype).as_strided(values.shape, strides)
    return tensor.copy_(values)


# One index alone, or only several together, exceed 32 bits.
FAR = {
    "channel last": lambda rank: (2**31 + 64, *(1, 8)[: rank - 2][::-1], 2**29 + 64)[:rank],
    "everywhere": lambda rank: tuple(2**31 // (i + 1) + 4 * i for i in range(rank)),
}


@pytest.mark.parametrize("layout", FAR)
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_offsets_of_the_selective_scan_have_64_bits(cuda, layout, multiprocessors):
    cuda.multiprocessors, cuda.seeds = multiprocessors, (2,)
    batch, channels, state, time, groups = 2, 6, 3, 70, 2
    far = FAR[layout]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    near = {
        "u": normal(batch, channels, time),
        "delta": normal(batch, channels, time),
        "A": -normal(channels, state).abs(),
        "B": normal(batch, groups, state, time),
        "C": normal(batch, groups, state, time),
        "D": normal(channels),
        "z": normal(batch, channels, time),
        "delta_bias": normal(channels),
        "initial_state": normal(batch, channels, state),
        "reset": torch.rand((batch, time), generator=generator) < 0.05,
    }
    grad_out, grad_last_state = normal(batch, channels, time), normal(batch, channels, state)
    inputs = {name: spread(x, far(x.dim())) for name, x in near.items()}
    scan = ScanInputs(**inputs, delta_softplus=True)
    members = selective_native._members(scan, 16)
    f32 = torch.float32
    out, last_state = spread(torch.zeros_like(near["u"]), far(3)), torch.empty(batch, channels, state)
    chunk_states = torch.empty(batch * -(-time // 16), channels, state)
    for name, x in (("out", out), ("last_state", last_state), ("chunk_states", chunk_states)):
        members[name] = (x, x.shape, f32)
    device = torch.device("cpu")
    native_call.run("selective_scan_forward", members, device)

    contiguous = {"A", "D", "delta_bias", "initial_state"}
    gradients = {
        name: torch.empty_like(x) if name in contiguous else spread(torch.zeros_like(x), far(x.dim()))
        for name, x in near.items()
        if name != "reset"
    }
    members = selective_native._members(scan, 16)
    members |= {f"grad_{name}": (x, x.shape, f32) for name, x in gradients.items()}
    members["grad_out"] = (spread(grad_out, far(3)), grad_out.shape, f32)
    members["grad_last_state"] = (spread(grad_last_state, far(3)), last_state.shape, f32)
    members["chunk_states"] = (chunk_states, chunk_states.shape, f32)
    native_call.run("selective_scan_backward", members, device)

    leaves = {k: v.double().requires_grad_() if v.is_floating_point() else v for k, v in near.items()}
    expected = selective_scan_reference(ScanInputs(**leaves, delta_softplus=True))
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_state.double(), expected[1], rtol=1e-4, atol=1e-5)
    wanted = [x for name, x in leaves.items() if name != "reset"]
    true = torch.autograd.grad(expected, wanted, [grad_out.double(), grad_last_state.double()])
    for gradient, value in zip(gradients.values(), true, strict=True):
        torch.testing.assert_close(gradient.double(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.canary  # forward and backward of the fastest-compiling op
@pytest.mark.parametrize("layout", FAR)
@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("reverse", [False, True])
def test_offsets_of_the_linear_scan_have_64_bits(cuda, layout, multiprocessors, reverse, monkeypatch):
    cuda.multiprocessors, cuda.seeds = multiprocessors, (2,)
    batch, channels, time = shape = 2, 6, 300
    far = FAR[layout](3)
    gates, tokens, grad_out = torch.rand(shape), torch.randn(shape), torch.randn(shape)
    first, grad_last = torch.randn(batch, channels), torch.randn(batch, channels)
    reset = torch.rand(batch, time) < 0.02

    def spread_outputs(*_):
        return spread(torch.zeros(shape), far), torch.empty(batch, channels)

    def spread_gradients(*_):
        return spread(torch.zeros(shape), far), spread(torch.zeros(shape), far), torch.empty(batch, channels)

    monkeypatch.setattr(linear_native, "forward_outputs", spread_outputs)
    monkeypatch.setattr(linear_native, "backward_outputs", spread_gradients)
    wide = spread(gates, far), spread(tokens, far), spread(first, FAR[layout](2)), spread(reset, FAR[layout](2))
    inputs = LinearScanInputs(*wide, reverse=reverse)
    out, last = linear_native.forward(inputs)
    gradients = linear_native.backward(spread(grad_out, far), spread(grad_last, FAR[layout](2)), inputs, out)

    leaves = [x.double().requires_grad_() for x in (gates, tokens, first)]
    expected = linear_scan_reference(LinearScanInputs(*leaves, reset, reverse))
    torch.testing.assert_close((out.double(), last.double()), expected, rtol=1e-4, atol=1e-5)
    true = torch.autograd.grad(expected, leaves, [grad_out.double(), grad_last.double()])
    torch.testing.assert_close(tuple(x.double() for x in gradients), true, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", FAR)
def test_offsets_of_the_step_have_64_bits(cuda, layout):
    cuda.seeds = (2,)
    batch, channels, states = 2, 6, 3
    near = (
        torch.randn(batch, channels, states),
        torch.randn(batch, channels),
        torch.rand(batch, channels),
        -torch.rand(channels, states),
        torch.randn(batch, 1, states),
        torch.randn(batch, 1, states),
        torch.randn(channels),
        torch.randn(batch, channels),
        torch.randn(channels),
        torch.tensor([False, True]),
    )
    state, *others = (spread(x, FAR[layout](x.dim())) for x in near)
    new_state = spread(torch.zeros_like(near[0]), FAR[layout](3))
    out = step_native.step(StepInputs(state, *others, delta_softplus=True), new_state, None)
    B, C = (x.expand(-1, channels, -1) for x in near[4:6])
    expected = selective_step_reference(StepInputs(*near[:4], B, C, *near[6:], delta_softplus=True))
    torch.testing.assert_close((out, new_state.contiguous()), expected, rtol=1e-4, atol=1e-5)


def check_far_offsets(cuda, problem, layout):
    cuda.seeds = (2,)
    near = problem.tensors
    far = {name: spread(x, FAR[layout](x.dim())).requires_grad_() for name, x in near.items()}
    found = problem.function(**far, return_last_state=True, backend="cuda")
    exact = {name: x.double().requires_grad_() for name, x in near.items()}
    expected = problem.function(**exact, return_last_state=True, backend="reference")
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs])
        for outputs, leaves in ((found, far), (expected, exact))
    ]
    torch.testing.assert_close([x.double() for x in gradients[0]], list(gradients[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", FAR)
def test_offsets_of_the_place_memory_have_64_bits(cuda, layout):
    check_far_offsets(cuda, small_place_memory("cpu", torch.float32, time=3), layout)


@pytest.mark.parametrize("layout", FAR)
def test_offsets_of_the_gated_delta_rule_have_64_bits(cuda, layout):
    check_far_offsets(cuda, small_delta_rule("cpu", torch.float32), layout)


@pytest.mark.parametrize("layout", FAR)
@pytest.mark.parametrize("width", [3, 6])
def test_offsets_of_the_causal_conv1d_have_64_bits(cuda, layout, width, monkeypatch):
    cuda.seeds = (2,)
    torch.manual_seed(0)
    near = small_causal_conv("cpu", torch.float32, time=70, channels=6, width=width).tensors
    reset, far = torch.rand(2, 70) < 0.05, FAR[layout]
    x, state = near["x"], near["initial_state"]
    grad_out, grad_last = torch.randn_like(x), torch.randn_like(state)

    def spread_outputs(_):
        return tuple(spread(torch.zeros_like(t), far(3)) for t in (x, state))

    def spread_gradients(_):
        grad_x, grad_state = spread_outputs(_)
        return grad_x, torch.empty_like(near["weight"]), torch.empty_like(near["bias"]), grad_state

    monkeypatch.setattr(conv_native, "forward_outputs", spread_outputs)
    monkeypatch.setattr(conv_native, "backward_outputs", spread_gradients)
    inputs = ConvInputs(*(spread(t, far(t.dim())) for t in (*near.values(), reset)), silu=True)
    found = conv_native.forward(inputs)
    gradients = conv_native.backward(spread(grad_out, far(3)), spread(grad_last, far(3)), inputs)

    leaves = [t.double().requires_grad_() for t in near.values()]
    expected = causal_conv1d_reference(ConvInputs(*leaves, reset, silu=True))
    torch.testing.assert_close(tuple(t.double() for t in found), expected, rtol=1e-4, atol=1e-5)
    true = torch.autograd.grad(expected, leaves, [grad_out.double(), grad_last.double()])
    torch.testing.assert_close(tuple(t.double() for t in gradients), true, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", FAR)
def test_offsets_of_the_ssd_scan_have_64_bits(cuda, layout):
    problem = small_ssd("cpu", torch.float32)
    problem.tensors["D"] = torch.randn(2, 2)
    check_far_offsets(cuda, problem, layout)


def test_how_many_cases_ran(cuda, capsys):
    shown = ", ".join(f"{count} of {name}" for name, count in cases.items())
    with capsys.disabled():
        print(f"\nemulated CUDA kernels: {shown}; {cuda.launches} launches, each under {len(ORDERS)} orders of threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("op", "variant"),
    [
        ("selective_scan", "options"),
        ("selective_scan", "reset"),
        ("selective_step", "reset options"),
        ("linear_scan", "initial reset"),
        ("linear_scan", "reverse reset"),
        ("gated_delta_rule", "initial reset"),
        ("causal_conv1d", "options reset"),
    ],
)
def test_special_values(cuda, op, variant, dtype):
    cuda.multiprocessors, cuda.seeds = 4, (0,)
    check_special_values(op, dtype, variant, "cuda")


def test_special_values_of_the_ssd_scan(cuda):
    cuda.multiprocessors, cuda.seeds = 4, (0,)
    check_special_values("ssd_scan", torch.float32, "reset", "cuda")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("multiprocessors", "time"), [(1, 300), (1000, 700)])
def test_a_zero_state_stays_zero_where_products_of_gates_overflow(cuda, multiprocessors, time, reverse):
    cuda.multiprocessors, cuda.seeds = multiprocessors, (0,)
    check_overflowing_gates("cuda", time, reverse)
