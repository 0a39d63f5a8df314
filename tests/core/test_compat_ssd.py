"""wmkernels.compat: Mamba-2's combined functions and the gated norms, beside naive float64 ones."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES
from test_compat import WIDE, near, normal

from wmkernels.compat.mamba_ssm.ops.triton import layernorm_gated
from wmkernels.compat.mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HEADS, HEADDIM, STATES, TIME = 4, 3, 5, 11


def naive_scan(x, dt, A, B, C, D, z, dt_bias, softplus, limit, initial, starts):
    """(out, states after each step) step by step, in float64; ``starts`` (batch, time) drops the state before."""
    x, dt, A, B, C, D, z, dt_bias, initial = (v.to(WIDE) for v in (x, dt, A, B, C, D, z, dt_bias, initial))
    B, C = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (B, C))
    step = dt + dt_bias
    step = (F.softplus(step) if softplus else step).clamp(*limit)
    D = D if D.dim() == 2 else D[:, None]
    state, outputs, states = initial, [], []
    for t in range(x.shape[1]):
        state = torch.where(starts[:, t, None, None, None], 0, state)
        entered = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = torch.exp(step[:, t] * A)[..., None, None] * state + entered
        outputs.append((state * C[:, t, :, None]).sum(-1) + D * x[:, t])
        states.append(state)
    return torch.stack(outputs, 1) * F.silu(z), states


def scan_arguments(dtype, other, batch=2, wide_D=False):
    def projection():
        return normal(batch, TIME, 2, STATES, dtype=other)

    return {
        "x": normal(batch, TIME, HEADS, HEADDIM, dtype=dtype),
        "dt": normal(batch, TIME, HEADS, dtype=other),
        "A": -normal(HEADS, dtype=other).abs(),
        "B": projection(),
        "C": projection(),
        "D": normal(HEADS, HEADDIM, dtype=other) if wide_D else normal(HEADS, dtype=other),
        "z": normal(batch, TIME, HEADS, HEADDIM, dtype=dtype),
        "dt_bias": normal(HEADS, dtype=other),
    }


def none_start(batch=2):
    return torch.zeros(batch, TIME, dtype=torch.bool)


@every_dtype
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize(("softplus", "limit"), [(True, (0.0, math.inf)), (False, (0.2, 0.7))])
def test_the_scan_takes_any_mixture_of_dtypes(dtype, other, softplus, limit):
    x = scan_arguments(dtype, other, wide_D=softplus)
    initial = normal(2, HEADS, HEADDIM, STATES, dtype=other)
    out, last = mamba_chunk_scan_combined(
        **x, chunk_size=4, initial_states=initial, dt_softplus=softplus, dt_limit=limit, return_final_states=True
    )
    expected, states = naive_scan(**x, softplus=softplus, limit=limit, initial=initial, starts=none_start())
    assert out.dtype == dtype and last.dtype == (WIDE if dtype == WIDE else torch.float32)
    near(out, expected, dtype)
    near(last, states[-1], last.dtype)


def test_a_new_index_starts_from_zeros_and_an_initial_state_belongs_to_sequence_0():
    x = scan_arguments(WIDE, WIDE)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 4, 4, 4, 4, 4, 4], [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3]], dtype=torch.int32)
    starts = none_start()
    starts[0, 3] = starts[0, 5] = starts[1, 0] = starts[1, 10] = True
    initial = normal(2, HEADS, HEADDIM, STATES)
    options = {"softplus": True, "limit": (0.0, math.inf)}
    expected, states = naive_scan(**x, **options, initial=initial, starts=starts)
    out, last = mamba_chunk_scan_combined(
        **x, chunk_size=4, seq_idx=seq_idx, initial_states=initial, dt_softplus=True, return_final_states=True
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, states[-1])


@pytest.mark.parametrize("end", [TIME, 9], ids=["whole", "padded"])
def test_states_of_packed_sequences(end):
    x = scan_arguments(WIDE, WIDE, batch=1)
    bounds = torch.tensor([0, 3, 3, end], dtype=torch.int32)
    initial, starts = normal(1, HEADS, HEADDIM, STATES), none_start(1)
    starts[0, 3] = True
    if end < TIME:
        starts[0, end] = True
    expected, states = naive_scan(**x, softplus=True, limit=(0.0, math.inf), initial=initial, starts=starts)
    options = {"cu_seqlens": bounds, "dt_softplus": True, "return_varlen_states": True, "initial_states": initial}
    out, last, varlen = mamba_chunk_scan_combined(**x, chunk_size=4, return_final_states=True, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, states[-1])
    zero = torch.zeros_like(states[0])
    torch.testing.assert_close(varlen, torch.cat([states[2], zero, states[end - 1]]))
    alone, same = mamba_chunk_scan_combined(**x, chunk_size=4, **options)
    assert torch.equal(alone, out) and torch.equal(same, varlen)


def test_packed_sequences_without_steps():
    x = {name: v[:1, :0] if name in ("x", "dt", "B", "C", "z") else v for name, v in scan_arguments(WIDE, WIDE).items()}
    initial = normal(1, HEADS, HEADDIM, STATES)
    out, last, varlen = mamba_chunk_scan_combined(
        **x,
        chunk_size=4,
        initial_states=initial,
        cu_seqlens=torch.tensor([0, 0]),
        return_final_states=True,
        return_varlen_states=True,
    )
    assert out.shape == (1, 0, HEADS, HEADDIM) and torch.equal(last, initial) and torch.equal(varlen, initial)


def test_the_scan_is_differentiable_through_its_states():
    x = {name: v.requires_grad_() for name, v in scan_arguments(WIDE, WIDE).items()}
    initial = normal(2, HEADS, HEADDIM, STATES).requires_grad_()
    leaves = [*x.values(), initial]
    out, last = mamba_chunk_scan_combined(
        **x, chunk_size=4, initial_states=initial, dt_softplus=True, return_final_states=True
    )
    naive, states = naive_scan(**x, softplus=True, limit=(0.0, math.inf), initial=initial, starts=none_start())
    found = torch.autograd.grad(out.square().sum() + last.square().sum(), leaves)
    expected = torch.autograd.grad(naive.square().sum() + states[-1].square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# mamba_split_conv1d_scan_combined


def split_arguments(beside, wide_D, norm, projected):
    channels, mixed = HEADS * HEADDIM, HEADS * HEADDIM + 2 * 2 * STATES
    return {
        "zxbcdt": normal(2, TIME, 2 * beside + channels + mixed + HEADS),
        "conv1d_weight": normal(mixed, 4),
        "conv1d_bias": normal(mixed),
        "dt_bias": normal(HEADS),
        "A": -normal(HEADS).abs(),
        "D": normal(HEADS, HEADDIM) if wide_D else normal(HEADS),
        "initial_states": normal(2, HEADS, HEADDIM, STATES),
        "rmsnorm_weight": normal(channels) if norm else None,
        "outproj_weight": normal(7, beside + channels) if projected else None,
        "outproj_bias": normal(7) if projected else None,
    }


def naive_split(x, beside, norm_before_gate, activation, starts, eps=1e-6):
    """(out, last state); one sequence at a time in the convolution."""
    channels, size = HEADS * HEADDIM, 2 * STATES
    sizes = [beside, beside, channels, channels + 2 * size, HEADS]
    gate, values, z, mixed, dt = x["zxbcdt"].split(sizes, -1)
    rows = []
    for row, new in zip(mixed, starts, strict=True):
        cuts = [0, *new.nonzero().flatten().tolist(), TIME]
        parts = [row[a:b].T[None] for a, b in itertools.pairwise(cuts) if a < b]
        weight, bias = x["conv1d_weight"][:, None], x["conv1d_bias"]
        rows.append(torch.cat([F.conv1d(F.pad(p, (3, 0)), weight, bias, groups=len(bias))[0].T for p in parts]))
    mixed = torch.stack(rows)
    mixed = F.silu(mixed) if activation else mixed
    u, B, C = mixed.split([channels, size, size], -1)
    heads = (HEADS, HEADDIM)
    norm = x["rmsnorm_weight"]
    gates = z.unflatten(-1, heads)
    open_gate = torch.full_like(gates, 40.0)  # silu(40) = 40 in float64
    arguments = (u.unflatten(-1, heads), dt, x["A"], B.unflatten(-1, (2, STATES)), C.unflatten(-1, (2, STATES)), x["D"])
    y, states = naive_scan(
        *arguments,
        gates if norm is None else open_gate,
        x["dt_bias"],
        True,
        (0.0, math.inf),
        x["initial_states"],
        starts,
    )
    y = y.flatten(-2)
    if norm is not None:
        y = y / F.silu(open_gate).flatten(-2)
        y = y if norm_before_gate else y * F.silu(z)
        grouped = y.unflatten(-1, (2, channels // 2))
        y = (grouped / (grouped.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * norm
        y = y * F.silu(z) if norm_before_gate else y
    y = torch.cat([F.silu(gate) * values, y], -1)
    if x["outproj_weight"] is not None:
        y = y @ x["outproj_weight"].T + x["outproj_bias"]
    return y, states[-1]


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    ("beside", "wide_D", "norm", "projected", "activation", "packed"),
    [
        (0, False, True, True, "silu", False),
        (3, True, True, True, "swish", True),
        (3, False, False, False, None, False),
        (0, True, False, True, "silu", True),
    ],
)
def test_the_block_after_its_input_projection(beside, wide_D, norm, projected, activation, packed, norm_before_gate):
    x = split_arguments(beside, wide_D, norm, projected)
    seq_idx = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [5, 6]], dtype=torch.int32)
    starts = none_start()
    if packed:
        starts[0, 4] = starts[1, 9] = starts[1, 10] = True
    leaves = [v.requires_grad_() for v in x.values() if v is not None]
    out, last = mamba_split_conv1d_scan_combined(
        **x,
        chunk_size=256,
        seq_idx=seq_idx if packed else None,
        return_final_states=True,
        activation=activation,
        headdim=None if wide_D else HEADDIM,
        ngroups=2,
        norm_before_gate=norm_before_gate,
    )
    expected, state = naive_split(x, beside, norm_before_gate, activation, starts)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, state)
    found = torch.autograd.grad(out.square().sum() + last.sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum() + state.sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# norms with a gate


@every_dtype
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_a_gated_norm(dtype, norm_before_gate, group_size, is_rms_norm):
    x, z, weight, bias = normal(2, 3, 12, dtype=dtype), normal(2, 3, 12, dtype=dtype), normal(12), normal(12)
    wide, gate = x.to(WIDE), F.silu(z.to(WIDE))
    values = wide if norm_before_gate else wide * gate
    grouped = values.unflatten(-1, (-1, group_size or 12))
    grouped = grouped if is_rms_norm else grouped - grouped.mean(-1, keepdim=True)
    normed = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2) * weight + bias
    out = layernorm_gated.layernorm_fn(x, weight, bias, z, 1e-6, group_size, norm_before_gate, is_rms_norm)
    assert out.dtype == dtype
    near(out, normed * gate if norm_before_gate else normed, dtype)


def test_modules_of_gated_norms():
    x, z = normal(2, 12), normal(2, 12)
    layer = layernorm_gated.LayerNorm(12, eps=1e-3, group_size=4, dtype=WIDE)
    grouped = F.layer_norm(x.view(2, 3, 4), (4,), eps=1e-3).view(2, 12)
    torch.testing.assert_close(layer(x, z), grouped * F.silu(z))
    rms = layernorm_gated.RMSNorm(12, norm_before_gate=False, dtype=WIDE)
    torch.testing.assert_close(rms(x, z), F.rms_norm(x * F.silu(z), (12,), eps=1e-5))
    torch.testing.assert_close(rms(x), F.rms_norm(x, (12,), eps=1e-5))
    assert set(layer.state_dict()) == {"weight", "bias"} and set(rms.state_dict()) == {"weight"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: mamba_chunk_scan_combined(**x, chunk_size=0),
            "mamba_chunk_scan_combined: chunk_size is 0, expected 1",
        ),
        (
            lambda x: mamba_chunk_scan_combined(**x, chunk_size=4, state_dtype=torch.int32),
            "state_dtype is torch.int32, expected a floating dtype",
        ),
        (
            lambda x: mamba_chunk_scan_combined(**x, chunk_size=4, return_varlen_states=True),
            "cu_seqlens is None, expected bounds",
        ),
        (
            lambda x: mamba_chunk_scan_combined(**x, chunk_size=4, seq_idx=torch.zeros(2, 3, dtype=torch.int32)),
            r"seq_idx has shape \(2, 3\), expected \(batch=2, time=11\)",
        ),
        (
            lambda x: mamba_split_conv1d_scan_combined(**split_arguments(0, False, True, True), chunk_size=4),
            "headdim is None, expected the channels per head",
        ),
        (
            lambda x: mamba_split_conv1d_scan_combined(**split_arguments(0, True, True, True), chunk_size=4, ngroups=3),
            "ngroups is 3, expected a divisor of the 4 heads",
        ),
        (
            lambda x: layernorm_gated.layernorm_fn(x["x"], x["D"], None, group_size=2),
            "group_size is 2, expected a divisor of 3 features",
        ),
    ],
)
def test_a_bad_call_gets_one_clear_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(scan_arguments(torch.float32, torch.float32))
    assert "\n" not in str(caught.value)
