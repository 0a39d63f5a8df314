"""conv_lstm: the reference against Shi's equations, kernels against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import instruction_sets, on_every_target
from conv_lstm_problems import SMALL, conv_lstm, conv_lstms, small_conv_lstm
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, Problem, assert_as_accurate_as_the_reference
from test_concurrency import torch_threads
from test_kernels_match_reference import instruction_set
from tolerances import GRADCHECK
from torch.autograd import gradcheck, gradgradcheck

import wmkernels
from wmkernels.checks import state_dtype

# One random direction over all inputs.
FAST = {**GRADCHECK, "fast_mode": True}
few = settings(max_examples=max(10, settings().max_examples // 3))
every_call = pytest.mark.parametrize("op", list(SMALL))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_numbers(x, weight_ih, weight_hh, bias, peephole, h, c, reset, stride, dilation):
    """Equation 3 of Shi et al. 2015 in scalar loops, padding "same"."""
    time, batch, inputs, rows, columns = x.shape
    hidden, (kh, kw), (ph, pw) = weight_hh.shape[1], weight_ih.shape[2:], weight_hh.shape[2:]
    height, width = math.ceil(rows / stride), math.ceil(columns / stride)
    top = max((height - 1) * stride + (kh - 1) * dilation + 1 - rows, 0) // 2
    left = max((width - 1) * stride + (kw - 1) * dilation + 1 - columns, 0) // 2
    outputs = torch.zeros(time, batch, hidden, height, width, dtype=torch.float64)
    h, c = h.clone(), c.clone()

    def inside(y, x, size):
        return 0 <= y < size[0] and 0 <= x < size[1]

    def gate(t, b, number, row, column, before):
        total = bias[number].item()
        for ky in range(kh):
            for kx in range(kw):
                at = (row * stride - top + ky * dilation, column * stride - left + kx * dilation)
                if inside(*at, (rows, columns)):
                    total += sum(
                        (weight_ih[number, k, ky, kx] * x[t, b, k, at[0], at[1]]).item() for k in range(inputs)
                    )
        for ky in range(ph):
            for kx in range(pw):
                at = (row + ky - ph // 2, column + kx - pw // 2)
                if inside(*at, (height, width)):
                    total += sum(
                        (weight_hh[number, k, ky, kx] * before[b, k, at[0], at[1]]).item() for k in range(hidden)
                    )
        return total

    for t in range(time):
        for b in range(batch):
            if reset[t, b]:
                h[b], c[b] = 0, 0
        before, old = h.clone(), c.clone()
        for b in range(batch):
            for k in range(hidden):
                for row in range(height):
                    for column in range(width):
                        a = [gate(t, b, k + n * hidden, row, column, before) for n in range(4)]
                        was, w = old[b, k, row, column].item(), peephole[:, k].tolist()
                        i, f = sigmoid(a[0] + w[0] * was), sigmoid(a[1] + w[1] * was)
                        now = f * was + i * math.tanh(a[2])
                        o = sigmoid(a[3] + w[2] * now)
                        c[b, k, row, column], h[b, k, row, column] = now, o * math.tanh(now)
        outputs[t] = h
    return outputs, h, c


@on_every_target("conv_lstm")
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_the_equations_one_number_at_a_time(target, stride, dilation):
    tensors = small_conv_lstm(target.device).tensors
    tensors["reset"] = torch.tensor([[False, True], [True, False], [False, False]], device=target.device)
    size = [math.ceil(side / stride) for side in (4, 5)]
    state = {name: tensors[name][..., : size[0], : size[1]] for name in ("h", "c")}
    found = small_conv_lstm(target.device).function(
        **tensors | state, stride=stride, dilation=dilation, backend=target.backend
    )
    on_cpu = {name: x.cpu() for name, x in (tensors | state).items()}
    expected = by_numbers(**on_cpu, stride=stride, dilation=dilation)
    torch.testing.assert_close([x.cpu() for x in found], list(expected), rtol=1e-12, atol=1e-12)


@on_every_target("conv_lstm", without=("reference",))
@given(data=st.data())
def test_the_kernel_is_as_accurate_as_the_reference(target, data):
    assert_as_accurate_as_the_reference(data.draw(conv_lstms(device=target.device)), target.backend)


@pytest.mark.parametrize("level", instruction_sets())
@few
@given(data=st.data())
def test_every_instruction_set(level, data):
    problem = data.draw(conv_lstms(max_time=2, max_size=8))
    with instruction_set(level):
        assert_as_accurate_as_the_reference(problem, "cpu")


@on_every_target("conv_lstm", kernels_only=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "size"), [((40, 35), (3, 3)), ((3, 2), (2, 150)), ((50, 16), (6, 1)), ((2, 18), (4, 140))]
)
def test_more_channels_or_columns_than_a_block_holds(target, dtype, channels, size):
    problem = small_conv_lstm(target.device, dtype)
    inputs, hidden = channels

    def normal(*shape, kind=dtype):
        return (0.2 * torch.randn(shape, dtype=torch.float64)).to(kind).to(target.device)

    state = state_dtype(dtype)
    problem.tensors = {
        "x": normal(2, 2, inputs, *size),
        "weight_ih": normal(4 * hidden, inputs, 3, 3 if size[1] == 140 else 2),
        "weight_hh": normal(4 * hidden, hidden, 3, 3),
        "peephole": normal(3, hidden, *size, kind=state),
        "h": normal(2, hidden, *size),
        "c": normal(2, hidden, *size, kind=state),
        "reset": torch.tensor([[False, False], [False, True]], device=target.device),
    }
    for keep_gates in (True, False):
        problem.options = {"keep_gates": keep_gates}
        assert_as_accurate_as_the_reference(problem, target.backend)


@on_every_target("conv_lstm")
@few
@given(data=st.data())
def test_gradients_by_finite_differences(target, data):
    problem = data.draw(conv_lstms([torch.float64], target.device, max_time=3, max_size=4, channels=[1, 2, 9]))
    run, values = as_function(problem, target.backend)
    assert gradcheck(run, values, check_undefined_grad=False, **FAST)


def as_function(problem, backend):
    """With clones that gradcheck can perturb."""
    leaves = problem.leaves()

    def run(*values):
        return problem.call(backend, dict(zip(leaves, values, strict=True)))

    return run, [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in leaves.values()]


@on_every_target("conv_lstm")
@pytest.mark.parametrize("keep_gates", [True, False])
def test_undefined_gradients_are_zeros(target, keep_gates):
    run, values = as_function(small_conv_lstm(target.device, time=2, keep_gates=keep_gates), target.backend)
    assert gradcheck(run, values, check_undefined_grad=True, **FAST)


@every_call
@on_every_target("conv_lstm")
def test_only_the_gradients_asked_for(op, target):
    problem = SMALL[op](target.device)
    everything = problem.leaves()
    expected = torch.autograd.grad(
        sum(x.square().sum() for x in problem.call(target.backend, everything)), [*everything.values()]
    )
    for (name, x), gradient in zip(everything.items(), expected, strict=True):
        alone = {k: v.detach() for k, v in everything.items()} | {name: x.detach().requires_grad_()}
        sum(y.square().sum() for y in problem.call(target.backend, alone)).backward()
        torch.testing.assert_close(alone[name].grad, gradient)
        assert all(v.grad is None for k, v in alone.items() if k != name)


@every_call
@on_every_target("conv_lstm", kernels_only=True)
def test_a_second_backward_says_that_it_cannot(op, target):
    problem = SMALL[op](target.device)
    leaves = problem.leaves()
    output = problem.call(target.backend, leaves)[0]
    (grad,) = torch.autograd.grad(output.sum(), [leaves["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"conv_lstm: the gradient of its gradient.*backend=\"reference\""):
        (output.sum() + grad.square().sum()).backward()


def test_the_reference_has_second_derivatives():
    assert gradgradcheck(*as_function(small_conv_lstm("cpu", time=2), "reference"), **FAST)


@pytest.mark.parametrize("keep_gates", [True, False])
def test_the_chunked_form_has_second_derivatives(keep_gates):
    problem = small_conv_lstm("cpu", time=2, keep_gates=keep_gates)
    problem.chunk = 1
    assert gradgradcheck(*as_function(problem, "chunked"), **FAST)


@on_every_target("conv_lstm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_h_is_rounded_before_it_recurs_and_c_is_not(target, dtype):
    tensors = small_conv_lstm(target.device, dtype, time=6).tensors
    outputs, h, c = small_conv_lstm(target.device).function(**tensors, backend=target.backend)
    assert outputs.dtype == h.dtype == dtype
    assert c.dtype == torch.float32
    weights = {k: v for k, v in tensors.items() if k not in ("x", "h", "c")}
    state = (tensors["h"], tensors["c"])
    for t, x in enumerate(tensors["x"]):
        output, state = wmkernels.conv_lstm_step(x, state, **weights, backend=target.backend)
        torch.testing.assert_close(output, outputs[t], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(state[1], c, rtol=1e-3, atol=1e-4)


@on_every_target("conv_lstm")
def test_autocast_casts_as_a_convolution_does_and_leaves_the_cell_wide(target):
    tensors = small_conv_lstm(target.device, torch.float32).tensors
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    run = small_conv_lstm(target.device).function
    with torch.autocast(target.device, torch.bfloat16):
        out, h, c = run(**leaves, backend=target.backend)
    assert out.dtype == h.dtype == torch.bfloat16
    assert c.dtype == torch.float32
    narrow = {k: v.bfloat16() if k in ("x", "weight_ih", "weight_hh", "h") else v for k, v in tensors.items()}
    expected = run(**narrow, backend=target.backend)
    torch.testing.assert_close([out, h, c], list(expected), rtol=0, atol=0)
    (out.float().sum() + c.sum()).backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in leaves.values())
    doubles = {k: v.double() for k, v in tensors.items()}
    with torch.autocast(target.device, torch.bfloat16):
        assert run(**doubles, backend=target.backend)[0].dtype == torch.float64


@on_every_target("conv_lstm", kernels_only=True)
@pytest.mark.parametrize("keep_gates", [True, False])
def test_what_a_training_step_keeps(target, keep_gates):
    problem = small_conv_lstm(target.device, torch.float32, keep_gates=keep_gates)
    problem.tensors = {k: v for k, v in problem.tensors.items() if not k.startswith("peep")}
    problem.tensors["x"] = torch.randn(20, 2, 3, 4, 5, device=target.device)
    leaves = problem.leaves()
    own = {x.untyped_storage().data_ptr() for x in leaves.values()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = problem.call(target.backend, leaves)[0]
    h_and_c = 2 * out.numel() * 4
    # h and c of every step and, with keep_gates, four gates.
    assert sum(kept.values()) == h_and_c * (3 if keep_gates else 1)


@on_every_target("conv_lstm", kernels_only=True)
@given(data=st.data())
@few
def test_threads_change_nothing_but_the_order_of_sums(target, data):
    problem = data.draw(conv_lstms([torch.float64], target.device, max_size=12))
    with torch_threads(1):
        alone = problem.solve(target.backend)
    for threads in (2, 3):
        with torch_threads(threads):
            together, again = problem.solve(target.backend), problem.solve(target.backend)
        for name, expected in alone.items():
            assert torch.equal(together[name], again[name]), name
            torch.testing.assert_close(together[name], expected, rtol=1e-10, atol=1e-10)


@on_every_target("conv_lstm")
@pytest.mark.parametrize(("time", "batch"), [(0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_in_the_right_nothing_out(target, time, batch, dtype):
    problem = small_conv_lstm(target.device, dtype)
    cut = {"x": (slice(time), slice(batch)), "h": (slice(batch),), "c": (slice(batch),)}
    problem.tensors = {k: v[cut[k]] if k in cut else v for k, v in problem.tensors.items()}
    leaves = problem.leaves()
    out, h, c = problem.call(target.backend, leaves)
    assert out.shape == (time, batch, 2, 4, 5)
    assert out.dtype == dtype
    assert torch.equal(h, leaves["h"])
    assert torch.equal(c, leaves["c"])
    cotangent = torch.randn_like(c)
    grads = torch.autograd.grad((h, c), [*leaves.values()], (torch.ones_like(h), cotangent), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), grads, strict=True):
        if name == "c":
            assert torch.equal(gradient, cotangent)
        elif name == "h":
            assert (gradient == 1).all()
        else:
            assert gradient is None or ((gradient == 0).all() and gradient.shape == leaf.shape)
    without = {k: v for k, v in problem.tensors.items() if k not in ("h", "c")}
    _, h, c = problem.function(**without, backend=target.backend)
    assert (h == 0).all() and (c == 0).all()


@on_every_target("conv_lstm")
@pytest.mark.parametrize("size", [1, 4, 5, 6, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_padding_same_is_that_of_keras(target, size, stride, kernel):
    """Size ceil(size / stride); odd padding goes at the end (Keras' Conv2D)."""
    x = torch.randn(1, 1, 1, 1, size, dtype=torch.float64, device=target.device)
    weight_ih = torch.randn(4, 1, 1, kernel, dtype=torch.float64, device=target.device)
    weight_hh = torch.zeros(4, 1, 1, 1, dtype=torch.float64, device=target.device)
    outputs, _ = wmkernels.conv_lstm(x, weight_ih, weight_hh, stride=stride, backend=target.backend)
    count = -(-size // stride)
    total = max((count - 1) * stride + kernel - size, 0)
    padded = F.pad(x[0, 0], (total // 2, total - total // 2))
    i, _, g, o = F.conv1d(padded, weight_ih[:, :, 0], stride=stride).unbind(1)
    expected = torch.sigmoid(o) * torch.tanh(torch.sigmoid(i) * torch.tanh(g))
    torch.testing.assert_close(outputs[0, 0, 0], expected)
    assert expected.shape[-1] == count


@pytest.mark.parametrize("seed", [2, 34])
def test_sums_of_equal_products_stay_within_their_bound(seed):
    """Weights and h repeat over channels: all roundings of a sum go the same way."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    tensors = {
        "x": normal(2, 2, 16, 8, 8),
        "weight_ih": normal(68, 16, 3, 3, scale=0.4),
        "weight_hh": normal(68, 1, 3, 3, scale=0.3).expand(68, 17, 3, 3),
        "h": normal(2, 1, 8, 8).expand(2, 17, 8, 8),
        "c": normal(2, 17, 8, 8),
    }
    problem = Problem(conv_lstm, tensors, {}, grad_layouts=("contiguous",) * 3, activations=2)
    assert_as_accurate_as_the_reference(problem, "cpu")
