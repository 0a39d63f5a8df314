"""The ConvLSTM's CUDA kernels agree with the reference; PyTorch runs the convolutions on the CPU."""

from unittest import mock

import pytest
import torch
from conv_lstm_problems import RoundedSums, conv_lstm, conv_lstms, small_conv_lstm
from emulated_cuda import EmulatedCuda
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from problems import DTYPES, assert_as_accurate_as_the_reference

from wmkernels.checks import state_dtype
from wmkernels.conv_lstm import cuda_persistent, per_step

from emulator.build import find_compiler  # isort: skip

pytestmark = [
    pytest.mark.gated("CUDA ConvLSTM emulated"),
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
]

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
quick = settings(phases=PHASES)
shuffles = st.integers(2, 2**31)
cases = 0


@pytest.fixture(scope="module")
def cuda():
    emulated = EmulatedCuda((0, 1, 2))
    with emulated.installed():
        yield emulated
    emulated.close()


def check(cuda, problem, shuffle=2):
    global cases
    cuda.seeds, cuda.ran = (0, 1, shuffle), []
    assert_as_accurate_as_the_reference(problem, "cuda")
    cases += 1


def test_without_a_peephole_gates_do_not_see_an_infinite_state(cuda):
    cuda.seeds = (0,)
    problem = small_conv_lstm("cpu", torch.float32, time=1)
    problem.tensors["peephole"] = problem.tensors["reset"] = None
    problem.tensors["c"][1, 0, 1, 1] = float("inf")
    found, expected = problem.solve("cuda"), problem.solve("reference")
    assert not expected["output 2"].isfinite().all() and expected["output 0"].isfinite().all()
    assert expected["gradient of c"].isfinite().all()
    torch.testing.assert_close(found, expected, equal_nan=True)


@settings(quick, max_examples=settings().max_examples)
@given(problem=conv_lstms(kind=RoundedSums), shuffle=shuffles)
def test_forward_and_gradients(cuda, problem, shuffle):
    check(cuda, problem, shuffle)
    assert cuda.kernels == {"conv_lstm_update_kernel", "conv_lstm_update_backward_kernel"}


@pytest.mark.parametrize("keep_gates", [True, False])
@settings(quick, max_examples=max(6, settings().max_examples // 6))
@given(problem=conv_lstms(max_time=6, max_size=4, kind=RoundedSums))
def test_stretches_of_time(cuda, keep_gates, problem):
    problem.options["keep_gates"] = keep_gates
    with mock.patch.object(per_step, "HOISTED_BYTES", 1), mock.patch.object(per_step, "CHUNK_BYTES", 1):
        check(cuda, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [4, 6], ids=["by fours", "one by one"])
def test_more_cells_than_a_block_has(cuda, dtype, hidden):
    def normal(*shape):
        return (0.3 * torch.randn(shape, dtype=torch.float64)).to(dtype)

    problem = small_conv_lstm("cpu", dtype)
    problem = RoundedSums(problem.function, {}, {}, grad_layouts=problem.grad_layouts, activations=2)
    problem.tensors = {
        "x": normal(3, 3, 2, 13, 11),
        "weight_ih": normal(4 * hidden, 2, 3, 3),
        "weight_hh": normal(4 * hidden, hidden, 3, 3),
        "reset": torch.tensor([[False] * 3, [False, True, False], [True, False, False]]),
    }
    check(cuda, problem)
    assert max(result.blocks for result in cuda.ran) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 2, 3])
