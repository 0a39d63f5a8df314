"""wmkernels.compat: install, and the functions of mamba_ssm and causal_conv1d.

Expected values come from loops over single steps in float64 (``published_*``), written from the definitions.
"""

import doctest
import itertools
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES
from torch.autograd import gradcheck

from wmkernels import compat
from wmkernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from wmkernels.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from wmkernels.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from wmkernels.compat.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from wmkernels.compat.mamba_ssm.ops.triton import selective_state_update as update_module
from wmkernels.compat.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)

WIDE = torch.float64
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SMALL = {torch.float32: (2e-3, 2e-3), torch.bfloat16: (3e-2, 3e-2), torch.float16: (4e-3, 4e-3)}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, dtype=WIDE):
    return torch.randn(shape, dtype=WIDE).to(dtype)


def near(actual, expected, dtype):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.to(WIDE), expected.to(WIDE), rtol=0, atol=TOLERANCE[dtype] * scale)


def published_step(state, x, dt, A, B, C, D, z, dt_bias):
    """(out, state) of one step in float64, heads as (batch, heads, headdim, state), B and C (batch, groups, state)."""
    state, x, dt, A, B, C, D, z, dt_bias = (v.to(WIDE) for v in (state, x, dt, A, B, C, D, z, dt_bias))
    B, C = (v.repeat_interleave(x.shape[1] // v.shape[1], 1)[:, :, None] for v in (B, C))
    step = F.softplus(dt + dt_bias)[..., None]
    state = torch.exp(step * A) * state + step * B * x[..., None]
    return ((state * C).sum(-1) + D * x) * F.silu(z), state


# install


@pytest.fixture
def clean_modules(monkeypatch):
    """As if none of the packages was imported; what a test installs is gone after it."""
    before = dict(sys.modules)
    for name in before:
        if name.split(".")[0] in compat.PACKAGES:
            del sys.modules[name]
    yield
    for name in list(sys.modules):
        if name.split(".")[0] in compat.PACKAGES:
            del sys.modules[name]
    sys.modules.update(before)


def test_installed_names_lead_to_these_modules(clean_modules):
    assert compat.install() == compat.PACKAGES == compat.install()
    from causal_conv1d import causal_conv1d_fn as found
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update as step

    assert found is causal_conv1d_fn and step is selective_state_update
    assert all(sys.modules[name].__spec__ is not None for name in compat.PACKAGES)
    versions = [sys.modules[name].__version__.partition("+") for name in compat.PACKAGES]
    assert [(release, local) for release, _, local in versions] == [
        ("0.3.1", "wmkernels"),
        ("1.6.1", "wmkernels"),
        ("2.3.2.post1", "wmkernels"),
    ]
    with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.ops\.triton\.ssd_bmm"):
        import mamba_ssm.ops.triton.ssd_bmm  # noqa: F401


def test_a_package_that_is_there_stays(clean_modules, monkeypatch, tmp_path):
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text("causal_conv1d_fn = 'the other one'\n")
    monkeypatch.syspath_prepend(tmp_path)
    imported = sys.modules["accelerated_scan"] = types.ModuleType("accelerated_scan")  # without a spec
    assert compat.install() == ("mamba_ssm",)
    import causal_conv1d

    assert causal_conv1d.causal_conv1d_fn == "the other one"
    assert sys.modules["accelerated_scan"] is imported
    assert not compat.is_served("causal_conv1d") and compat.is_served("mamba_ssm")


def test_one_package_alone(clean_modules):
    assert compat.install("causal_conv1d") == ("causal_conv1d",)
    assert compat.is_served("causal_conv1d") and "mamba_ssm" not in sys.modules
    with pytest.raises(ValueError, match="no package 'mamba' here, expected some of accelerated_scan"):
        compat.install("mamba")


def test_wmkernels_does_not_import_compat():
    folder = Path(compat.__file__).parents[1]
    files = [
        file for file in folder.rglob("*.py") if file.relative_to(folder).parts[0] not in ("compat", "integrations")
    ]
    imports = re.compile(r"^\s*(from|import) wmkernels\.?\s?(import )?(compat|integrations)", re.MULTILINE)
    assert len(files) > 100 and [file.name for file in files if imports.search(file.read_text())] == []


# selective scan


def scan_arguments(dtype, other, time=7):
    """u and z in ``dtype``, the rest in ``other``."""
    return {
        "u": normal(2, 8, time, dtype=dtype),
        "delta": normal(2, 8, time, dtype=other),
        "A": -normal(8, 3, dtype=other).abs(),
        "B": normal(2, 2, 3, time, dtype=other),
        "C": normal(2, 2, 3, time, dtype=other),
        "D": normal(8, dtype=other),
        "z": normal(2, 8, time, dtype=dtype),
        "delta_bias": normal(8, dtype=other),
        "delta_softplus": True,
        "return_last_state": True,
    }


@every_dtype
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_a_scan_takes_any_mixture_of_dtypes(dtype, other):
    x = scan_arguments(dtype, other)
    wide = {name: v.to(WIDE) if isinstance(v, torch.Tensor) else v for name, v in x.items()}
    for function in (selective_scan_fn, selective_scan_ref):
        out, state = function(**x)
        assert out.dtype == dtype and state.dtype == (WIDE if dtype == WIDE else torch.float32)
        expected, last = selective_scan_ref(**wide)
        near(out, expected, dtype)
        near(state, last, torch.float32 if dtype in SMALL else WIDE)


def test_a_scan_by_position_is_a_loop_of_steps():
    x = scan_arguments(WIDE, WIDE)
    out = selective_scan_fn(*list(x.values())[:9])
    state = torch.zeros(2, 8, 1, 3, dtype=WIDE)
    A, D, bias = x["A"][:, None], x["D"][:, None], x["delta_bias"][:, None]
    for t in range(7):
        u, delta, z = (x[name][..., t, None] for name in ("u", "delta", "z"))
        expected, state = published_step(state, u, delta, A, x["B"][..., t], x["C"][..., t], D, z, bias)
        torch.testing.assert_close(out[..., t], expected[..., 0])


def test_a_complex_A_is_refused():
    x = scan_arguments(torch.float32, torch.float32)
    with pytest.raises(TypeError, match="A is complex"):
        selective_scan_fn(**x | {"A": x["A"].to(torch.complex64)})


# mamba_inner_fn


def inner_arguments(dtype, variable_B, variable_C, norms):
    channels, rank, states, features = 6, 2, 3, 5
    return {
        "xz": normal(2, 2 * channels, 9, dtype=dtype),
        "conv1d_weight": normal(channels, 1, 4, dtype=dtype),
        "conv1d_bias": normal(channels, dtype=dtype),
        "x_proj_weight": normal(rank + states * (variable_B + variable_C), channels, dtype=dtype),
        "delta_proj_weight": normal(channels, rank, dtype=dtype),
        "out_proj_weight": normal(features, channels, dtype=dtype),
        "out_proj_bias": normal(features, dtype=dtype),
        "A": -normal(channels, states, dtype=dtype).abs(),
        "B": None if variable_B else normal(channels, states, dtype=dtype),
        "C": None if variable_C else normal(2, 1, states, 9, dtype=dtype),
        "D": normal(channels, dtype=dtype),
        "delta_bias": normal(channels, dtype=dtype),
        "B_proj_bias": normal(states, dtype=dtype) if variable_B else None,
        "C_proj_bias": normal(states, dtype=dtype) if variable_C else None,
        **({"b_rms_weight": normal(states), "c_rms_weight": normal(states)} if norms else {}),
        **({"dt_rms_weight": normal(channels), "b_c_dt_rms_eps": 0.1} if norms else {}),
    }


def published_inner(x, eps=0.1):
    """float64."""

    def norm(value, name):  # features last
        weight = x.get(name)
        return value if weight is None else value * weight / (value.square().mean(-1, keepdim=True) + eps).sqrt()

    u, z = x["xz"].chunk(2, 1)
    kernel = x["conv1d_weight"]
    u = F.silu(F.conv1d(F.pad(u, (3, 0)), kernel, x["conv1d_bias"], groups=len(kernel)))
    rank, states = x["delta_proj_weight"].shape[1], x["A"].shape[1]
    projected = torch.einsum("bct,pc->btp", u, x["x_proj_weight"])
    delta = norm(projected[..., :rank] @ x["delta_proj_weight"].T, "dt_rms_weight")
    B, C = x["B"], x["C"]
    if B is None:
        B = norm(projected[..., rank : rank + states] + x["B_proj_bias"], "b_rms_weight").mT
    if C is None:
        C = norm(projected[..., -states:] + x["C_proj_bias"], "c_rms_weight").mT
    y = selective_scan_ref(u, delta.mT, x["A"], B, C, x["D"], z, x["delta_bias"], True)
    return y.mT @ x["out_proj_weight"].T + x["out_proj_bias"]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("variable_C", [False, True])
@pytest.mark.parametrize("variable_B", [False, True])
def test_the_block_between_its_projections(variable_B, variable_C, norms):
    x = inner_arguments(WIDE, variable_B, variable_C, norms and variable_B and variable_C)
    expected = published_inner(x)
    torch.testing.assert_close(mamba_inner_fn(**x), expected)
    if not norms:
        torch.testing.assert_close(mamba_inner_ref(**x), expected)
    narrow = {name: v.float() if isinstance(v, torch.Tensor) else v for name, v in x.items()}
    near(mamba_inner_fn(**narrow, checkpoint_lvl=0), expected, torch.float32)


def test_the_block_has_the_gradients_of_the_definition():
    x = inner_arguments(WIDE, True, True, True)
    x = {name: v.requires_grad_() if isinstance(v, torch.Tensor) else v for name, v in x.items()}
    leaves = [v for v in x.values() if isinstance(v, torch.Tensor)]
    found, expected = (
        torch.autograd.grad(f(x).square().sum(), leaves) for f in (lambda x: mamba_inner_fn(**x), published_inner)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_block_refuses_another_checkpoint_level():
    with pytest.raises(ValueError, match="checkpoint_lvl is 2, expected 0 or 1"):
        mamba_inner_fn(**inner_arguments(WIDE, True, True, False), checkpoint_lvl=2)


# selective_state_update


def step_arguments(dtype, other, heads, tied, batch=3):
    """As the published test mixes dtypes: x, dt and z in ``dtype``, the rest in ``other``."""
    shape = (4, 6) if heads else (24,)
    dt, A, D, bias = (normal(*s) for s in ((batch, *shape), (*shape, 5), shape, shape))
    dt, A, D, bias = dt.to(dtype), -A.abs().to(other), D.to(other), bias.to(other)
    if tied:
        dt = dt[..., :1].expand(batch, *shape)
        A, bias = A[..., :1, :1].expand(*shape, 5), bias[..., :1].expand(shape)
    groups = (2, 5) if heads else (5,)
    return {
        "x": normal(batch, *shape, dtype=dtype),
        "dt": dt,
        "A": A,
        "B": normal(batch, *groups, dtype=other),
        "C": normal(batch, *groups, dtype=other),
        "D": D,
        "z": normal(batch, *shape, dtype=dtype),
        "dt_bias": bias,
    }


def expected_step(state, x):
    if state.dim() == 3:
        x = {name: v.unsqueeze(1 if name in ("B", "C", "A", "D", "dt_bias") else 2) for name, v in x.items()}
        out, after = published_step(state.unsqueeze(2), **x)
        return out.squeeze(2), after.squeeze(2)
    return published_step(state, **x)


every_form = pytest.mark.parametrize(("heads", "tied"), [(False, False), (True, False), (True, True)])


@every_form
@every_dtype
@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_updates_its_state_in_place(heads, tied, dtype, recorded):
    x = step_arguments(dtype, WIDE if dtype == WIDE else torch.float32, heads, tied)
    assert not tied or x["A"].stride()[1:] == (0, 0)
    state = normal(3, *x["x"].shape[1:], 5, dtype=dtype)
    expected, after = expected_step(state, x)
    pointer = state.data_ptr()
    x["D"] = x["D"].requires_grad_(recorded)
    out = selective_state_update(state, **x, dt_softplus=True)
    assert out.requires_grad == recorded and out.dtype == dtype == state.dtype
    assert state.data_ptr() == pointer
    near(out, expected, dtype)
    near(state, after, dtype)


@every_form
@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_of_some_rows_of_a_cache(heads, tied, recorded):
    x = step_arguments(WIDE, WIDE, heads, tied)
    cache = normal(7, *x["x"].shape[1:], 5)
    before, indices = cache.clone(), torch.tensor([5, -1, 2], dtype=torch.int32)
    expected, after = expected_step(cache[[5, 0, 2]], x)
    x["D"].requires_grad_(recorded)
    out = selective_state_update(cache, **x, dt_softplus=True, state_batch_indices=indices)
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]])
    assert (out[1] == 0).all()
    torch.testing.assert_close(cache[[5, 2]], after[[0, 2]])
    assert torch.equal(cache[[0, 1, 3, 4, 6]], before[[0, 1, 3, 4, 6]])


