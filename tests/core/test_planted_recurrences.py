"""Planted errors of the SSD scan and the convolution, in PyTorch, are found by what kernels are held against."""

import inspect
import sys

import pytest
import torch
from ssd_problems import flat_ssd_scan
from test_ssd_scan import mamba3

import wmkernels
from wmkernels.causal_conv1d import chunked as convolution
from wmkernels.ssd_scan import canonical_form, function
from wmkernels.ssd_scan import chunked as scan


def check_ssd_scan() -> None:
    problem = mamba3(9) | {"reset": torch.arange(9)[None] == 4}
    expected = flat_ssd_scan(**problem, backend="reference")
    for chunk in (None, 3):
        torch.testing.assert_close(flat_ssd_scan(**problem, chunk=chunk, backend="chunked"), expected)


def check_packed() -> None:
    problem = mamba3(9) | {"cu_seqlens": torch.tensor([0, 4, 9])}
    for name in ("initial_state", "phase", "previous_B", "previous_x"):
        problem[name] = torch.cat([problem[name], -problem[name]])
    expected = flat_ssd_scan(**problem, backend="reference")
    torch.testing.assert_close(flat_ssd_scan(**problem, backend="chunked"), expected)


def check_causal_conv1d() -> None:
    x, weight, state = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(2, 3, 3)
    call = {"initial_state": state, "return_last_state": True}
    expected = wmkernels.causal_conv1d(x, weight, **call, backend="reference")
    torch.testing.assert_close(wmkernels.causal_conv1d(x, weight, **call, backend="chunked"), expected)


PLANTED = {
    "decays within a chunk are a step late": (
        check_ssd_scan,
        (scan, "_chunk"),
        {"torch.where(ones.tril(-1), gate, 0)": "torch.where(ones.tril(), gate, 0)"},
    ),
    "the first decay of a chunk is left out": (
        check_ssd_scan,
        (scan, "_chunk"),
        {"since_start = gate.cumsum(-2)": "since_start = gate.cumsum(-2) - gate[..., :1, :]"},
    ),
    "the trapezoid's term crosses a reset": (
        check_ssd_scan,
        (function, "ssd_scan_reference"),
        {
            "if dropped is None else earlier.masked_fill(dropped, 0), last_x": ", last_x",
            "last_x, turned_B = (v.masked_fill(dropped[..., None], 0) for v in (last_x, turned_B))": "pass",
        },
    ),
    "the trapezoid's term crosses the beginning of a sequence": (
        check_packed,
        (canonical_form, "_next_begins"),
        {"sequences.is_first[None]": "torch.zeros_like(sequences.is_first[None])"},
    ),
    "the step before the first is forgotten": (
        check_ssd_scan,
        (canonical_form, "_with_previous"),
        {"(weight[..., None] * x)": "(0 * weight[..., None] * x)"},
    ),
    "a window is not shifted": (
        check_causal_conv1d,
        (convolution, "_convolve"),
        {"padded.x[:, start : start + time]": "padded.x[:, past:]"},
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_of_a_recurrence_is_found(error, monkeypatch):
    check, (module, name), changes = PLANTED[error]
    check()
    found = getattr(module, name)
    source = inspect.getsource(found)
    for right, wrong in changes.items():
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    scope = dict(vars(sys.modules[found.__module__]))
    exec(compile(source, error, "exec"), scope)
    monkeypatch.setattr(module, name, scope[name])
    with pytest.raises(AssertionError, match="not close"):
        check()
