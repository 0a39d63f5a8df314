"""Empty batches, sequences, channels and packed sequences."""

import pytest
import torch
from backends import on_every_target
from delta_rule_problems import small_delta_rule
from place_memory_problems import small_place_memory
from problems import DTYPES
from ssd_problems import small_ssd
from test_gradients import small_scan

import wmkernels

every_target = on_every_target("selective_scan")


def sized_scan(target, dtype, batch, channels, time, channel_last=False):
    problem = small_scan(target.device, dtype, batch=batch, channels=channels, time=time)
    if channel_last:
        problem.tensors = {
            k: v.transpose(1, 2) if k in ("u", "delta", "z", "B", "C") else v for k, v in problem.tensors.items()
        }
        problem.options["channel_last"] = True
    return problem


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 0, 0)])
@pytest.mark.parametrize("channel_last", [False, True])
def test_selective_scan(target, dtype, sizes, channel_last):
    batch, channels, _ = sizes
    problem = sized_scan(target, dtype, *sizes, channel_last)
    leaves = problem.leaves()
    out, last = problem.call(target.backend, leaves)
    assert out.shape == leaves["u"].shape
    assert out.dtype == dtype
    assert last.shape == (batch, channels, 2)
    torch.testing.assert_close(last, leaves["initial_state"].to(last.dtype), rtol=0, atol=0)
    cotangent = torch.randn_like(last)
    grads = torch.autograd.grad(
        (out, last), list(leaves.values()), (torch.zeros_like(out), cotangent), allow_unused=True
    )
    for (name, leaf), gradient in zip(leaves.items(), grads, strict=True):
        assert gradient is None or gradient.shape == leaf.shape
        if name == "initial_state":
            torch.testing.assert_close(gradient, cotangent.to(dtype), rtol=0, atol=0)
        elif gradient is not None:
            assert (gradient == 0).all()


@every_target
def test_without_an_initial_state_the_last_state_is_zero(target):
    problem = small_scan(target.device, time=0)
    problem.tensors["initial_state"] = None
    assert (problem.call(target.backend)[1] == 0).all()


@every_target
def test_packed_sequences_without_a_step(target):
    problem = small_scan(target.device, batch=1, time=0)
    problem.tensors["cu_seqlens"] = torch.tensor([0, 0, 0, 0], device=target.device)
    first = torch.randn(3, 3, 2, dtype=torch.float64, device=target.device)
    problem.tensors["initial_state"] = first
    out, last = problem.call(target.backend)
    assert out.shape == (1, 3, 0)
    assert torch.equal(last, first)


@every_target
def test_packed_sequences_of_which_most_are_empty(target):
    problem = small_scan(target.device, batch=1, time=4)
    problem.tensors["cu_seqlens"] = torch.tensor([0, 0, 0, 4, 4], device=target.device)
    first = torch.randn(4, 3, 2, dtype=torch.float64, device=target.device)
    problem.tensors["initial_state"] = first
    leaves = problem.leaves()
    out, last = problem.call(target.backend, leaves)
    assert torch.equal(last[[0, 1, 3]], first[[0, 1, 3]])
    alone = {**leaves, "cu_seqlens": None, "initial_state": leaves["initial_state"][2:3]}
    expected, expected_last = problem.call(target.backend, alone)
    assert torch.equal(out, expected)
    assert torch.equal(last[2:3], expected_last)
    (gradient,) = torch.autograd.grad(last.sum(), leaves["initial_state"])
    assert (gradient[[0, 1, 3]] == 1).all()


@on_every_target("linear_scan")
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 0), (3, 0)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channel_last", [False, True])
def test_linear_scan(target, shape, reverse, channel_last):
    if channel_last:
        shape = (shape[0], shape[-1], *shape[1:-1])
    gates, tokens = (torch.randn(shape, device=target.device, requires_grad=True) for _ in range(2))
    inner = (shape[0], *shape[2:]) if channel_last else shape[:-1]
    first = torch.randn(inner, device=target.device, requires_grad=True)
    options = {"reverse": reverse, "channel_last": channel_last, "return_last_state": True, "backend": target.backend}
    out, last = wmkernels.linear_scan(gates, tokens, first, **options)
    assert out.shape == shape
    assert torch.equal(last, first)
    out.sum().backward() if out.requires_grad and not last.numel() else last.sum().backward()
    assert first.grad is None or (first.grad == 1).all()