@every_form
def test_steps_are_differentiable_through_the_state_that_they_update(heads, tied):
    x = step_arguments(WIDE, WIDE, heads, tied, batch=1)
    names = ("x", "B", "C", "D", "z")
    initial = normal(1, *x["x"].shape[1:], 5)

    def two_steps(initial, *given):
        state = initial.clone()
        changed = x | dict(zip(names, given, strict=True))
        first = selective_state_update(state, **changed, dt_softplus=True)
        second = selective_state_update(state, **changed, dt_softplus=True)
        return first, second, state.clone()

    leaves = [v for v in (initial, *(x[name] for name in names))]
    assert gradcheck(two_steps, [v.clone().requires_grad_() for v in leaves], fast_mode=True)


def test_a_tied_step_does_not_copy_what_was_expanded(monkeypatch):
    x, seen = step_arguments(torch.float32, torch.float32, True, True), []
    original = update_module.ssd_step
    monkeypatch.setattr(update_module, "ssd_step", lambda *a, **k: seen.append(a[3].shape) or original(*a, **k))
    selective_state_update(torch.zeros(3, 4, 6, 5), **x, dt_softplus=True)
    assert seen == [(4,)]


def test_a_tied_step_does_not_cut_a_negative_step_size():
    x = step_arguments(WIDE, WIDE, True, True)
    x["dt"] = -x["dt"][..., :1].abs().expand(3, 4, 6)
    tied, loose = torch.ones(2, 3, 4, 6, 5, dtype=WIDE)
    out = selective_state_update(tied, **x)
    untied = x | {name: x[name].clone(memory_format=torch.contiguous_format) for name in ("dt", "A", "dt_bias")}
    torch.testing.assert_close(selective_state_update(loose, **untied), out)
    torch.testing.assert_close(loose, tied)


