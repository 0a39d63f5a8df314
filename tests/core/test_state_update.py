"""selective_state_update, in place, equals selective_step."""

import pytest
import torch
from backends import Target, on_every_target
from problems import DTYPES

import wmkernels
from wmkernels import dispatch

every_target = on_every_target("selective_step")


@pytest.fixture(autouse=True)
def asked_for(target, monkeypatch):
    monkeypatch.setattr(dispatch, "REQUESTED", target.backend)


def inputs(target, dtype=torch.float32, batch=3, channels=20, state=5, groups=None, parameter=torch.float32):
    parameter = torch.float64 if dtype == torch.float64 else parameter

    def normal(*shape, kind=dtype):
        return torch.randn(shape, dtype=torch.float64).to(kind).to(target.device)

    projection = (batch, state) if groups is None else (batch, groups, state)
    return {
        "x": normal(batch, channels),
        "dt": normal(batch, channels),
        "A": -normal(channels, state, kind=parameter).abs(),
        "B": normal(*projection),
        "C": normal(*projection),
        "D": normal(channels, kind=parameter),
        "z": normal(batch, channels),
        "dt_bias": normal(channels, kind=parameter),
        "dt_softplus": True,
    }


def stepped(state, x):
    renamed = {"x": "u", "dt": "delta", "dt_bias": "delta_bias", "dt_softplus": "delta_softplus"}
    return wmkernels.selective_step(state, **{renamed.get(name, name): value for name, value in x.items()})


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [None, 1, 4, 20])
def test_the_numbers_of_selective_step(target, dtype, groups):
    x = inputs(target, dtype, groups=groups)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    state = torch.randn(3, 20, 5, dtype=kind, device=target.device)
    expected, new_state = stepped(state, x)
    before = state.data_ptr()
    out = wmkernels.selective_state_update(state, **x)
    assert out.dtype == dtype
    assert state.data_ptr() == before
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, new_state)


@every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_state_is_rounded_once_a_step(target, dtype):
    x = inputs(target, dtype)
    state = torch.randn(3, 20, 5, device=target.device).to(dtype)
    expected, new_state = stepped(state.float(), x)
    out = wmkernels.selective_state_update(state, **x)
    assert state.dtype == dtype
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, new_state.to(dtype))


@every_target
def test_parameters_in_16_bits(target):
    x = inputs(target, torch.bfloat16, parameter=torch.bfloat16)
    state = torch.randn(3, 20, 5, device=target.device)
    expected, new_state = stepped(state, x)
    torch.testing.assert_close(wmkernels.selective_state_update(state, **x), expected)
    torch.testing.assert_close(state, new_state)


@every_target
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_indices_name_rows_of_a_cache(target, kind):
    x = inputs(target)
    cache = torch.randn(7, 20, 5, device=target.device)
    before = cache.clone()
    indices = torch.tensor([5, -1, 2], dtype=kind, device=target.device)
    expected, new_state = stepped(before[[5, 0, 2]], x)
    out = wmkernels.selective_state_update(cache, **x, state_batch_indices=indices)
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]])
    assert (out[1] == 0).all()
    torch.testing.assert_close(cache[[5, 2]], new_state[[0, 2]])
    untouched = [0, 1, 3, 4, 6]
    assert torch.equal(cache[untouched], before[untouched])


@every_target
def test_an_index_below_zero_reads_nothing(target):
    x = inputs(target) | {"x": torch.full((3, 20), float("nan"), device=target.device)}
    state = torch.full((1, 20, 5), float("nan"), device=target.device)
    out = wmkernels.selective_state_update(
        state, **x, state_batch_indices=torch.tensor([-1, -100, -1], device=target.device)
    )
    assert (out == 0).all()
    assert state.isnan().all()


@on_every_target("selective_step")
def test_an_index_past_the_cache(target):
    if target.device != "cpu":
        pytest.skip("checked on the CPU only: on a GPU reading the indices would synchronise")
    state = torch.randn(4, 20, 5)
    before = state.clone()
    with pytest.raises(ValueError, match=r"state_batch_indices"):
        wmkernels.selective_state_update(state, **inputs(target), state_batch_indices=torch.tensor([0, 4, 1]))
    assert torch.equal(state, before)


