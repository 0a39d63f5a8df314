"""Gradients: finite differences, autograd features and memory."""

import pytest
import torch
from backends import on_every_target
from causal_conv_problems import causal_convs, small_causal_conv
from delta_rule_problems import delta_rules, small_delta_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from place_memory_problems import small_place_memory
from problems import Problem, linear_scans, scans, steps
from ssd_problems import small_ssd
from tolerances import GRADCHECK, SAVED_SHARE
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import wmkernels
from wmkernels import chunked
from wmkernels.checks import state_dtype
from wmkernels.selective_scan.function import chunk_length

few = settings(max_examples=max(min(15, settings().max_examples), settings().max_examples // 3))


def check_gradients(problem, backend, again=False, **options):
    leaves = problem.leaves()

    def run(*values):
        return problem.call(backend, dict(zip(leaves, values, strict=True)))

    # gradcheck perturbs in place, which expanded leaves forbid.
    values = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in leaves.values()]
    assert gradcheck(run, values, check_undefined_grad=False, **GRADCHECK, **options)
    if again:
        assert gradgradcheck(run, values, **GRADCHECK, **options)


@on_every_target("selective_scan", without=("chunked",))
@few
@given(data=st.data())
def test_selective_scan_by_finite_differences(target, data):
    problem = data.draw(scans([torch.float64], target.device, max_time=5, states=[1, 2, 3], max_channels=4))
    check_gradients(problem, target.backend)


@on_every_target("selective_step")
@few
@given(data=st.data())
def test_selective_step_by_finite_differences(target, data):
    problem = data.draw(steps([torch.float64], target.device, states=[1, 2]))
    check_gradients(shrunk(problem), target.backend)


def shrunk(problem):
    channels = min(3, problem.tensors["u"].shape[1])
    cut = {}
    for name, x in problem.tensors.items():
        if x is None or name == "reset":
            cut[name] = x
        elif name in ("B", "C"):
            cut[name] = x[:, :1] if x.dim() == 3 else x
        else:
            cut[name] = x[:channels] if name in ("A", "D", "delta_bias") else x[:, :channels]
    problem.tensors = cut
    return problem


@on_every_target("linear_scan", without=("chunked",))
@settings(max_examples=max(5, settings().max_examples // 4))
@given(data=st.data())
def test_linear_scan_by_finite_differences(target, data):
    check_gradients(data.draw(linear_scans([torch.float64], target.device, max_time=4)), target.backend)


@on_every_target("gated_delta_rule", kernels_only=True)
@settings(max_examples=max(5, settings().max_examples // 4))
@given(data=st.data())
def test_gated_delta_rule_by_finite_differences(target, data):
    problem = data.draw(delta_rules([torch.float64], target.device, max_time=5, sizes=[1, 2]))
    check_gradients(problem, target.backend)


@on_every_target("causal_conv1d", kernels_only=True)
@few
@given(data=st.data())
def test_causal_conv1d_by_finite_differences(target, data):
    problem = data.draw(causal_convs([torch.float64], target.device, max_time=6, channels=[1, 2], widths=[1, 2, 4, 5]))
    check_gradients(problem, target.backend, fast_mode=True)


@settings(max_examples=max(5, settings().max_examples // 5))
@given(data=st.data())
def test_the_chunked_form_by_finite_differences(data):
    scan = scans([torch.float64], max_time=5, states=[1, 2, 3], max_channels=4)
    problem = data.draw(
        st.one_of(
            scan, linear_scans([torch.float64], max_time=6), delta_rules([torch.float64], max_time=5, sizes=[1, 2])
        )
    )
    check_gradients(problem, "chunked", fast_mode=True)


@on_every_target("selective_scan")
def test_undefined_gradients_are_zeros(target):
    for problem in (small_scan(target.device), small_linear_scan(target.device)):
        leaves = problem.leaves()
        values = list(leaves.values())

        def run(*x, names=tuple(leaves), problem=problem):
            return problem.call(target.backend, dict(zip(names, x, strict=True)))

        assert gradcheck(run, values, check_undefined_grad=True, **GRADCHECK)


def small_scan(device, dtype=torch.float64, batch=2, channels=3, time=4, state=2, **options):
    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)

    tensors = {
        "u": normal(batch, channels, time),
        "delta": normal(batch, channels, time).abs() * 0.5,
        "A": -normal(channels, state).abs(),
        "B": normal(batch, state, time),
        "C": normal(batch, state, time),
        "D": normal(channels),
        "z": normal(batch, channels, time),
        "delta_bias": normal(channels) * 0.1,
        "initial_state": normal(batch, channels, state),
    }
    return Problem(wmkernels.selective_scan, tensors, {"delta_softplus": True, "return_last_state": True, **options})


def small_linear_scan(device, dtype=torch.float64):
    tensors = {
        "gates": torch.rand(2, 3, 5, dtype=torch.float64).to(dtype).to(device),
        "tokens": torch.randn(2, 3, 5, dtype=torch.float64).to(dtype).to(device),
        "initial_state": torch.randn(2, 3, dtype=torch.float64).to(dtype).to(device),
    }
    return Problem(wmkernels.linear_scan, tensors, {"return_last_state": True})


def small_step(device, dtype=torch.float64, **sizes):
    scan = small_scan(device, dtype, **sizes).tensors
    tensors = {name: scan[name][..., 0] for name in ("u", "delta", "B", "C", "z")}
    tensors |= {name: scan[name] for name in ("A", "D", "delta_bias")} | {"state": scan["initial_state"]}
    return Problem(wmkernels.selective_step, tensors, {"delta_softplus": True})


SMALL = {
    "selective_scan": small_scan,
    "selective_step": small_step,
    "linear_scan": small_linear_scan,
    "gated_delta_rule": small_delta_rule,
    "place_memory": small_place_memory,
    "ssd_scan": small_ssd,
    "causal_conv1d": small_causal_conv,
}
every_op = pytest.mark.parametrize("op", list(SMALL))


@every_op
def test_the_reference_has_second_derivatives(op):
    check_gradients(SMALL[op]("cpu"), "reference", again=True)


@every_op
def test_the_chunked_form_has_second_derivatives(op):
    problem = SMALL[op]("cpu")
    problem.chunk = 2
    check_gradients(problem, "chunked", again=True, fast_mode=True)


@every_op
@on_every_target("selective_scan", kernels_only=True)
def test_a_second_backward_says_that_it_cannot(op, target):
    problem = SMALL[op](target.device)
    leaves = problem.leaves()
    output = problem.call(target.backend, leaves)[0]
    (grad,) = torch.autograd.grad(output.square().sum(), [next(iter(leaves.values()))], create_graph=True)
    named = "selective_scan" if op == "selective_step" else op
    with pytest.raises(RuntimeError, match=rf"{named}: the gradient of its gradient.*backend=\"reference\""):
        grad.square().sum().backward()
    # The differentiable first term must not hide the second's missing gradient.
    leaves = problem.leaves()
    output = problem.call(target.backend, leaves)[0]
    (grad,) = torch.autograd.grad(output.sum(), [next(iter(leaves.values()))], create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of its gradient"):
        (output.sum() + grad.square().sum()).backward()


@every_op
@on_every_target("selective_scan")
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


@every_op
@on_every_target("selective_scan")
def test_expanded_and_non_contiguous_gradients(op, target):
    problem = SMALL[op](target.device, torch.float32)
    leaves = problem.leaves()
    outputs = problem.call(target.backend, leaves)
    values = [torch.randn_like(x) for x in outputs]
    plain = torch.autograd.grad(outputs, [*leaves.values()], values, retain_graph=True)
    backwards = [v.permute(*reversed(range(v.dim()))).contiguous().permute(*reversed(range(v.dim()))) for v in values]
    permuted = torch.autograd.grad(outputs, [*leaves.values()], backwards, retain_graph=True)
    torch.testing.assert_close(permuted, plain)
    ones = torch.autograd.grad(outputs, [*leaves.values()], [torch.ones_like(x) for x in outputs], retain_graph=True)
    # Expands the gradient with stride 0.
    summed = torch.autograd.grad(sum(x.sum() for x in outputs), [*leaves.values()])
    torch.testing.assert_close(summed, ones)


@every_op
@on_every_target("selective_scan")
def test_activation_checkpointing(op, target):
    problem = SMALL[op](target.device)
    names = list(problem.leaves())

    def run(*values):
        return problem.call(target.backend, dict(zip(names, values, strict=True)))

    gradients = []
    for wrapped in (run, lambda *values: checkpoint(run, *values, use_reentrant=False)):
        leaves = [*problem.leaves().values()]
        gradients.append(torch.autograd.grad(sum(x.square().sum() for x in wrapped(*leaves)), leaves))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@every_op
@on_every_target("selective_scan")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_states_in_float32(op, target, dtype):
    problem = SMALL[op](target.device, torch.float32)
    leaves = problem.leaves()
    with torch.autocast(target.device, dtype):
        out, state = problem.call(target.backend, leaves)
    plain, plain_state = problem.call(target.backend)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(state, plain_state)
    assert state.dtype == torch.float32
    sum(x.sum() for x in (out, state)).backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values())


@on_every_target("selective_scan")
def test_autocast_widens_mixed_activations(target):
    x = small_scan(target.device, torch.float32).tensors
    # Linear layers return bfloat16, softplus and exp float32.
    mixed = x | {name: x[name].to(torch.bfloat16) for name in ("u", "B", "z")}
    with torch.autocast(target.device, torch.bfloat16):
        out = wmkernels.selective_scan(**mixed, backend=target.backend)
    wide = mixed | {name: mixed[name].float() for name in ("u", "B", "z")}
    torch.testing.assert_close(out, wmkernels.selective_scan(**wide, backend=target.backend))
    # Without autocast the arithmetic is as wide, and the output has the dtype of u.
    torch.testing.assert_close(wmkernels.selective_scan(**mixed, backend=target.backend), out.to(torch.bfloat16))


@pytest.mark.parametrize("names", [("u", "delta", "B", "C"), ("u", "delta")])
def test_autocast_refuses_wrong_ranks_as_eager_mode_does(names):
    x = {k: v for k, v in small_scan("cpu", torch.float32).tensors.items() if k in ("u", "delta", "A", "B", "C")}
    x |= {name: x[name][..., 0] for name in names}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^selective_scan: u has shape"):
        wmkernels.selective_scan(**x)


@on_every_target("selective_scan", kernels_only=True)
@pytest.mark.parametrize(
    ("state", "dtype"), [(4, torch.float32), (16, torch.float32), (64, torch.float32), (16, torch.float64)]
)
def test_a_training_step_keeps_one_state_a_chunk(target, state, dtype):
    problem = small_scan(target.device, dtype, batch=1, channels=32, time=2048, state=state)
    leaves = problem.leaves()
    own = {x.untyped_storage().data_ptr() for x in leaves.values()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, _ = problem.call(target.backend, leaves)
    activations = [x for x in (*leaves.values(), out) if x.numel() >= leaves["B"].numel()]
    size = sum(x.numel() * x.element_size() for x in activations)
    # Nothing of size channels * state * time may live.
    chunk = chunk_length(state, target.device)
    assert sum(kept.values()) <= 32 * state * -(-2048 // chunk) * state_dtype(dtype).itemsize
    if target.device == "cpu":
        assert sum(kept.values()) <= SAVED_SHARE * 2 * size


@on_every_target("selective_scan", kernels_only=True)
def test_without_gradients_no_state_is_kept(target):
    x = small_scan(target.device, torch.float32).tensors
    canonical = [x["u"], x["delta"], x["A"], x["B"].unsqueeze(1), x["C"].unsqueeze(1), x["D"], x["z"], x["delta_bias"]]
    arguments = (*canonical, x["initial_state"], None, None, True, False)
    out, last, states = torch.ops.wmkernels.selective_scan_forward(*arguments, 0, target.backend)
    assert states.numel() == 0
    same, same_last, states = torch.ops.wmkernels.selective_scan_forward(*arguments, 3, target.backend)
    assert states.shape == (2 * 2, 3, 2)
    assert torch.equal(out, same)
    assert torch.equal(last, same_last)
    torch.testing.assert_close(states[::2], x["initial_state"], rtol=0, atol=0)


def test_a_chunked_training_step_keeps_one_state_per_chunk(monkeypatch):
    monkeypatch.setattr(chunked, "steps_per_chunk", lambda _: 32)
    problem = small_scan("cpu", torch.float32, batch=1, channels=8, time=256, state=16)
    leaves = problem.leaves()
    own = {x.untyped_storage().data_ptr() for x in leaves.values()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        wmkernels.selective_scan(**leaves, **problem.options, backend="chunked")
    # Only one chunk's states may live; the checkpoint is a view of the last.
    assert sum(kept.values()) <= 256 * 8 * 16 * 4 + 256 * 8 * 4
