"""The SSD scan: Mamba-2's and Mamba-3's equations in Python numbers, values that must not spread, refusals."""

import cmath
import math
import re
from itertools import pairwise

import pytest
import torch
from backends import on_every_target
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_as_accurate_as_the_reference, laid_out
from ssd_problems import flat_ssd_scan, small_ssd, ssd_scans

import wmkernels
from wmkernels import SSDState, native_call
from wmkernels.checks import state_dtype
from wmkernels.native_call import pack_args

every_target = on_every_target("ssd_scan")
zeros = torch.zeros


@on_every_target("ssd_scan", without=("reference",))
@given(data=st.data())
def test_ssd_scan_is_as_accurate_as_the_reference(target, data):
    longest = 12 if target.backend == "chunked" else 40  # it cuts a sequence at each reset
    assert_as_accurate_as_the_reference(data.draw(ssd_scans(device=target.device, max_time=longest)), target.backend)


@every_target
@given(data=st.data())
def test_ssd_scan_by_single_numbers(target, data):
    problem = data.draw(ssd_scans([torch.float64], target.device, max_time=6, sizes=[1, 2, 3], mamba3=False))
    out, last = problem.call(target.backend)
    x = {name: value for name, value in problem.tensors.items() if value is not None}
    (batch, time, heads, d), (groups, n) = x["x"].shape, x["B"].shape[2:]
    low, high = problem.options["dt_limit"]
    bounds = x["cu_seqlens"].tolist() if "cu_seqlens" in x else None
    rows = [(b, 0, time) for b in range(batch)] if bounds is None else [(0, *row) for row in pairwise(bounds)]
    D = x.get("D", torch.zeros(heads))
    D = D if D.dim() > 1 else D[:, None].expand(heads, d)
    for index, (b, start, end) in enumerate(rows):
        for head in range(heads):
            h = x["initial_state"][index, head].tolist() if "initial_state" in x else [[0.0] * n for _ in range(d)]
            for t in range(start, end):
                step = x["dt"][b, t, head].item() + (x["dt_bias"][head].item() if "dt_bias" in x else 0.0)
                step = math.log1p(math.exp(step)) if problem.options["dt_softplus"] else step
                step = min(max(step, low), high)
                A = x["A"][b, t, head] if x["A"].dim() > 1 else x["A"][head]
                kept = 0.0 if "reset" in x and x["reset"][b, t] else math.exp(step * A.item())
                B, C = (x[name][b, t, head // (heads // groups)].tolist() for name in "BC")
                for i, value in enumerate(x["x"][b, t, head].tolist()):
                    h[i] = [kept * h[i][j] + step * value * B[j] for j in range(n)]
                    y = sum(h[i][j] * C[j] for j in range(n)) + D[head, i].item() * value
                    if "z" in x:
                        z = x["z"][b, t, head, i].item()
                        y *= z / (1 + math.exp(-z))
                    torch.testing.assert_close(out[b, t, head, i].item(), y)
            torch.testing.assert_close(last[index, head].cpu(), torch.tensor(h, dtype=torch.float64))


def mamba3(time: int, seed: int = 0):
    """One head with one channel and one pair, as tensors of ``flat_ssd_scan``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = {"x": normal(1, time, 1, 1), "dt": normal(1, time, 1).abs(), "A": -normal(1).abs()}
    x |= {"B": normal(1, time, 1, 2), "C": normal(1, time, 1, 2), "angle": 4 * normal(1, time, 1, 1)}
    x |= {"trapezoid": normal(1, time, 1).sigmoid(), "initial_state": normal(1, 1, 1, 2), "phase": normal(1, 1, 1)}
    return x | {"previous_B": normal(1, 1, 2), "previous_x": normal(1, 1, 1)}


@every_target
@pytest.mark.parametrize("reset", [None, 0, 4])
def test_mamba3_by_complex_numbers(target, reset):
    """h_t = a_t (h_{t-1} + (1 - l_t) s_t B_{t-1} x_{t-1}) + l_t s_t B_t x_t with a_t = exp(s_t (A - i angle_t))."""
    time = 9
    given_ = mamba3(time)
    flat = {name: value.flatten().tolist() for name, value in given_.items()}
    turn = cmath.exp(-1j * flat["phase"][0])  # the state's frame
    h = complex(*flat["initial_state"]) * turn
    before, phase = complex(*flat["previous_B"]) * flat["previous_x"][0], flat["phase"][0]
    expected = []
    for t in range(time):
        step, weight = flat["dt"][t], flat["trapezoid"][t]
        if t == reset:
            h, before, phase = 0, 0, 0
        here = complex(*flat["B"][2 * t : 2 * t + 2]) * flat["x"][t]
        decay = cmath.exp(step * (flat["A"][0] - 1j * flat["angle"][t]))
        h = decay * (h + (1 - weight) * step * before) + weight * step * here
        before, phase = here, phase + step * flat["angle"][t]
        expected.append((complex(*flat["C"][2 * t : 2 * t + 2]).conjugate() * h).real)
    if reset is not None:
        given_["reset"] = torch.arange(time)[None] == reset
    moved = {name: value.to(target.device) for name, value in given_.items()}
    out, state, last_phase, last_B, last_x = flat_ssd_scan(**moved, backend=target.backend)
    torch.testing.assert_close(out.flatten().tolist(), expected)
    torch.testing.assert_close(complex(*state.flatten().tolist()), h * cmath.exp(1j * phase))
    assert abs(last_phase.item()) <= math.pi and math.isclose(math.cos(last_phase.item()), math.cos(phase))
    assert torch.equal(last_B, moved["B"][:, -1]) and torch.equal(last_x, moved["x"][:, -1])


@every_target
def test_a_rollout_by_steps_is_the_scan(target):
    x = {name: value.to(target.device) for name, value in mamba3(7).items()}
    expected = flat_ssd_scan(**x, backend="reference")
    state = SSDState(*(x.pop(name) for name in ("initial_state", "phase", "previous_B", "previous_x")))
    outputs = []
    for t in range(7):
        own = {name: value if name == "A" else value[:, t] for name, value in x.items()}
        out, state = wmkernels.ssd_step(state, **own, backend=target.backend)
        outputs.append(out)
    torch.testing.assert_close((torch.stack(outputs, 1), *state), expected)


@on_every_target("ssd_scan", kernels_only=True)
@given(data=st.data())
def test_one_step_without_gradients_is_one_with(target, data):
    """A kernel keeps no state then, and passes it on where it is."""
    problem = data.draw(ssd_scans(device=target.device, max_time=1))
    expected = [x.detach() for x in problem.call(target.backend, problem.leaves())]
    with torch.no_grad():
        torch.testing.assert_close([*problem.call(target.backend)], expected)


@every_target
def test_trapezoid_of_one_and_angle_of_zero_is_mamba2(target):
    problem = small_ssd(target.device, time=20)
    x = problem.tensors
    first = x["initial_state"]
    out, last = wmkernels.ssd_scan(**x, return_last_state=True, backend=target.backend)
    more = {"trapezoid": torch.ones_like(x["dt"]), "angle": torch.zeros_like(x["dt"])[..., None]}
    x["initial_state"] = SSDState(
        first, zeros(2, 2, 1, dtype=torch.float64), *(torch.ones_like(x[k][:, 0]) for k in "Bx")
    )
    again, state = wmkernels.ssd_scan(**x, **more, return_last_state=True, backend=target.backend)
    torch.testing.assert_close((again, state.state), (out, last))


@every_target
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["x", "dt", "B", "angle", "trapezoid", "initial_state", "previous_x"])
def test_what_is_not_finite_does_not_cross_a_reset(target, name, value):
    x = mamba3(12)
    x["reset"] = torch.arange(12)[None] == 5
    clean = {k: v.clone() for k, v in x.items()}
    spoiled = x[name] if name in ("initial_state", "previous_x") else x[name][:, 2]
    spoiled.fill_(value)
    gradients = []
    for tensors in (clean, x):
        leaves = {k: v.to(target.device).requires_grad_(v.is_floating_point()) for k, v in tensors.items()}
        out, state, *rest = flat_ssd_scan(**leaves, backend=target.backend)
        (gradient,) = torch.autograd.grad(out[:, 5:].sum() + state.sum(), leaves["x"])
        gradients.append((out[:, 5:], state, *rest, gradient[:, 5:]))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@every_target
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
def test_nan_of_an_ssd_scan_reaches_no_earlier_step(target, name):
    problem = small_ssd(target.device, torch.float32, time=30)
    problem.tensors[name][:, 17] = math.nan
    out, _ = problem.call(target.backend)
    assert torch.equal(out.isnan(), problem.call("reference")[0].isnan())


@every_target
def test_a_large_phase_keeps_its_precision(target):
    """Summed in float32, a phase of 1e5 radians has an error of 4e-3."""
    x = {k: v.float() if k != "phase" else v for k, v in mamba3(50).items()} | {"A": zeros(1)}
    x["angle"] = torch.full_like(x["angle"], 2048.0)
    x["dt"] = torch.ones_like(x["dt"])
    moved = {k: v.to(target.device) for k, v in x.items()}
    found = flat_ssd_scan(**moved, backend=target.backend)[2].item()
    wanted = x["phase"].item() + 50 * 2048.0
    assert abs(cmath.exp(1j * found) - cmath.exp(1j * wanted)) < 1e-9


@every_target
@pytest.mark.parametrize("frozen", ["dt", "A"])
def test_a_state_that_does_not_decay_stays_the_same_bit_for_bit(target, frozen):
    x = small_ssd(target.device, torch.float32, time=300).tensors
    x[frozen].zero_()
    x["x"][:, 5:] = 0
    states = []
    for time in (70, 300):
        own = {name: v if name in ("A", "D", "initial_state") else v[:, :time] for name, v in x.items()}
        states.append(wmkernels.ssd_scan(**own, return_last_state=True, backend=target.backend)[1])
    assert torch.equal(*states)
    assert frozen == "A" or torch.equal(states[0], x["initial_state"])


@every_target
def test_a_reset_outside_the_cut_gets_no_gradient_through_the_decay(target):
    problem = small_ssd(target.device, time=5)
    problem.tensors["reset"] = torch.arange(5, device=target.device)[None].expand(2, 5) == 0
    gradients = problem.solve(target.backend)
    assert not gradients["gradient of initial_state"].any()


@on_every_target("ssd_scan", without=("reference",))
def test_ssd_scan_by_finite_differences(target):
    x = {name: value.to(target.device).requires_grad_() for name, value in mamba3(4).items()}
    names = tuple(x)

    def run(*values):
        return flat_ssd_scan(**dict(zip(names, values, strict=True)), chunk=3, backend=target.backend)

    torch.autograd.gradcheck(run, tuple(x.values()), atol=1e-6)


def test_backward_workspace_of_an_ssd_scan_grows_with_neither_steps_nor_sequences(monkeypatch):
    sizes = []

    def recorded(name, *args):
        call = pack_args(name, *args)
        sizes.append((name, call.workspace_bytes))
        return call

    monkeypatch.setattr(native_call, "pack_args", recorded)

    def workspace(batch, time):
        sizes.clear()
        problem = small_ssd("cpu", torch.float32, batch, time)
        problem.tensors["D"] = None  # its gradient is summed over sequences
        problem.solve("cpu")
        return dict(sizes)["ssd_scan_backward"]

    assert workspace(2, 600) == workspace(2, 1500) == workspace(7, 600)


@on_every_target("ssd_scan", kernels_only=True)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.bfloat16, "permuted"), (torch.float64, "strided")],
    ids=str,
)
def test_ssd_scan_is_a_registered_op(target, dtype, layout):
    packed, held = layout == "contiguous", state_dtype(dtype)
    batch, time = (1, 6) if packed else (2, 6)
    activations = [(batch, time, 2, 3), *[(batch, time, 1, 5)] * 2, (batch, time, 2, 3)]
    x, B, C, z = (torch.randn(shape).to(dtype) for shape in activations)
    gate, weight, own_weight = (torch.randn(batch, time, 2).to(held) for _ in range(3))
    given_ = [x, gate, weight, B, C, own_weight, torch.randn(2, 3).to(held), z, torch.randn(2, 2, 3, 5).to(held)]
    inputs = [laid_out(v, layout, seed).to(target.device).requires_grad_() for seed, v in enumerate(given_)]
    bounds = torch.tensor([0, 4, time], device=target.device) if packed else None
    inputs += [torch.rand(batch, time, device=target.device) < 0.3, bounds]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.wmkernels.ssd_scan_forward.default
    torch.library.opcheck(op, (*inputs, 2, 4, target.backend), test_utils=tests)
    detached = [None if x is None else x.detach() for x in inputs]
    out, last, kept = op(*detached, 2, 4, target.backend)
    arguments = (torch.randn_like(out), torch.randn_like(last), *detached, kept, 2, 4, target.backend)
    torch.library.opcheck(torch.ops.wmkernels.ssd_scan_backward.default, arguments, test_utils=tests)


@every_target
def test_vmap_and_grad_of_an_ssd_scan(target):
    x = {name: value.to(target.device) for name, value in mamba3(5).items()}
    many = {name: torch.stack([value, 0.5 * value]) for name, value in x.items()}

    def loss(values):
        return sum(v.square().sum() for v in flat_ssd_scan(**values, backend=target.backend))

    found = torch.func.vmap(torch.func.grad(loss))(many)
    for index in range(2):
        expected = torch.func.grad(loss)({name: value[index] for name, value in many.items()})
        torch.testing.assert_close({name: value[index] for name, value in found.items()}, expected)


@every_target
@pytest.mark.parametrize("sizes", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=["batch", "time", "d"])
def test_empty_ssd_scan(target, sizes):
    batch, time, d = sizes
    problem = small_ssd(target.device, torch.float32, batch, time, d=d)
    leaves = problem.leaves()
    out, last = problem.call(target.backend, leaves)
    assert out.shape == leaves["x"].shape
    assert torch.equal(last, leaves["initial_state"]) or time
    cotangent = torch.randn_like(last)
    (gradient,) = torch.autograd.grad(last, leaves["initial_state"], cotangent)
    assert time or torch.equal(gradient, cotangent)


@every_target
def test_packed_sequences_without_a_step_of_an_ssd_scan(target):
    x = mamba3(4)
    names = ("initial_state", "phase", "previous_B", "previous_x")
    x |= {name: torch.randn(4, *x[name].shape[1:], dtype=torch.float64) for name in names}
    x = {name: value.to(target.device) for name, value in x.items()}
    bounds = torch.tensor([0, 0, 0, 4, 4], device=target.device)
    out, *last = flat_ssd_scan(**x, cu_seqlens=bounds, backend=target.backend)
    for value, name in zip(last, names, strict=True):
        if name != "phase":  # which is returned within a turn
            assert torch.equal(value[[0, 1, 3]], x[name][[0, 1, 3]])
    torch.testing.assert_close(last[1][[0, 1, 3]], x["phase"][[0, 1, 3]])
    x |= {name: x[name][2:3] for name in names}
    own = flat_ssd_scan(**x, backend=target.backend)
    torch.testing.assert_close((out, *(value[2:3] for value in last)), own)


SCAN_ERRORS = {
    "x": ({"x": zeros(2, 4, 3)}, ValueError, "x has shape (2, 4, 3), expected (batch, time, heads, d)"),
    "no head": ({"x": zeros(2, 4, 0, 2)}, ValueError, "x has shape (2, 4, 0, 2), expected at least 1 head"),
    "dt": (
        {"dt": zeros(2, 4, 3)},
        ValueError,
        "dt has shape (2, 4, 3), expected (batch=2, time=4, heads=2) to match x",
    ),
    "A": ({"A": zeros(3)}, ValueError, "A has shape (3,), expected (heads=2) to match x"),
    "A complex": ({"A": zeros(2, dtype=torch.complex64)}, TypeError, "A is complex (torch.complex64), expected a real"),
    "B": ({"B": zeros(2, 3, 1, 2)}, ValueError, "B has shape (2, 3, 1, 2), expected (batch=2, time=4, groups, n)"),
    "groups": ({"B": zeros(2, 4, 3, 2)}, ValueError, "B has 3 groups, expected a divisor of heads=2"),
    "C": ({"C": zeros(2, 4, 2, 2)}, ValueError, "C has shape (2, 4, 2, 2), expected (batch=2, time=4, groups=1, n=2)"),
    "D": ({"D": zeros(3)}, ValueError, "D has shape (3,), expected (heads=2) to match x"),
    "chunk": ({"chunk": 0}, ValueError, "chunk is 0, expected 1 to"),
    "chunk of a float": ({"chunk": 1.5}, TypeError, "chunk is 1.5, expected a whole number"),
    "limit": ({"dt_limit": (1.0, 0.5)}, ValueError, "dt_limit is (1.0, 0.5), expected its lowest number first"),
    "one limit": ({"dt_limit": 1.0}, TypeError, "dt_limit is 1.0, expected (lowest, highest)"),
    "angle": ({"angle": zeros(2, 4, 1, 2)}, ValueError, "angle has 2 pairs, expected 1 to 1, n // 2"),
    "angle's heads": (
        {"angle": zeros(2, 4, 3, 1)},
        ValueError,
        "angle has shape (2, 4, 3, 1), expected (batch=2, time=4",
    ),
    "trapezoid": (
        {"trapezoid": zeros(2, 4)},
        ValueError,
        "trapezoid has shape (2, 4), expected (batch=2, time=4, heads",
    ),
    "state": (
        {"initial_state": zeros(2, 2, 2)},
        ValueError,
        "initial_state has shape (2, 2, 2), expected (batch=2, hea",
    ),
    "state of mamba3": (
        {"trapezoid": zeros(2, 4, 2)},
        TypeError,
        "initial_state is a Tensor, expected an SSDState with",
    ),
    "state of mamba2": (
        {"initial_state": SSDState(zeros(1))},
        TypeError,
        "initial_state is an SSDState, expected a tor",
    ),
    "reset": (
        {"reset": zeros(2, 3, dtype=torch.bool)},
        ValueError,
        "reset has shape (2, 3), expected (batch=2, time=4)",
    ),
    "packed batch": (
        {"cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        "x has a batch of 2, expected 1 with cu_seqlens",
    ),
}


@pytest.mark.parametrize("case", SCAN_ERRORS)
def test_refusals_of_ssd_scan(case):
    changes, error, message = SCAN_ERRORS[case]
    with pytest.raises(error, match=f"ssd_scan: {re.escape(message)}"):
        wmkernels.ssd_scan(**small_ssd("cpu", torch.float32, time=4).tensors | changes)


STEP_ERRORS = {
    "x": ({"x": zeros(2, 4)}, "x has shape (2, 4), expected (batch, heads, d)"),
    "reset": ({"reset": zeros(1, dtype=torch.bool)}, "reset has shape (1,), expected (batch=2) to match x"),
    "state": ({"state": zeros(2, 2, 2)}, "state has shape (2, 2, 2), expected (batch=2, heads=2, d=2, n=2)"),
}


@pytest.mark.parametrize("case", STEP_ERRORS)
def test_refusals_of_ssd_step(case):
    changes, message = STEP_ERRORS[case]
    x = small_ssd("cpu", torch.float32).tensors
    timed = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in x.items()}
    timed["state"] = timed.pop("initial_state")
    with pytest.raises(ValueError, match=f"ssd_step: {re.escape(message)}"):
        wmkernels.ssd_step(**timed | changes)


@every_target
def test_bounds_of_an_ssd_scan_that_do_not_rise_are_refused(target):
    x = small_ssd(target.device, torch.float32, batch=1).tensors | {"initial_state": None}
    with pytest.raises(ValueError, match=r"ssd_scan: cu_seqlens is \[0, 2\], expected bounds that rise from 0"):
        wmkernels.ssd_scan(**x, cu_seqlens=torch.tensor([0, 2]), backend=target.backend)
