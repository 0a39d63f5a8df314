"""The C++ kernels and the chunked form on zeros, subnormals, huge numbers, infinities and NaN."""

import math

import pytest
import torch
from backends import on_every_target
from special_values import cases, check, check_overflowing_gates
from test_numerics import problem_with

import wmkernels


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@pytest.mark.parametrize(("op", "variant"), cases(), ids=lambda x: x or "plain")
def test_special_values_act_as_in_the_reference(op, variant, backend):
    check(op, torch.float32, variant, backend)
    if backend == "cpu":
        check(op, torch.float64, variant, backend)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("backend", "time"), [("chunked", 600), ("cpu", 600), ("cpu", 20_000)])
def test_a_zero_state_stays_zero_where_products_of_gates_overflow(backend, time, reverse):
    check_overflowing_gates(backend, time, reverse)


@on_every_target("selective_scan", without=("reference",))
@pytest.mark.parametrize("reset", [False, True])
def test_an_infinite_rate_forgets_even_at_the_least_step(target, reset):
    """A of -inf comes from the exponential of a large A_log in float16; softplus(-100) is subnormal."""
    problem = problem_with(target, torch.float32, -100.0, -1.0, delta_softplus=True)
    problem.tensors["delta"][..., ::2] = 0.5
    problem.tensors["A"][:, ::2] = -math.inf
    if reset:
        problem.tensors["reset"] = torch.zeros((2, 12), dtype=torch.bool, device=target.device)
        problem.tensors["reset"][:, 5] = True
    tensors, options = problem.tensors, problem.options
    found = wmkernels.selective_scan(**tensors, **options, backend=target.backend)
    expected = problem.in_float64().call("reference")
    for one, other in zip(found, expected, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@on_every_target("linear_scan")
def test_an_infinite_gate_does_not_cross_a_reset(target):
    gates = torch.full((1, 1, 6), 0.5, device=target.device)
    tokens = torch.ones_like(gates)
    reset = torch.zeros((1, 6), dtype=torch.bool, device=target.device)
    reset[:, 3] = True
    for reverse, gate in ((False, 3), (True, 2)):
        infinite = gates.clone()
        infinite[..., gate] = math.inf
        options = {"reset": reset, "reverse": reverse, "backend": target.backend}
        expected = wmkernels.linear_scan(gates, tokens, **options)
        assert torch.equal(wmkernels.linear_scan(infinite, tokens, **options), expected)