def test_the_reference_of_a_step():
    x = step_arguments(WIDE, WIDE, True, False)
    state = normal(3, 4, 6, 5)
    expected, after = expected_step(state, x)
    torch.testing.assert_close(selective_state_update_ref(state, **x, dt_softplus=True), expected)
    torch.testing.assert_close(state, after)


# causal_conv1d


def published_convolution(x, weight, bias, activation, before=None):
    """float64."""
    x, weight, bias = (v.to(WIDE) for v in (x, weight, bias))
    past = torch.zeros(*x.shape[:2], weight.shape[1] - 1, dtype=WIDE) if before is None else before.to(WIDE)
    y = F.conv1d(torch.cat([past, x], -1), weight[:, None], bias, groups=len(weight))
    return F.silu(y) if activation else y


def convolution(dtype, time=9, width=4, channel_last=False):
    x = normal(2, time, 5, dtype=dtype).mT if channel_last else normal(2, 5, time, dtype=dtype)
    other = WIDE if dtype == WIDE else torch.float32
    return x, normal(5, width, dtype=other), normal(5, dtype=other)


@every_dtype
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_a_convolution_with_states(dtype, channel_last, activation):
    x, weight, bias = convolution(dtype, channel_last=channel_last)
    before, held = normal(2, 5, 3, dtype=dtype), torch.zeros(2, 5, 3, dtype=dtype)
    expected = published_convolution(x, weight, bias, activation, before)
    for function in (causal_conv1d_fn, causal_conv1d_ref):
        options = {"initial_states": before, "return_final_states": True, "activation": activation}
        out, last = function(x, weight, bias, **options)
        assert out.dtype == last.dtype == dtype
        near(out, expected, dtype)
        assert torch.equal(last, x[..., -3:])
        _, same = function(x, weight, bias, final_states_out=held, **options)
        assert same is held and torch.equal(held, last)