@on_every_target("selective_step")
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)])
def test_selective_step(target, sizes):
    batch, channels = sizes
    state = torch.zeros(batch, channels, 2, device=target.device)
    u, B = torch.zeros(sizes, device=target.device), torch.zeros(batch, 2, device=target.device)
    A = torch.zeros(channels, 2, device=target.device, requires_grad=True)
    out, after = wmkernels.selective_step(state, u, u, A, B, B, backend=target.backend)
    assert out.shape == sizes
    assert after.shape == state.shape
    (out.sum() + after.sum()).backward()
    assert A.grad is None or (A.grad == 0).all()
    with torch.no_grad():
        assert wmkernels.selective_state_update(state, u, u, A, B, B).shape == sizes


@on_every_target("gated_delta_rule")
@pytest.mark.parametrize("sizes", [(0, 4, 2), (2, 0, 2), (2, 4, 0)], ids=["batch", "time", "value_heads"])
def test_gated_delta_rule(target, sizes):
    batch, time, heads = sizes
    problem = small_delta_rule(target.device, torch.float32, batch, time, heads)
    leaves = problem.leaves()
    out, last = problem.call(target.backend, leaves)
    assert out.shape == leaves["v"].shape
    torch.testing.assert_close(last, leaves["initial_state"], rtol=0, atol=0)
    cotangent = torch.randn_like(last)
    grads = torch.autograd.grad((out, last), [*leaves.values()], (out, cotangent), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), grads, strict=True):
        if name == "initial_state":
            torch.testing.assert_close(gradient, cotangent, rtol=0, atol=0)
        else:
            assert gradient is None or torch.equal(gradient, torch.zeros_like(leaf))


@on_every_target("gated_delta_rule")
@pytest.mark.parametrize("sizes", [(0, 4, 2, 3), (2, 4, 2, 0)], ids=["batch", "d_v"])
def test_an_empty_output_of_a_gated_delta_rule_is_no_input_and_has_a_gradient(target, sizes):
    batch, time, heads, d_v = sizes
    q, v, gate = torch.zeros(batch, heads, 3, time), torch.zeros(batch, heads, d_v, time), torch.zeros(sizes[:3])
    q, v, gate = (x.to(target.device) for x in (q, v, gate.mT))
    y = wmkernels.gated_delta_rule(q.requires_grad_(), q, v, gate, gate, backend=target.backend)
    assert y is not v
    assert (y.shape, y.requires_grad) == (v.shape, True)


WITHOUT_A_STEP = {
    "gated_delta_rule": (small_delta_rule, "v"),
    "place_memory": (small_place_memory, "values"),
    "ssd_scan": (small_ssd, "x"),
}


@every_target
@pytest.mark.parametrize("op", WITHOUT_A_STEP)
def test_without_a_step_the_results_share_no_memory_with_the_inputs(target, op):
    make, main = WITHOUT_A_STEP[op]
    problem = make(target.device, time=0)
    out, last = problem.call(target.backend)
    first, given = problem.tensors["initial_state"], problem.tensors[main]
    assert out is not given
    assert torch.equal(last, first)
    assert last.data_ptr() != first.data_ptr()


@on_every_target("gated_delta_rule")
def test_packed_sequences_without_a_step_of_a_gated_delta_rule(target):
    problem = small_delta_rule(target.device, batch=1, time=4)
    first = torch.randn(4, 2, 2, 2, dtype=torch.float64, device=target.device)
    problem.tensors |= {"cu_seqlens": torch.tensor([0, 0, 0, 4, 4], device=target.device), "initial_state": first}
    out, last = problem.call(target.backend)
    assert torch.equal(last[[0, 1, 3]], first[[0, 1, 3]])
    problem.tensors |= {"cu_seqlens": None, "initial_state": first[2:3]}
    torch.testing.assert_close((out, last[2:3]), problem.call(target.backend), rtol=0, atol=0)
