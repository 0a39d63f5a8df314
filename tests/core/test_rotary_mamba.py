"""nn.RotaryMamba beyond the laws."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from backends import on_every_target
from tolerances import GRADCHECK, SAME_KERNEL

from wmkernels.nn import Mamba, RotaryMamba
from wmkernels.nn.rotary_mamba import TURN, apply_rotary

SCANS = on_every_target("selective_scan")


def complex_scan(module, inputs):
    """The equivalent recurrence in complex128."""
    inner, pairs, groups = module.d_inner, module.d_state // 2, module.groups
    x, z = module.in_proj(inputs).chunk(2, -1)
    x = F.silu(module.conv1d(x)[0])
    rank, B, C = x_proj_parts(module, x)
    step = F.softplus(F.linear(rank, module.dt_proj.weight, module.dt_proj.bias))
    rates = module.angle_rate.expand(*x.shape[:-1], groups, pairs)
    if module.angle_proj is not None:
        rates = rates + module.angle_proj(x).unflatten(-1, (groups, pairs))
    if module.speed_proj is not None:
        rates = rates * torch.tanh(module.speed_proj(x)).unsqueeze(-1)
    each = inner // groups
    state, outputs = torch.zeros(len(x), inner, pairs, dtype=torch.complex128), []
    for t in range(x.shape[1]):
        b, c, rate = (v[:, t].repeat_interleave(each, 1) for v in (B, C, rates))  # (batch, inner, pairs)
        decay = torch.exp(-step[:, t, :, None] * module.A_log.exp() + 1j * rate)
        state = decay * state + (step[:, t] * x[:, t])[..., None] * b
        outputs.append((c.conj() * state).real.sum(-1))
    y = (torch.stack(outputs, 1) + module.D * x) * F.silu(z)
    return module.out_proj(y)


def x_proj_parts(module, x):
    size = module.groups * module.d_state
    rank, *projections = module.x_proj(x).split([module.dt_rank, size, size], -1)
    shape = (module.groups, module.d_state // 2, 2)
    return rank, *(torch.view_as_complex(v.unflatten(-1, shape).contiguous()) for v in projections)


@SCANS
@pytest.mark.parametrize(("selective", "speed"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("groups", [1, 4])
def test_it_is_a_scan_with_a_complex_state(target, groups, selective, speed):
    module = RotaryMamba(
        12,
        6,
        groups=groups,
        selective_angle=selective,
        selective_speed=speed,
        backend=target.backend,
        device=target.device,
        dtype=torch.float64,
    )
    if selective:
        torch.nn.init.normal_(module.angle_proj.weight)
    inputs = torch.randn(2, 40, 12, dtype=torch.float64, device=target.device)
    actual, expected = module(inputs)[0], complex_scan(module, inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


def test_angles_that_turn_back_bring_what_was_written_last_first():
    """Forwards while items come and backwards after them: at step j the angle is that of the item j from the end."""
    module = RotaryMamba(4, 8, groups=2, d_conv=1, selective_speed=True, dtype=torch.float64)
    flag = torch.zeros(1, 14, module.d_inner, dtype=torch.float64)
    flag[:, 7:, 0] = 1
    with torch.no_grad():
        module.speed_proj.weight.zero_()[:, 0] = -200
        module.speed_proj.bias.fill_(100)
    angle, _ = module._accumulate(module._rates(flag, None, None), None, None, None)
    torch.testing.assert_close(angle[:, 7:13].cos(), angle[:, :6].flip(1).cos())
    torch.testing.assert_close(angle[:, 7:13].sin(), angle[:, :6].flip(1).sin())
    module.reset_parameters()
    speeds = torch.tanh(module.speed_proj(torch.randn(500, module.d_inner, dtype=torch.float64)))
    assert speeds.mean() > 0.6 and 0.01 < speeds.std() < 0.5


def test_angles_that_stand_still_make_an_unrotated_block():
    rotated, plain = RotaryMamba(8, 6, groups=2, dtype=torch.float64), Mamba(8, 6, groups=2, dtype=torch.float64)
    weights = rotated.state_dict()
    rotated.load_state_dict({**weights, "angle_rate": torch.zeros_like(weights["angle_rate"])})
    weights.pop("angle_rate")
    plain.load_state_dict({**weights, "A_log": weights["A_log"].repeat_interleave(2, 1)})
    inputs = torch.randn(2, 20, 8, dtype=torch.float64)
    torch.testing.assert_close(rotated(inputs)[0], plain(inputs)[0], rtol=0, atol=1e-12)


def test_the_angle_is_exact_after_a_million_steps():
    steps, pieces = 2**20, 2**10
    module = RotaryMamba(2, 2, d_conv=1, expand=0.5, groups=1)
    with torch.no_grad():
        module.angle_rate.fill_(2.7)  # not a float32: its sums round in float32
        rate = int(module.angle_rate.double().item() * 2**22)  # float32 near 2.7 is a multiple of 2**-22
        inputs = torch.randn(1, steps, 2)
        whole = module(inputs)[1]["angle"].item()
        state = module.init_state(1)
        for piece in inputs.split(pieces, 1):
            _, state = module(piece, state)
    turn = math.remainder(2**20 * rate / 2**22, 2 * math.pi) % (2 * math.pi)
    assert abs(whole - turn) < 1e-8
    assert abs(state["angle"].item() - turn) < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_projection_is_rotated_by_the_exact_angle(dtype):
    angle, projection = TURN * torch.rand(64, 8, dtype=torch.float64), torch.randn(64, 16).to(dtype)
    rotated, exact = apply_rotary(projection, angle), apply_rotary(projection.double(), angle)
    # Half an ulp of the dtype, and float32's rounding before it.
    torch.testing.assert_close(rotated.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_float32_block_steps_as_it_runs_after_a_long_time():
    """An unwrapped float32 angle would be off by 0.1 after a million steps."""
    module = RotaryMamba(4, 8, groups=2)
    inputs = torch.randn(1, 50_000, 4)
    with torch.no_grad():
        outputs, _ = module(inputs)
        _, state = module(inputs[:, :-10])
        for t in range(-10, 0):
            output, state = module.step(inputs[:, t], state)
            scale = outputs.abs().max().item()
            torch.testing.assert_close(output, outputs[:, t], rtol=0, atol=SAME_KERNEL[torch.float32] * scale)
    assert state["angle"].min() >= 0 and state["angle"].max() < 2 * math.pi
    assert state["angle"].dtype == torch.float64


def test_initial_angles_spread_over_half_a_turn():
    rates = RotaryMamba(8, 8, groups=2).angle_rate
    torch.testing.assert_close(rates.flatten().sort()[0], torch.linspace(0, math.pi, 8))
    assert all(group.min() < 0.5 and group.max() > 2.6 for group in rates)


def test_a_rotated_memory_tells_lags_apart_and_a_real_one_does_not():
    def states(module):
        state, seen = module.init_state(1), []
        for t in range(40):
            _, state = module.step(torch.ones(1, 8, dtype=torch.float64) * (t == 0), state)
            seen.append(turned(state) if "angle" in state else state["scan"][0])
        return torch.stack(seen).flatten(1)

    def turned(state):
        g = torch.view_as_complex(state["scan"][0].unflatten(-1, (-1, 2)).contiguous())
        angles = state["angle"][0].repeat_interleave(len(g) // state["angle"].shape[1], 0)
        return torch.view_as_real(g * torch.exp(1j * angles)).flatten(1)

    def worst_confusion(module):
        with torch.no_grad():
            held = F.normalize(states(module)[4:].double(), dim=1)
        return (held @ held.t() - torch.eye(len(held))).abs().max()

    arguments = {"d_state": 16, "groups": 4, "conv_bias": False, "dtype": torch.float64}
    assert worst_confusion(RotaryMamba(8, **arguments)) < 0.9
    assert worst_confusion(Mamba(8, **arguments)) > 0.99


@SCANS
def test_gradcheck_through_the_angle(target):
    module = RotaryMamba(
        3,
        4,
        d_conv=2,
        groups=2,
        selective_angle=True,
        backend=target.backend,
        device=target.device,
        dtype=torch.float64,
    )
    torch.nn.init.normal_(module.angle_proj.weight)
    names = [name for name, _ in module.named_parameters()]
    reset = torch.zeros(2, 4, dtype=torch.bool, device=target.device)
    reset[0, 2] = True
    state = {name: torch.rand_like(value) + 0.2 for name, value in module.init_state(2).items()}

    def run(inputs, window, scan, angle, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        given = (inputs, {"window": window, "scan": scan, "angle": angle}, reset)
        outputs, after = torch.func.functional_call(module, weights, given)
        return outputs, after["scan"], after["angle"]

    inputs = torch.randn(2, 4, 3, dtype=torch.float64, device=target.device)
    leaves = [inputs, *state.values(), *(p.detach() for p in module.parameters())]
    assert torch.autograd.gradcheck(
        run, [x.requires_grad_() for x in leaves], fast_mode=target.backend == "chunked", **GRADCHECK
    )


def test_optimizers_are_told_not_to_decay_the_rates():
    exempt = {name for name, p in RotaryMamba(8).named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert exempt == {"A_log", "D", "angle_rate"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RotaryMamba(8, 7), "d_state is 7, expected an even number"),
        (lambda: RotaryMamba(8, groups=3), "groups is 3, expected a divisor of the 16 inner channels"),
        (lambda: RotaryMamba(8, decay=0.0), "decay is 0.0, expected more than 0"),
        (
            lambda: RotaryMamba(8)(torch.zeros(1, 2, 8), Mamba(8).init_state(1)),
            r"RotaryMamba: state is the keys .* expected a dict with \['angle', 'scan', 'window'\]",
        ),
    ],
)
def test_an_error_says_what_was_expected(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("module", ["wmkernels.nn", "wmkernels.nn.rotary_mamba"])
def test_the_old_name_warns_and_is_the_same_class(module):
    with pytest.warns(FutureWarning, match="RotatedMamba is now RotaryMamba"):
        old = importlib.import_module(module).RotatedMamba
    assert old is RotaryMamba
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'RotatedMambo'"):
        _ = importlib.import_module(module).RotatedMambo


def test_a_state_dict_of_the_old_name_loads():
    with pytest.warns(FutureWarning, match="RotatedMamba is now RotaryMamba"):
        from wmkernels.nn import RotatedMamba
    old = RotatedMamba(8, 6, groups=2, selective_angle=True)
    names = ["angle_rate", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight"]
    names += ["dt_proj.weight", "dt_proj.bias", "out_proj.weight", "angle_proj.weight"]
    assert sorted(old.state_dict()) == sorted(names)
    new = RotaryMamba(8, 6, groups=2, selective_angle=True)
    new.load_state_dict(old.state_dict())
    inputs = torch.randn(1, 5, 8)
    assert torch.equal(new(inputs)[0], old(inputs)[0])
