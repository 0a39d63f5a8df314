"""The gated delta rule: decays of every size, values that must not spread, refusals."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from backends import on_every_target
from delta_rule_problems import small_delta_rule
from problems import assert_as_accurate_as_the_reference

import wmkernels
from wmkernels.gated_delta_rule import chunked
from wmkernels.nn import GatedDeltaNet

every_target = on_every_target("gated_delta_rule")
every_kernel = on_every_target("gated_delta_rule", kernels_only=True)
DECAYS = [0.0, -1e-3, -0.5, -30.0, -88.0, -104.0, -1e4]


@on_every_target("gated_delta_rule", without=("reference",))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_far_below_zero_lose_nothing_after_them(target, dtype):
    """A difference of sums of gates over a chunk would: 1e4 has an ulp of 1e-3 in float32."""
    problem = small_delta_rule(target.device, dtype, time=70, size=20)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(DECAYS), (2, 2, 70), generator=generator)
    gates = torch.where(torch.rand(2, 2, 70, generator=generator) < 0.2, torch.tensor(DECAYS)[index], -0.01)
    problem.tensors["gate"] = gates.to(dtype).to(target.device)
    problem.chunk = 64
    assert_as_accurate_as_the_reference(problem, target.backend)


@every_target
def test_a_gate_of_minus_infinity_forgets_everything(target):
    problem = small_delta_rule(target.device, time=9)
    gate = problem.tensors["gate"]
    gate[..., 4] = -math.inf
    reset = torch.zeros(2, 9, dtype=torch.bool, device=target.device)
    reset[:, 4] = True
    forgotten = problem.solve(target.backend)
    problem.tensors["reset"] = reset
    expected = problem.solve("reference")
    torch.testing.assert_close(forgotten, expected)


@every_target
def test_without_decay_and_correction_the_state_stays_bit_for_bit(target):
    problem = small_delta_rule(target.device, torch.float32, time=300)
    problem.tensors["gate"].zero_(), problem.tensors["beta"].zero_()
    first = problem.tensors["initial_state"].requires_grad_()
    _, last = problem.call(target.backend)
    assert torch.equal(last, first)
    cotangent = torch.randn_like(last)
    (gradient,) = torch.autograd.grad(last, first, cotangent)
    assert torch.equal(gradient, cotangent)


@every_target
def test_a_key_recalls_the_value_written_last(target):
    """With unit keys, beta 1 and no decay: the delta rule overwrites one value and leaves those of orthogonal keys."""
    k = torch.eye(4, device=target.device)[None, None].repeat(1, 1, 1, 3)  # (1, 1, 4, 12): every key three times
    v = torch.randn(1, 1, 5, 12, device=target.device)
    zeros, ones = torch.zeros(1, 1, 12, device=target.device), torch.ones(1, 1, 12, device=target.device)
    options = {"scale": 1, "return_last_state": True, "backend": target.backend}
    y, last = wmkernels.gated_delta_rule(k, k, v, zeros, ones, **options)
    torch.testing.assert_close(y, v)
    torch.testing.assert_close(last[0, 0], v[0, 0, :, -4:].T)


@every_kernel
def test_nan_reaches_no_earlier_step(target):
    clean = small_delta_rule(target.device, torch.float32, time=30)
    for name in ("q", "k", "v", "gate", "beta"):
        problem = clean.mapped(torch.clone)
        problem.tensors[name][..., 17] = math.nan
        out, _ = problem.call(target.backend)
        assert torch.equal(out.isnan(), problem.call("reference")[0].isnan()), name
        assert torch.equal(out[..., :17], clean.call(target.backend)[0][..., :17]), name


@every_target
def test_value_heads_share_the_keys_of_their_group(target):
    problem = small_delta_rule(target.device, heads=4)
    x = problem.tensors
    x["q"], x["k"] = (torch.cat([x[name], -0.5 * x[name]], 1) for name in ("q", "k"))
    found = problem.solve(target.backend)
    repeated = problem.mapped(torch.clone)
    repeated.tensors |= {name: x[name].repeat_interleave(2, 1) for name in ("q", "k")}
    expected = repeated.solve("reference")
    for name in ("q", "k"):
        expected[f"gradient of {name}"] = expected[f"gradient of {name}"].unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(found, expected)


@every_target
def test_mixed_dtypes_are_computed_in_float32(target):
    x = small_delta_rule(target.device, torch.float32).tensors
    half = x | {name: x[name].bfloat16() for name in ("q", "k", "v")}
    y = wmkernels.gated_delta_rule(**half, backend=target.backend)
    wide = half | {name: half[name].float() for name in ("q", "k", "v")}
    expected = wmkernels.gated_delta_rule(**wide, backend="reference")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    mixed = half | {"v": x["v"]}
    torch.testing.assert_close(wmkernels.gated_delta_rule(**mixed, backend=target.backend), y.float(), rtol=1, atol=0.1)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# q and k are (batch=2, heads=1, d_k=3, time=4), v (2, 2, 2, 4).
ERRORS = {
    "q no tensor": ({"q": [1.0]}, TypeError, "q is a list, expected a torch.Tensor"),
    "q of integers": ({"q": zeros(2, 1, 3, 4, dtype=torch.int64)}, TypeError, "q has dtype int64, expected float32 or"),
    "q without heads": ({"q": zeros(2, 3, 4)}, ValueError, "q has shape (2, 3, 4), expected (batch, heads, d_k, time)"),
    "q without heads, channel_last": (
        {"q": zeros(2, 4, 3), "channel_last": True},
        ValueError,
        "q has shape (2, 4, 3), expected (batch, time, heads, d_k) with channel_last=True",
    ),
    "no keys": (
        {"q": zeros(2, 1, 0, 4), "k": zeros(2, 1, 0, 4)},
        ValueError,
        "q has shape (2, 1, 0, 4), expected heads and d_k of at least 1",
    ),
    "k": (
        {"k": zeros(2, 1, 2, 4)},
        ValueError,
        "k has shape (2, 1, 2, 4), expected (batch=2, heads=1, d_k=3, time=4) to match q",
    ),
    "k dtype": (
        {"k": zeros(2, 1, 3, 4, dtype=torch.float64)},
        TypeError,
        "k has dtype float64, expected float32 beside q of torch.float32",
    ),
    "v": (
        {"v": zeros(2, 2, 2, 5)},
        ValueError,
        "v has shape (2, 2, 2, 5), expected (batch=2, value_heads, d_v, time=4) to match q",
    ),
    "value heads": (
        {"q": zeros(2, 3, 3, 4), "k": zeros(2, 3, 3, 4)},
        ValueError,
        "v has 2 heads, expected a multiple of the 3 heads of q and k",
    ),
    "gate": (
        {"gate": zeros(2, 1, 4)},
        ValueError,
        "gate has shape (2, 1, 4), expected (batch=2, value_heads=2, time=4) to match v",
    ),
    "beta": (
        {"beta": zeros(2, 2, 4, 1)},
        ValueError,
        "beta has shape (2, 2, 4, 1), expected (batch=2, value_heads=2, time=4) to match v",
    ),
    "initial_state": (
        {"initial_state": zeros(2, 2, 2, 3)},
        ValueError,
        "initial_state has shape (2, 2, 2, 3), expected (batch=2, value_heads=2, d_k=3, d_v=2) to match q and v",
    ),
    "reset": (
        {"reset": zeros(2, 3, dtype=torch.bool)},
        ValueError,
        "reset has shape (2, 3), expected (batch=2, time=4) to match q",
    ),
    "packed batch": (
        {"cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        "q has a batch of 2, expected 1 with cu_seqlens",
    ),
    "scale": ({"scale": "1"}, TypeError, "scale is '1', expected a finite number or None"),
    "infinite scale": ({"scale": math.inf}, TypeError, "scale is inf, expected a finite number or None"),
    "scale past every float": ({"scale": 10**400}, TypeError, "scale is a int, expected a finite number or None"),
    "channel-last gate": (
        {name: zeros(2, 4, 2, 3) for name in "qkv"} | {name: zeros(2, 4, 2) for name in ("gate", "beta")},
        ValueError,
        "gate has shape (2, 4, 2), expected (batch=2, value_heads=4, time=3) to match v; channel_last=True takes",
    ),
    "channel-last v": (
        {"q": zeros(2, 4, 3, 2), "k": zeros(2, 4, 3, 2), "v": zeros(2, 4, 6, 5)},
        ValueError,
        "v has shape (2, 4, 6, 5), expected (batch=2, value_heads, d_v, time=2) to match q; channel_last=True takes",
    ),
    "device": ({"v": torch.zeros(2, 2, 2, 4, device="meta")}, ValueError, "v is on meta, expected"),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_refusals_of_gated_delta_rule(case):
    changes, error, message = ERRORS[case]
    x = small_delta_rule("cpu", torch.float32, time=4, size=3).tensors | changes
    with pytest.raises(error, match=f"gated_delta_rule: {re.escape(message)}"):
        wmkernels.gated_delta_rule(**x)


@every_target
def test_bounds_that_do_not_rise(target):
    x = small_delta_rule(target.device, torch.float32, batch=1).tensors | {"initial_state": None}
    with pytest.raises(ValueError, match=r"gated_delta_rule: cu_seqlens is \[0, 2\], expected bounds that rise from 0"):
        wmkernels.gated_delta_rule(**x, cu_seqlens=torch.tensor([0, 2]), backend=target.backend)


@pytest.mark.parametrize("scale", [np.float32(0.5), np.int64(2), Fraction(1, 2)])
def test_scale_may_be_any_real_number(scale):
    x = small_delta_rule("cpu", torch.float32, time=4).tensors
    assert torch.equal(
        wmkernels.gated_delta_rule(**x, scale=scale), wmkernels.gated_delta_rule(**x, scale=float(scale))
    )


@pytest.mark.parametrize("every", [1, 3, 200])
def test_chunks_between_many_resets_are_short(every, monkeypatch):
    problem = small_delta_rule("cpu", time=200)
    problem.tensors["reset"] = torch.arange(400).view(2, 200) % every == 0
    real, steps = chunked._scan, []
    monkeypatch.setattr(chunked, "_scan", lambda q, *others: steps.append(q.shape[2] * q.shape[3]) or real(q, *others))
    torch.testing.assert_close(problem.call("chunked"), problem.call("reference"))
    assert 200 <= steps.pop() <= 2 * 200


STEP_ERRORS = {
    "q": ({"q": zeros(2, 3)}, "q has shape (2, 3), expected (batch, heads, d_k)"),
    "v": ({"v": zeros(1, 2, 2)}, "v has shape (1, 2, 2), expected (batch=2, value_heads, d_v) to match q"),
    "gate": ({"gate": zeros(2, 1)}, "gate has shape (2, 1), expected (batch=2, value_heads=2) to match v"),
    "state": (
        {"state": zeros(2, 2, 3)},
        "state has shape (2, 2, 3), expected (batch=2, value_heads=2, d_k=3, d_v=2) to match q and v",
    ),
    "reset": ({"reset": zeros(1, dtype=torch.bool)}, "reset has shape (1,), expected (batch=2) to match q"),
}


@pytest.mark.parametrize("case", list(STEP_ERRORS))
def test_refusals_of_gated_delta_rule_step(case):
    changes, message = STEP_ERRORS[case]
    x = small_delta_rule("cpu", torch.float32, time=1, size=3).tensors
    state = x.pop("initial_state")
    x = {"state": state} | {name: value[..., 0] for name, value in x.items()} | changes
    with pytest.raises(ValueError, match=f"gated_delta_rule_step: {re.escape(message)}"):
        wmkernels.gated_delta_rule_step(**x)


def test_a_long_pause_decays_like_many_steps_without_input():
    module = GatedDeltaNet(6, 2, 4).double()
    state = module.init_state(3) | {"recurrent": torch.randn(3, 2, 4, 8, dtype=torch.float64)}
    silence = torch.zeros(3, 6, dtype=torch.float64)
    _, paused = module.step(silence, state, elapsed=torch.tensor([1.0, 4.0, 5.0]))
    _, rolled = module(silence[:, None].expand(-1, 5, -1), state)
    once = module.step(silence, state)[1]
    torch.testing.assert_close(paused["recurrent"][2], rolled["recurrent"][2])
    torch.testing.assert_close(paused["recurrent"][0], once["recurrent"][0])
    inputs = torch.randn(3, 5, 6, dtype=torch.float64)
    times = torch.rand(3, 5)
    outputs, _ = module(inputs, state, elapsed=times)
    for t in range(5):
        output, state = module.step(inputs[:, t], state, elapsed=times[:, t])
        torch.testing.assert_close(output, outputs[:, t])


def test_the_block_begins_with_the_published_decays():
    torch.manual_seed(0)
    module = GatedDeltaNet(64, 64, dt_min=0.01, dt_max=0.05)
    assert (module.A_log.exp() <= 16).all() and module.A_log.exp().max() > 12
    steps = torch.nn.functional.softplus(module.dt_bias)
    assert 0.01 <= steps.min() < 0.015 < 0.04 < steps.max() <= 0.05 + 1e-6
    assert module.d_head == 1 and GatedDeltaNet(64).d_head == 12
    assert {id(p) for p in module.no_decay_parameters()} == {id(module.A_log), id(module.dt_bias)}
    before = module.A_log.clone()
    module.reset_parameters()
    assert not torch.equal(module.A_log, before)
    assert "64, heads=64, d_head=1, value_heads=64, d_value=2" in repr(module)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedDeltaNet(0), "d_model is 0, expected a whole number, at least 1"),
        (lambda: GatedDeltaNet(8, 2, 0), "d_head is 0, expected 1 to"),
        (lambda: GatedDeltaNet(8, 2, 4, expand_v=0.1), "expand_v \\* d_head is 0.4, expected 1 to"),
        (lambda: GatedDeltaNet(8, 2, value_heads=3), "value_heads is 3, expected a multiple of heads=2"),
        (lambda: GatedDeltaNet(8, dt_min=0.2), "dt_min is 0.2 and dt_max 0.1, expected 0 < dt_min <= dt_max"),
        (
            lambda: GatedDeltaNet(8)(torch.zeros(2, 5, 7)),
            r"inputs has shape \(2, 5, 7\), expected \(batch, time, d_mod",
        ),
        (
            lambda: GatedDeltaNet(8)(torch.zeros(2, 5, 8), elapsed=torch.zeros(2, 4)),
            r"elapsed has shape \(2, 4\), expected \(batch=2, time=5\)",
        ),
    ],
)
def test_refusals_of_the_block(make, message):
    with pytest.raises(ValueError, match=f"^GatedDeltaNet: {message}"):
        make()