def test_nan_does_not_cross_a_reset(cuda, dtype, where):
    tensors = small_conv_lstm("cpu", dtype, time=4).tensors
    tensors["reset"] = torch.zeros(4, 2, dtype=torch.bool)
    tensors["reset"][where, 1] = True
    for name, poison in (("h", float("nan")), ("c", float("inf"))):
        tensors[name][1] = poison
    tensors["x"][:where, 1] = float("nan")
    leaves = {k: v.requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    for keep_gates in (True, False):
        out, h, c = conv_lstm(**{**tensors, **leaves}, keep_gates=keep_gates, backend="cuda")
        after = out[where:]
        assert after.isfinite().all() and h.isfinite().all() and c.isfinite().all()
        grads = torch.autograd.grad([after.sum(), h.sum(), c.sum()], [leaves["x"], leaves["h"], leaves["c"]])
        assert grads[0][where:].isfinite().all()
        if where == 0:
            assert all(not grad[1].any() for grad in grads[1:])  # selected, not multiplied by zero


@pytest.mark.parametrize("persistent", [False, True])
def test_nothing_is_kept_where_no_gradient_is_asked_for(cuda, persistent):
    """The cell is then updated in place, bit-identically."""
    cuda.multiprocessors, hidden = 4, 16
    tensors = {
        "x": torch.randn(3, 2, 2, 3, 3, dtype=torch.bfloat16),
        "weight_ih": torch.randn(4 * hidden, 2, 3, 3, dtype=torch.bfloat16) * 0.3,
        "weight_hh": torch.randn(4 * hidden, hidden, 3, 3, dtype=torch.bfloat16) * 0.1,
        "h": torch.randn(2, hidden, 3, 3, dtype=torch.bfloat16),
        "c": torch.randn(2, hidden, 3, 3),
        "reset": torch.tensor([[False, True], [True, False], [False, False]]),
    }
    given = {k: v.clone() for k, v in tensors.items()}
    with (
        mock.patch.object(cuda_persistent, "ENABLED", persistent),
        mock.patch.object(cuda_persistent, "processors", lambda device: 4),
    ):
        cuda.ran = []
        without = conv_lstm(**tensors, backend="cuda")
        assert ("conv_lstm_persistent_kernel" in cuda.kernels) == persistent
        kept = conv_lstm(**{**tensors, "x": tensors["x"].clone().requires_grad_()}, backend="cuda")
    assert all(torch.equal(a, b.detach()) for a, b in zip(without, kept, strict=True))
    assert all(torch.equal(tensors[k], given[k]) for k in tensors)


@pytest.mark.canary
def test_nothing_comes_back_past_a_reset(cuda):
    tensors = small_conv_lstm("cpu", torch.float32, time=4).tensors
    tensors["reset"] = torch.zeros(4, 2, dtype=torch.bool)
    tensors["reset"][2] = True
    x = tensors.pop("x").requires_grad_()
    out, _, _ = conv_lstm(x, **tensors, backend="cuda")
    cotangent = torch.ones_like(out)
    cotangent[2:] = float("inf")
    (grad,) = torch.autograd.grad(out, x, cotangent)
    assert grad[:2].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "hidden", "size", "batch", "kernel", "multiprocessors", "tiles", "everything"),
    [
        (torch.float16, 16, (3, 5), 1, (3, 3), 132, 1, False),
        (torch.bfloat16, 32, (3, 7), 2, (1, 3), 4, 2, True),
        (torch.float16, 16, (6, 6), 1, (3, 1), 2, 2, True),
    ],
)
def test_all_steps_in_one_kernel(cuda, dtype, hidden, size, batch, kernel, multiprocessors, tiles, everything):
    def normal(*shape, kind=dtype, scale=0.3):
        return (scale * torch.randn(shape, dtype=torch.float64)).to(kind)

    wide = state_dtype(dtype)
    problem = RoundedSums(conv_lstm, {}, {"keep_gates": everything}, grad_layouts=("contiguous",) * 3, activations=2)
    problem.tensors = {
        "x": normal(3, batch, 3, *size, scale=1.0),
        "weight_ih": normal(4 * hidden, 3, 3, 3),
        "weight_hh": normal(4 * hidden, hidden, *kernel, scale=0.1),
    }
    if everything:
        problem.tensors |= {
            "bias": normal(4 * hidden, kind=wide),
            "peephole": normal(3, hidden, *(size if batch == 1 else ()), kind=wide),
            "h": normal(batch, hidden, *size),
            "c": normal(batch, hidden, *size, kind=wide),
            "reset": torch.arange(3)[:, None] == torch.arange(batch) + 1,
        }
    cuda.multiprocessors = multiprocessors
    with (
        mock.patch.object(cuda_persistent, "ENABLED", True),
        mock.patch.object(cuda_persistent, "processors", lambda device: multiprocessors),
    ):
        assert cuda_persistent.tiles_of(problem.tensors["weight_hh"], per_step.Sizes(3, batch, hidden, *size)) == tiles
        check(cuda, problem)
        assert "conv_lstm_persistent_kernel" in cuda.kernels
        assert "conv_lstm_update_kernel" not in cuda.kernels
        if hidden == 16:  # one step per launch
            with mock.patch.object(cuda_persistent, "HOISTED_BYTES", 1):
                check(cuda, problem)


def test_all_steps_in_one_kernel_forget_what_was_before_a_reset(cuda):
    hidden, where = 16, 2
    tensors = {
        "x": torch.randn(4, 2, 1, 3, 3, dtype=torch.float16),
        "weight_ih": torch.randn(4 * hidden, 1, 1, 1, dtype=torch.float16),
        "weight_hh": torch.randn(4 * hidden, hidden, 3, 3, dtype=torch.float16) * 0.1,
        "h": torch.full((2, hidden, 3, 3), float("nan"), dtype=torch.float16),
        "c": torch.full((2, hidden, 3, 3), float("inf")),
        "reset": torch.arange(4)[:, None].expand(4, 2) == where,
    }
    cuda.multiprocessors = 4
    with (
        mock.patch.object(cuda_persistent, "ENABLED", True),
        mock.patch.object(cuda_persistent, "processors", lambda device: 4),
    ):
        out, h, c = conv_lstm(**tensors, backend="cuda")
    assert out[:where].isnan().all()
    assert out[where:].isfinite().all() and h.isfinite().all() and c.isfinite().all()


def test_how_many_cases_ran(cuda, capsys):
    with capsys.disabled():
        print(f"\nemulated ConvLSTM: {cases} cases, {cuda.launches} launches, each under 3 orders of threads")
