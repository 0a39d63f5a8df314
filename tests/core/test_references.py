import math
from itertools import pairwise

import pytest
import torch
from backends import on_every_target
from delta_rule_problems import delta_rules, small_delta_rule
from hypothesis import given
from hypothesis import strategies as st
from problems import linear_scans, scans, steps

import wmkernels


def number(x, *index):
    return x[index].item()


def scan_by_numbers(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, bounds):
    """Channel-first, float64."""
    batch, channels, time = u.shape
    states = A.shape[1]

    def projection(x, b, c, n, t):
        if x.dim() == 2:
            return number(x, c, n)
        if x.dim() == 3:
            return number(x, b, n, t)
        return number(x, b, c // (channels // x.shape[1]), n, t)

    if bounds is None:
        sequences = [(b, b, 0, time) for b in range(batch)]
    else:
        sequences = [(0, s, bounds[s], bounds[s + 1]) for s in range(len(bounds) - 1)]
    out = torch.zeros(u.shape, dtype=torch.float64)
    last = torch.zeros((len(sequences), channels, states), dtype=torch.float64)
    for b, s, start, end in sequences:
        for c in range(channels):
            h = [0.0 if initial_state is None else number(initial_state, s, c, n) for n in range(states)]
            for t in range(start, end):
                step = number(delta, b, c, t) + (0.0 if delta_bias is None else number(delta_bias, c))
                if delta_softplus:
                    step = math.log1p(math.exp(step))
                x = number(u, b, c, t)
                y = 0.0 if D is None else number(D, c) * x
                for n in range(states):
                    kept = 0.0 if reset is not None and reset[b, t] else math.exp(step * number(A, c, n)) * h[n]
                    h[n] = kept + step * x * projection(B, b, c, n, t)
                    y += projection(C, b, c, n, t) * h[n]
                if z is not None:
                    gate = number(z, b, c, t)
                    y *= gate / (1 + math.exp(-gate))
                out[b, c, t] = y
            last[s, c] = torch.tensor(h, dtype=torch.float64)
    return out, last


@on_every_target("selective_scan")
@given(data=st.data())
def test_selective_scan_by_single_numbers(target, data):
    problem = data.draw(
        scans([torch.float64], target.device, max_time=6, states=[1, 2, 5], max_channels=6, layouts=["contiguous"])
    )
    out, last = problem.call(target.backend)
    x = problem.tensors
    if problem.options["channel_last"]:
        x = {k: v.transpose(1, 2) if k in ("u", "delta", "z") and v is not None else v for k, v in x.items()}
        x |= {k: x[k].transpose(-1, -2) if x[k].dim() > 2 else x[k] for k in ("B", "C")}
        out = out.transpose(1, 2)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    bounds = None if x["cu_seqlens"] is None else x["cu_seqlens"].tolist()
    softplus = problem.options["delta_softplus"]
    expected = scan_by_numbers(*(x[n] for n in names), softplus, x["initial_state"], x["reset"], bounds)
    torch.testing.assert_close(out.cpu(), expected[0])
    torch.testing.assert_close(last.cpu(), expected[1])


@on_every_target("selective_step")
@given(data=st.data())
def test_selective_step_is_a_scan_over_one_step(target, data):
    problem = data.draw(steps([torch.float64], target.device, states=[1, 3, 16]))
    x = dict(problem.tensors)
    out, state = problem.call(target.backend)
    timed = {k: x[k] if x[k] is None else x[k].unsqueeze(-1) for k in ("u", "delta", "B", "C", "z", "reset")}
    rest = {k: x[k] for k in ("A", "D", "delta_bias")}
    expected = wmkernels.selective_scan(
        **timed,
        **rest,
        **problem.options,
        initial_state=x["state"],
        return_last_state=True,
        backend="reference",
    )
    torch.testing.assert_close(out, expected[0].squeeze(-1))
    torch.testing.assert_close(state, expected[1])


@on_every_target("linear_scan")
@given(data=st.data())
def test_linear_scan_by_single_numbers(target, data):
    problem = data.draw(linear_scans([torch.float64], target.device, max_time=8))
    out, last = problem.call(target.backend)
    gates, tokens = problem.tensors["gates"], problem.tensors["tokens"]
    if problem.options["channel_last"]:
        gates, tokens, out = (x.movedim(1, -1) for x in (gates, tokens, out))
    batch, time = gates.shape[0], gates.shape[-1]
    reset, reverse = problem.tensors["reset"], problem.options["reverse"]
    first = problem.tensors["initial_state"]
    gates, tokens = gates.reshape(batch, -1, time), tokens.reshape(batch, -1, time)
    expected = torch.zeros(gates.shape, dtype=torch.float64)
    for b in range(batch):
        for c in range(gates.shape[1]):
            h = 0.0 if first is None else first.reshape(batch, -1)[b, c].item()
            for t in reversed(range(time)) if reverse else range(time):
                forgets = reset is not None and reset[b, t].item()
                h = (0.0 if forgets and not reverse else gates[b, c, t].item() * h) + tokens[b, c, t].item()
                expected[b, c, t] = h
                h = 0.0 if forgets and reverse else h
            torch.testing.assert_close(last.reshape(batch, -1)[b, c].item(), h)
    torch.testing.assert_close(out.reshape(batch, -1, time).cpu(), expected)


@on_every_target("selective_scan")
def test_code_written_for_mamba_ssm_runs_unchanged(target):
    u, delta, z = (torch.randn(2, 6, 9, device=target.device) for _ in range(3))
    A, D, bias = -torch.rand(6, 4), torch.randn(6), torch.randn(6)
    A, D, bias = (x.to(target.device) for x in (A, D, bias))
    B, C = (torch.randn(2, 4, 9, device=target.device) for _ in range(2))
    out, last_state = wmkernels.selective_scan(u, delta, A, B, C, D, z, bias, True, True)
    assert out.shape == u.shape
    assert last_state.shape == (2, 6, 4)
    only = wmkernels.selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)
    torch.testing.assert_close(only, out, rtol=0, atol=0)
    state = torch.zeros(2, 6, 4, device=target.device)
    outs = [
        wmkernels.selective_state_update(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True
        )
        for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(outs, -1), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last_state, rtol=1e-5, atol=1e-5)


