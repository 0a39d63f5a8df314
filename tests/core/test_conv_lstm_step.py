"""Steps without gradients call the kernel directly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import wmkernels
from wmkernels.checks import state_dtype
from wmkernels.conv_lstm import function
from wmkernels.dispatch import load_native

pytestmark = pytest.mark.skipif(
    load_native() is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="no extension, or a PyTorch whose tensors cannot be read in one call",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def arguments(
    dtype=torch.float32, batch=2, inputs=3, hidden=5, size=(4, 6), kernel=(3, 3), peephole=None, layout="rows"
):
    state = state_dtype(dtype)

    def maps(channels, kind):
        if layout == "channels last":
            return torch.randn(batch, *size, channels).to(kind).movedim(-1, 1)
        if layout == "every other row":
            return torch.randn(batch, channels, 2 * size[0], size[1]).to(kind)[:, :, ::2]
        return torch.randn(batch, channels, *size).to(kind)

    weights = torch.randn(4 * hidden, inputs, *kernel) / 4, torch.randn(4 * hidden, hidden, 3, 1) / 4
    shape = {None: None, "channel": (3, hidden), "position": (3, hidden, *size)}[peephole]
    return (
        (maps(inputs, dtype), (maps(hidden, dtype), maps(hidden, state)), *(w.to(dtype) for w in weights)),
        {
            "bias": torch.randn(4 * hidden, dtype=state),
            "peephole": None if shape is None else torch.randn(shape, dtype=state),
            "reset": torch.arange(batch) % 2 == 1,
        },
    )


def fast_path(args, options, backend=None):
    return function._step_fast_path(*args, *(options[name] for name in ("bias", "peephole", "reset")), backend)


@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    inputs=st.integers(1, 20),
    hidden=st.integers(1, 34),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    peephole=st.sampled_from([None, "channel", "position"]),
    layout=st.sampled_from(["rows", "channels last"]),
)
def test_a_step_in_one_call_is_the_first_of_a_sequence(dtype, batch, inputs, hidden, size, kernel, peephole, layout):
    args, options = arguments(dtype, batch, inputs, hidden, size, kernel, peephole, layout)
    x, state, weight_ih, weight_hh = args
    with torch.no_grad():
        h, c = fast_path(args, options)
        sequence = {**options, "reset": options["reset"][None]}
        _, (expected_h, expected_c) = wmkernels.conv_lstm(x[None], weight_ih, weight_hh, state=state, **sequence)
    assert h.dtype == expected_h.dtype and c.dtype == expected_c.dtype
    assert h.stride() == expected_h.stride() and c.stride() == expected_c.stride()
    assert torch.equal(h, expected_h) and torch.equal(c, expected_c)


def test_a_step_without_a_state_begins_with_zeros():
    (x, state, *weights), options = arguments()
    options["reset"] = torch.ones(2, dtype=torch.bool)
    with torch.no_grad():
        fresh = wmkernels.conv_lstm_step(x, None, *weights, bias=options["bias"])[1]
        forgotten = wmkernels.conv_lstm_step(x, state, *weights, **options)[1]
    assert torch.equal(fresh[0], forgotten[0]) and torch.equal(fresh[1], forgotten[1])


def test_maps_that_would_have_to_be_copied_go_the_long_way_to_the_same_numbers():
    args, options = arguments(layout="every other row")
    x, (h, c), *weights = args
    with torch.no_grad():
        assert fast_path(args, options) is None
        expected = wmkernels.conv_lstm_step(x.contiguous(), (h.contiguous(), c.contiguous()), *weights, **options)[1]
        found = wmkernels.conv_lstm_step(*args, **options)[1]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, state, ih, hh, options: (x[:, :1], state, ih, hh),
        lambda x, state, ih, hh, options: (x, (state[0][..., :1], state[1]), ih, hh),
        lambda x, state, ih, hh, options: (x, (state[0], state[1].double()), ih, hh),
        lambda x, state, ih, hh, options: (x, state[:1], ih, hh),
        lambda x, state, ih, hh, options: (x, state, ih[:8], hh),
        lambda x, state, ih, hh, options: (x, state, ih, hh[..., :2, :]),
        lambda x, state, ih, hh, options: (x, state, ih, options.update(bias=options["bias"][:3]) or hh),
        lambda x, state, ih, hh, options: (x, state, ih, options.update(peephole=torch.ones(3, 7)) or hh),
        lambda x, state, ih, hh, options: (x, state, ih, options.update(reset=torch.ones(3, dtype=torch.bool)) or hh),
        lambda x, state, ih, hh, options: (x, state, ih, options.update(reset=torch.ones(2)) or hh),
    ],
)
def test_what_does_not_fit_is_told_and_never_reaches_the_kernel(spoil):
    (x, state, *weights), options = arguments()
    args = spoil(x, state, *weights, options)
    with torch.no_grad():
        assert fast_path(args, options) is None
        with pytest.raises((ValueError, TypeError), match="conv_lstm_step"):
            wmkernels.conv_lstm_step(*args, **options)


def test_a_step_that_needs_gradients_or_another_backend_is_not_taken_in_one_call():
    args, options = arguments()
    with torch.no_grad():
        assert fast_path(args, options) is not None
        assert fast_path(args, options, "reference") is None
        with torch.autocast("cpu", torch.bfloat16):
            assert fast_path(args, options) is None
    args[2].requires_grad_()
    assert fast_path(args, options) is None
    with torch.no_grad():
        assert fast_path(args, options) is not None
