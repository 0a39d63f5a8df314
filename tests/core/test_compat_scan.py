"""wmkernels.compat: the scans of accelerated_scan."""

import pytest
import torch
from problems import DTYPES
from test_compat import WIDE, near, normal

from wmkernels.compat.accelerated_scan import complex as complex_module
from wmkernels.compat.accelerated_scan import ref, scalar, warp

SCANS = [warp.scan, scalar.scan, ref.scan]


def naive(gates, tokens, reverse=False):
    kind = torch.promote_types(torch.promote_types(gates.dtype, tokens.dtype), WIDE)
    gates, tokens = gates.to(kind), tokens.to(kind)
    state, outputs = torch.zeros_like(tokens[..., 0]), {}
    time = gates.shape[-1]
    for t in reversed(range(time)) if reverse else range(time):
        state = outputs[t] = gates[..., t] * state + tokens[..., t]
    return torch.stack([outputs[t] for t in range(time)], -1)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_any_mixture_of_dtypes(scan, dtype, other):
    gates, tokens = torch.rand(2, 3, 9).to(dtype), normal(2, 3, 9, dtype=other)
    out = scan(gates, tokens)
    assert out.dtype == dtype
    near(out, naive(gates, tokens), dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", [1, 9, 300])
@pytest.mark.parametrize("real", ["", "gates", "tokens"])
def test_complex_numbers_and_their_gradients(reverse, time, real):
    gates = torch.polar(torch.rand(1, 3, time, dtype=WIDE), 6 * torch.rand(1, 3, time, dtype=WIDE))
    tokens = torch.complex(normal(1, 3, time), normal(1, 3, time))
    gates = (gates.real if real == "gates" else gates).requires_grad_()
    tokens = (tokens.real if real == "tokens" else tokens).requires_grad_()
    out, expected = ref.scan(gates, tokens, reverse=reverse), naive(gates, tokens, reverse)
    torch.testing.assert_close(out, expected)
    weight = torch.complex(normal(1, 3, time), normal(1, 3, time))
    found, wanted = (torch.autograd.grad((x * weight).real.sum(), (gates, tokens)) for x in (out, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    if not reverse:
        assert torch.equal(warp.scan(gates, tokens), out)
        if real != "gates":
            assert torch.equal(complex_module.scan(gates, tokens), out)


def test_growing_complex_gates_do_not_overflow_where_states_do_not():
    gates = torch.full((1, 1, 200), 3.0 + 3.0j, dtype=torch.complex64)
    tokens = torch.zeros(1, 1, 200, dtype=torch.complex64)
    tokens[..., 190] = 1
    out = warp.scan(gates, tokens)
    assert (out[..., :190] == 0).all()
    torch.testing.assert_close(out.to(torch.complex128), naive(gates, tokens), rtol=1e-5, atol=0)


def test_another_product_and_sum():
    gates, tokens = normal(1, 2, 7), normal(1, 2, 7)
    for reverse in (False, True):
        out = ref.scan(
            gates, tokens, torch.add, torch.maximum, lambda x: torch.full_like(x, -torch.inf), torch.zeros_like, reverse
        )  # the best path that ends here
        state, outputs = torch.full((1, 2), -torch.inf, dtype=WIDE), {}
        for t in reversed(range(7)) if reverse else range(7):
            state = outputs[t] = torch.maximum(gates[..., t] + state, tokens[..., t])
        assert torch.equal(out, torch.stack([outputs[t] for t in range(7)], -1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warp.scan(torch.ones(2, 3), torch.ones(2, 3)), r"scan: gates has shape \(2, 3\), expected \(batch,"),
        (
            lambda: warp.scan(torch.ones(1, 2, 3), torch.ones(1, 2, 4)),
            r"tokens has shape \(1, 2, 4\), expected",
        ),
        (lambda: warp.scan(torch.ones(1, 2, 3).int(), torch.ones(1, 2, 3)), "gates has dtype int32, expected float32"),
        (lambda: complex_module.scan(*[torch.ones(1, 2, 3)] * 2), "forget has dtype torch.float32, expected complex64"),
    ],
)
def test_a_bad_call_gets_one_clear_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
