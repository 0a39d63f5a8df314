"""Underflow, growth, zero steps and subnormal numbers."""

import statistics
import time

import pytest
import torch
from backends import on_every_target
from problems import Problem, assert_as_accurate_as_the_reference
from tolerances import SUBNORMAL_SLOWDOWN

import wmkernels

every_kernel = on_every_target("selective_scan", kernels_only=True)


def problem_with(target, dtype, delta, A, time=12, channels=20, state=5, **options):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(target.device)

    tensors = {
        "u": normal(2, channels, time),
        "delta": torch.full((2, channels, time), delta, dtype=dtype, device=target.device),
        "A": torch.full((channels, state), A, dtype=dtype, device=target.device),
        "B": normal(2, state, time),
        "C": normal(2, state, time),
        "initial_state": normal(2, channels, state),
    }
    return Problem(wmkernels.selective_scan, tensors, {"return_last_state": True, **options})


@on_every_target("selective_scan", without=("reference",))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("delta", "A"),
    [
        (100.0, -50.0),  # exp is zero
        (1.0, -86.9),  # just above the least normal float32
        (1.0, -88.5),  # subnormal in float32
        (1.0, -103.5),  # zero in float32
        (1.0, -708.0),  # just above the least normal float64
        (1.0, -745.0),
        (1e-30, -1e-8),  # the product is subnormal in float32
        (0.1, 3.0),
        (1.0, 1.0),
        (-0.3, -2.0),
    ],
)
def test_decays_and_growth(target, dtype, delta, A):
    assert_as_accurate_as_the_reference(problem_with(target, dtype, delta, A), target.backend)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_over_its_whole_range(target, dtype):
    problem = problem_with(target, dtype, 0.0, -1.0, time=21, delta_softplus=True)
    values = torch.tensor(
        [-700, -110, -104, -90, -80, -40, -20, -10, -3, -1, -0.0, 0, 1, 3, 10, 19.9, 20, 20.1, 40, 90, 700]
    )
    problem.tensors["delta"] = values.to(dtype).to(target.device).expand(2, 20, 21)
    assert_as_accurate_as_the_reference(problem, target.backend)


@every_kernel
def test_overflow_is_infinity_as_in_the_reference(target):
    problem = problem_with(target, torch.float32, 1.0, 89.0, time=4)
    kernel, reference = problem.call(target.backend), problem.call("reference")
    for one, other in zip(kernel, reference, strict=True):
        assert not one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0, equal_nan=True)


@every_kernel
def test_nan_inputs_give_nan_outputs(target):
    for name in ("u", "delta", "A", "B", "C", "initial_state"):
        problem = problem_with(target, torch.float32, 0.5, -1.0)
        poisoned = problem.tensors[name].clone()
        poisoned[0] = float("nan")
        problem.tensors[name] = poisoned
        out = problem.call(target.backend)[0]
        assert torch.equal(out.isnan(), problem.call("reference")[0].isnan()), name


@on_every_target("selective_scan", without=("reference",))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["delta", "A"])
def test_nothing_is_lost_over_a_million_steps(target, dtype, frozen):
    """exp(0) is exactly 1."""
    time = 20_000 if target.backend == "chunked" else 1_000_000
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    held = torch.randn(1, 2, 3, dtype=kind, device=target.device)
    u = torch.ones(1, 1, 1, dtype=dtype, device=target.device).expand(1, 2, time)
    number = 0.0 if frozen == "delta" else 0.7
    delta = torch.full((1, 1, 1), number, dtype=dtype, device=target.device).expand(1, 2, time)
    A = torch.full((2, 3), -3.0 if frozen == "delta" else 0.0, dtype=kind, device=target.device)
    B = torch.full((2, 3), 1.0 if frozen == "delta" else 0.0, dtype=kind, device=target.device)
    start = held.clone().requires_grad_()
    out, last = wmkernels.selective_scan(
        u, delta, A, B, B + 1, initial_state=start, return_last_state=True, backend=target.backend
    )
    assert torch.equal(last, held)
    cotangent = torch.randn_like(last)
    (gradient,) = torch.autograd.grad(last, start, cotangent)
    assert torch.equal(gradient, cotangent)
    assert torch.equal(out[..., 0], out[..., -1])


@on_every_target("linear_scan", without=("reference",))
def test_a_linear_scan_with_gates_of_one_adds(target):
    tokens = torch.ones(1, 3, 100_000, device=target.device)
    out = wmkernels.linear_scan(torch.ones_like(tokens), tokens, backend=target.backend)
    assert torch.equal(out[0, 0].cpu(), torch.arange(1.0, 100_001.0))


def impulse(length, silence, device="cpu"):
    """An impulse, then zeros or noise that keeps the state normal."""
    channels, state = 64, 8
    u = torch.full((1, channels, length), silence, device=device)
    u[..., 0] = 1
    delta, ones = torch.ones_like(u), torch.ones(1, state, length, device=device)
    A = torch.full((channels, state), -0.5, device=device)
    return u, delta, A, ones, ones


def seconds(call):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@on_every_target("selective_scan", kernels_only=True)
def test_silence_after_an_impulse_is_not_slow(target):
    # exp(-0.5 * 175) is subnormal, as are most of the 4,096 states.
    def timed(silence):
        inputs = [x.requires_grad_() for x in impulse(4096, silence, target.device)]

        def step():
            out = wmkernels.selective_scan(*inputs, backend=target.backend)
            torch.autograd.grad(out.sum(), inputs)
            out.sum().item()

        step()
        return seconds(step)

    assert timed(0.0) < SUBNORMAL_SLOWDOWN * timed(1.0)


@on_every_target("linear_scan", kernels_only=True)
def test_a_linear_scan_is_not_slow_in_silence(target):
    def timed(silence):
        tokens = torch.full((1, 64, 16_384), silence, device=target.device)
        tokens[..., 0] = 1
        gates = torch.full_like(tokens, 0.6)
        return seconds(lambda: wmkernels.linear_scan(gates, tokens, backend=target.backend).sum().item())

    assert timed(0.0) < SUBNORMAL_SLOWDOWN * timed(1.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_subnormals_survive_a_call(threads):
    """Kernels restore the caller's flush-to-zero mode."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = [x.requires_grad_() for x in impulse(600, 0.0)]
        out = wmkernels.selective_scan(*inputs, backend="cpu")
        out.sum().backward()
        wmkernels.linear_scan(inputs[0].detach() * 0.5, inputs[0].detach(), backend="cpu")
        wmkernels.selective_step(
            torch.zeros(1, 64, 8),
            *(x.detach()[..., 0] for x in inputs[:2]),
            inputs[2].detach(),
            *(x.detach()[..., 0] for x in inputs[3:]),
            backend="cpu",
        )
        tiny = torch.full((100_000,), 1e-40)
        assert (tiny * 0.5 > 0).all()
        assert float.fromhex("0x1p-1070") * 0.5 > 0
    finally:
        torch.set_num_threads(before)