@every_target
@pytest.mark.parametrize("contiguous", [True, False])
def test_heads(target, contiguous):
    x = inputs(target, groups=4)
    state = torch.randn(3, 20, 5, device=target.device)
    expected, new_state = stepped(state, x)
    headed = {name: value.unflatten(1, (4, 5)) for name, value in x.items() if name in ("x", "dt", "z")}
    headed |= {name: x[name].unflatten(0, (4, 5)) for name in ("A", "D", "dt_bias")}
    cache = state.unflatten(1, (4, 5))
    if not contiguous:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    out = wmkernels.selective_state_update(cache, **{**x, **headed})
    assert out.shape == (3, 4, 5)
    torch.testing.assert_close(out.flatten(1), expected)
    torch.testing.assert_close(cache.flatten(1, 2), new_state)


@every_target
def test_heads_with_tied_parameters(target):
    """Mamba-2: A, dt, D and bias per head, stride 0 over headdim and state."""
    state = torch.randn(3, 4, 5, 6, device=target.device)
    A = (-torch.rand(4, device=target.device))[:, None, None].expand(4, 5, 6)
    dt = torch.randn(3, 4, device=target.device)[..., None].expand(3, 4, 5)
    D, bias = (torch.randn(4, device=target.device)[:, None].expand(4, 5) for _ in range(2))
    x = torch.randn(3, 4, 5, device=target.device)
    B, C = (torch.randn(3, 2, 6, device=target.device) for _ in range(2))
    step = torch.nn.functional.softplus(dt + bias)[..., None]
    wide_B, wide_C = (v.repeat_interleave(2, 1)[:, :, None] for v in (B, C))
    after = torch.exp(step * A) * state + step * x[..., None] * wide_B
    expected = (after * wide_C).sum(-1) + D * x
    out = wmkernels.selective_state_update(state, x, dt, A, B, C, D, None, bias, True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, after, rtol=1e-5, atol=1e-5)


@every_target
@pytest.mark.parametrize("layout", ["transposed", "slice"])
def test_a_state_of_any_layout_is_updated_where_it_is(target, layout):
    x = inputs(target)
    if layout == "transposed":
        state = torch.randn(3, 5, 20, device=target.device).transpose(1, 2)
    else:
        larger = torch.randn(5, 22, 12, device=target.device)
        outside = larger.clone()
        state = larger[1:4, 1:21, 1:11:2]
    expected, new_state = stepped(state, x)
    torch.testing.assert_close(wmkernels.selective_state_update(state, **x), expected)
    torch.testing.assert_close(state, new_state)
    if layout == "slice":
        outside[1:4, 1:21, 1:11:2] = state
        assert torch.equal(larger, outside)


@every_target
def test_the_version_counter_moves(target):
    x = inputs(target)
    state = torch.zeros(3, 20, 5, device=target.device)
    weight = torch.ones(3, 20, 5, device=target.device, requires_grad=True)
    loss = (weight * state).sum()
    version = state._version
    wmkernels.selective_state_update(state, **x)
    assert state._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = state._version
    with torch.no_grad():
        wmkernels.selective_state_update(state, **x)
    assert state._version > version
    cache = torch.zeros(3, 4, 5, 5, device=target.device)
    headed = {name: value.unflatten(1, (4, 5)) for name, value in x.items() if name in ("x", "dt", "z")}
    headed |= {name: x[name].unflatten(0, (4, 5)) for name in ("A", "D", "dt_bias")}
    version = cache._version
    wmkernels.selective_state_update(cache, **{**x, **headed})
    assert cache._version > version


@every_target
def test_inference_mode(target):
    x = inputs(target)
    with torch.inference_mode():
        state = torch.zeros(3, 20, 5, device=target.device)
        out = wmkernels.selective_state_update(state, **x)
    expected, new_state = stepped(torch.zeros(3, 20, 5, device=target.device), x)
    torch.testing.assert_close(out.clone(), expected)
    torch.testing.assert_close(state.clone(), new_state)