@on_every_target("gated_delta_rule")
@given(data=st.data())
def test_gated_delta_rule_by_single_numbers(target, data):
    problem = data.draw(delta_rules([torch.float64], target.device, max_time=6, sizes=[1, 2, 3]))
    out, last = problem.call(target.backend)
    x = {k: v for k, v in problem.tensors.items() if v is not None}
    if problem.options["channel_last"]:
        x |= {k: x[k].movedim(1, -1) for k in ("q", "k", "v", "gate", "beta")}
        out = out.movedim(1, -1)
    (batch, heads, d_k, time), (value_heads, d_v) = x["q"].shape, x["v"].shape[1:3]
    scale = problem.options["scale"] or 1 / math.sqrt(d_k)
    bounds = x["cu_seqlens"].tolist() if "cu_seqlens" in x else None
    rows = [(b, 0, time) for b in range(batch)] if bounds is None else [(0, *row) for row in pairwise(bounds)]
    for index, (b, start, end) in enumerate(rows):
        for h in range(value_heads):
            of = h // (value_heads // heads)
            S = x["initial_state"][index, h].tolist() if "initial_state" in x else [[0.0] * d_v for _ in range(d_k)]
            for t in range(start, end):
                q, k, v = (x[name][b, head, :, t].tolist() for name, head in (("q", of), ("k", of), ("v", h)))
                kept = 0.0 if "reset" in x and x["reset"][b, t] else math.exp(x["gate"][b, h, t].item())
                recalled = [sum(kept * S[i][j] * k[i] for i in range(d_k)) for j in range(d_v)]
                u = [x["beta"][b, h, t].item() * (v[j] - recalled[j]) for j in range(d_v)]
                S = [[kept * S[i][j] + k[i] * u[j] for j in range(d_v)] for i in range(d_k)]
                y = [scale * sum(S[i][j] * q[i] for i in range(d_k)) for j in range(d_v)]
                torch.testing.assert_close(out[b, h, :, t].cpu(), torch.tensor(y, dtype=torch.float64))
            torch.testing.assert_close(last[index, h].cpu(), torch.tensor(S, dtype=torch.float64))


@on_every_target("gated_delta_rule")
def test_gated_delta_rule_step_is_a_sequence_of_one(target):
    x = small_delta_rule(target.device, time=1).tensors
    first = x.pop("initial_state")
    reset = torch.tensor([True, False], device=target.device)
    out, state = wmkernels.gated_delta_rule_step(
        first, *(v[..., 0] for v in x.values()), reset=reset, scale=0.7, backend=target.backend
    )
    options = {"initial_state": first, "reset": reset[:, None], "scale": 0.7, "return_last_state": True}
    expected, last = wmkernels.gated_delta_rule(**x, **options, backend="reference")
    torch.testing.assert_close(out, expected[..., 0])
    torch.testing.assert_close(state, last)


@on_every_target("selective_scan")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_keep_their_state_in_float32(target, dtype):
    u = torch.ones(1, 1, 4000, dtype=dtype, device=target.device)
    one = torch.ones(1, 1, device=target.device)
    # A 16-bit sum would lose increments of 1e-3.
    _, state = wmkernels.selective_scan(u, u * 1e-3, 0 * one, one, one, return_last_state=True, backend=target.backend)
    assert state.dtype == torch.float32
    step = torch.tensor(1e-3, dtype=dtype).item()
    torch.testing.assert_close(state.item(), 4000 * step, rtol=1e-4, atol=0)