@every_dtype
def test_sequences_by_index_are_convolved_one_by_one(dtype):
    x, weight, bias = convolution(dtype)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 3, -1, -1], [4, 5, 5, 5, 5, 5, 5, 5, 9]], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    for row, bounds in enumerate([(0, 2, 5, 6, 7), (0, 1, 8, 9)]):
        for begin, end in itertools.pairwise(bounds):
            expected = published_convolution(x[row, None, :, begin:end], weight, bias, True)[0]
            near(out[row, :, begin:end], expected, dtype)
    assert (out[0, :, 7:] == 0).all()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("length", [3, 4, 6])
@pytest.mark.parametrize("steps", [None, 1, 2, 5, 8])
@pytest.mark.parametrize("ring", [False, True])
def test_an_update_continues_the_sequence(recorded, length, steps, ring):
    x, weight, bias = convolution(WIDE, time=20)
    history, given = x[..., :10], x[..., 10 : 10 + (steps or 1)]
    state = history[..., -length:].clone()
    lengths = torch.tensor([10, 10 + 2 * length], dtype=torch.int32) if ring else None
    if ring:  # the input at time t lies at t % length
        state = state.roll(10 % length, -1)
    pointer = state.data_ptr()
    out = causal_conv1d_update(
        given[..., 0] if steps is None else given,
        state,
        weight.requires_grad_(recorded),
        bias,
        "silu",
        lengths,
    )
    expected = published_convolution(given, weight.detach(), bias, True, history[..., -3:])
    torch.testing.assert_close(out.detach(), expected[..., 0] if steps is None else expected)
    after = x[..., : 10 + given.shape[-1]][..., -length:]
    assert state.data_ptr() == pointer and out.requires_grad == recorded
    assert torch.equal(state.detach(), after.roll((10 + given.shape[-1]) % length, -1) if ring else after)
    if ring and steps is not None and not recorded:
        again = history[..., -length:].roll(10 % length, -1).clone()
        torch.testing.assert_close(causal_conv1d_update_ref(given, again, weight, bias, "silu", lengths), out)
        assert torch.equal(again, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_update_takes_a_state_of_another_dtype(dtype, held):
    x, weight, bias = convolution(dtype, time=1)
    state = normal(2, 5, 4, dtype=held)
    expected = published_convolution(x, weight, bias, None, state[..., 1:])
    after = torch.cat([state[..., 1:], x.to(held)], -1)
    near(causal_conv1d_update(x, state, weight, bias), expected, dtype)
    assert torch.equal(state, after)


@pytest.mark.parametrize("recorded", [False, True])
def test_an_update_of_some_rows_of_a_cache(recorded):
    x, weight, bias = convolution(WIDE, time=1)
    cache = normal(6, 5, 4)
    before = cache.clone()
    indices = torch.tensor([4, -1], dtype=torch.int32)
    out = causal_conv1d_update(
        x[..., 0], cache, weight.requires_grad_(recorded), bias, conv_state_indices=indices
    ).detach()
    expected = published_convolution(x[:1], weight.detach(), bias, None, before[4:5, :, 1:])[0, :, 0]
    torch.testing.assert_close(out[0], expected)
    assert (out[1] == 0).all() and torch.equal(cache[[0, 1, 2, 3, 5]], before[[0, 1, 2, 3, 5]])
    assert torch.equal(cache[4].detach(), torch.cat([before[4, :, 1:], x[0]], -1))


def test_updates_are_differentiable_through_the_state_that_they_update():
    x, weight, bias = (v.requires_grad_() for v in convolution(WIDE, time=3))
    before = normal(2, 5, 4).requires_grad_()

    def updated(x, weight, bias, before):
        state = before.clone()
        outputs = [causal_conv1d_update(x[..., t], state, weight, bias, "silu") for t in range(3)]
        return torch.stack(outputs, -1)

    def whole(x, weight, bias, before):
        return published_convolution(x, weight, bias, True, before[..., 1:])

    given = (x, weight, bias, before)
    found, expected = (torch.autograd.grad(f(*given).square().sum(), given) for f in (updated, whole))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_states_of_packed_sequences():
    x = normal(9, 5)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 8], dtype=torch.int32), 3)
    assert states.shape == (3, 5, 3) and states.stride(1) == 1
    expected = torch.zeros(3, 5, 3, dtype=WIDE)
    expected[0, :, 1:], expected[2] = x[:2].T, x[5:8].T
    assert torch.equal(states, expected)