@every_target
def test_it_refuses_to_drop_a_gradient(target):
    x = inputs(target)
    state = torch.zeros(3, 20, 5, device=target.device)
    x["A"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"selective_state_update: .*without gradient; use selective_step"):
        wmkernels.selective_state_update(state, **x)
    with torch.no_grad():
        wmkernels.selective_state_update(state, **x)


@on_every_target("selective_step", kernels_only=True)
def test_a_sign_still_to_be_turned_is_turned(target):
    """imag of a conjugate is lazily negated."""
    x = inputs(target)
    turned = torch.complex(x["x"], x["x"]).conj().imag
    assert turned.is_neg()
    state = torch.zeros(3, 20, 5, device=target.device)
    expected, actual = (
        wmkernels.selective_step(state, u, x["dt"], x["A"], x["B"], x["C"], x["D"], backend=target.backend)
        for u in (turned.resolve_neg(), turned)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("target", [Target("chunked", "cpu")], ids=["chunked"])
def test_a_step_without_kernels_has_one_form(target, monkeypatch):
    x, state = inputs(target), torch.randn(3, 20, 5)
    found = stepped(state, x), wmkernels.selective_state_update(state.clone(), **x)
    monkeypatch.setattr(dispatch, "REQUESTED", "reference")
    expected = stepped(state, x), wmkernels.selective_state_update(state.clone(), **x)
    assert all(torch.equal(a, b) for a, b in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True))


def overlapping(kind, state):
    if kind == "expanded":
        return state[:, :1].expand(state.shape)
    if kind == "sliding":
        return torch.zeros(200, device=state.device).as_strided(state.shape, (20, 5, 2))
    if kind == "negated":
        return torch.complex(state, state).conj().imag
    with torch.inference_mode():
        return state.clone()


@every_target
@pytest.mark.parametrize("kind", ["expanded", "sliding", "negated", "inference"])
@pytest.mark.parametrize("heads", [False, True])
def test_a_state_that_cannot_be_written_is_refused(target, kind, heads):
    x, state = inputs(target), overlapping(kind, torch.zeros(3, 20, 5, device=target.device))
    before = state.clone()
    if heads:
        x |= {name: x[name].unflatten(1, (4, 5)) for name in ("x", "dt", "z")}
        x |= {name: x[name].unflatten(0, (4, 5)) for name in ("A", "D", "dt_bias")}
        state = state.unflatten(1, (4, 5))
    with pytest.raises(ValueError, match=r"selective_state_update: state .*; pass "):
        wmkernels.selective_state_update(state, **x)
    assert torch.equal(state.reshape(3, 20, 5), before)


@every_target
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_an_input_in_the_memory_of_the_state_is_refused(target, name):
    x, state = inputs(target), torch.zeros(3, 20, 20, device=target.device)
    x |= {other: torch.zeros(3, 20, device=target.device) for other in "BC"}
    x["A"] = torch.zeros(20, 20, device=target.device)
    shared = state[0] if name == "A" else state[0, 3] if x[name].dim() == 1 else state[:, 3]
    with pytest.raises(ValueError, match=f"selective_state_update: {name} shares memory with state"):
        wmkernels.selective_state_update(state, **{**x, name: shared})
    assert (state == 0).all()


@every_target
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [torch.float32, None])
def test_16_bit_activations_beside_float32_projections_and_parameters(target, narrow, held):
    """As mamba_ssm's tests call it: x, dt, z and the state in 16 bits, the rest in float32."""
    x = inputs(target) | {name: torch.randn(3, 20, device=target.device).to(narrow) for name in ("x", "dt", "z")}
    state = torch.randn(3, 20, 5, device=target.device).to(held or narrow)
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in x.items()}
    expected, new_state = stepped(state.float(), wide)
    out = wmkernels.selective_state_update(state, **x)
    assert out.dtype == narrow and state.dtype == (held or narrow)
    torch.testing.assert_close(out, expected.to(narrow))
    torch.testing.assert_close(state, new_state.to(state.dtype))