SEQ = torch.zeros(2, 9, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, w, b: causal_conv1d_fn(x, w, b, SEQ, initial_states=x[..., :3]),
            "causal_conv1d_fn: initial_states is given with seq_idx, expected one of the two",
        ),
        (
            lambda x, w, b: causal_conv1d_fn(x, w, b, SEQ, return_final_states=True),
            "return_final_states is given with seq_idx",
        ),
        (
            lambda x, w, b: causal_conv1d_fn(x, w, b, SEQ, final_states_out=x[..., :3]),
            "final_states_out is given with seq_idx",
        ),
        (
            lambda x, w, b: causal_conv1d_fn(x, w, b, SEQ[:, :3]),
            r"seq_idx has shape \(2, 3\), expected \(batch=2, time=9\)",
        ),
        (lambda x, w, b: causal_conv1d_fn(x, w, b, SEQ.float()), "seq_idx has dtype float32, expected int32"),
        (lambda x, w, b: causal_conv1d_fn(x, w, b, activation="gelu"), "activation is 'gelu', expected \"silu\""),
        (
            lambda x, w, b: causal_conv1d_fn(x, w, b, return_final_states=True, final_states_out=x),
            r"final_states_out has shape \(2, 5, 9\), expected \(batch=2, channels=5, width - 1=3\)",
        ),
        (
            lambda x, w, b: causal_conv1d_update(x, torch.zeros(2, 5, 2), w, b),
            r"causal_conv1d_update: conv_state has shape \(2, 5, 2\), "
            r"expected \(batch=2, channels=5, at least width - 1 = 3\)",
        ),
        (
            lambda x, w, b: causal_conv1d_update(x, torch.zeros(1, 5, 4).expand(2, 5, 4), w, b),
            "conv_state .* share memory",
        ),
        (
            lambda x, w, b: causal_conv1d_update(x, torch.zeros(2, 5, 4), w, b, None, SEQ[0]),
            r"cache_seqlens has shape \(9,\), expected \(batch=2\)",
        ),
        (
            lambda x, w, b: causal_conv1d_varlen_states(x, SEQ[0], 3),
            r"causal_conv1d_varlen_states: x has shape \(2, 5, 9\), expected \(time, channels\)",
        ),
    ],
)
def test_a_bad_call_gets_one_clear_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(*convolution(torch.float32))
    assert "\n" not in str(caught.value)


def test_the_page_runs(clean_modules):
    page = Path(__file__).parents[2] / "docs" / "compat.md"
    assert doctest.testfile(str(page), module_relative=False, raise_on_error=True).attempted > 10
