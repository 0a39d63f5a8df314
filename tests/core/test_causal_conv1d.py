"""The causal convolution: PyTorch's own, chunks of time, windows, values that must not spread, refusals."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from backends import instruction_sets, on_every_target
from causal_conv_problems import causal_convs, small_causal_conv
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_as_accurate_as_the_reference
from test_kernels_match_reference import instruction_set

import wmkernels
from wmkernels import dispatch

every_target = on_every_target("causal_conv1d")
every_kernel = on_every_target("causal_conv1d", kernels_only=True)


@on_every_target("causal_conv1d", without=("reference",))
@given(data=st.data())
def test_the_float64_reference(target, data):
    assert_as_accurate_as_the_reference(data.draw(causal_convs(device=target.device)), target.backend)


@pytest.mark.parametrize("level", instruction_sets())
@given(data=st.data())
def test_every_instruction_set_of_a_convolution(level, data):
    with instruction_set(level):
        assert_as_accurate_as_the_reference(data.draw(causal_convs(max_time=70)), "cpu")


@every_target
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_it_is_the_depthwise_convolution_of_pytorch(target, width):
    x, weight, bias, _ = (t.to(target.device) for t in small_causal_conv("cpu", time=9, width=width).tensors.values())
    expected = F.silu(F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], bias, groups=3))
    found = wmkernels.causal_conv1d(x, weight, bias, activation="silu", backend=target.backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("level", instruction_sets())
@pytest.mark.parametrize("width", [2, 4, 6])
def test_lanes_of_steps_and_lanes_of_channels_round_equally(level, width):
    x, weight, bias, _ = small_causal_conv("cpu", torch.float32, 1, 2100, 9, width).tensors.values()
    with instruction_set(level):
        rows = wmkernels.causal_conv1d(x, weight, bias, activation="silu", backend="cpu")
        columns = wmkernels.causal_conv1d(
            x.mT.contiguous(), weight, bias, activation="silu", channel_last=True, backend="cpu"
        )
    assert torch.equal(rows, columns.mT)


@every_kernel
@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("channel_last", [False, True])
def test_chunks_and_steps_are_the_sequence_bit_for_bit(target, width, channel_last):
    problem = small_causal_conv(target.device, torch.float32, time=150, channels=20, width=width)
    x, weight, bias, state = problem.tensors.values()
    reset = torch.rand(2, 150, device=target.device) < 0.1
    if channel_last:
        x, state = x.mT, state.mT
    time = 1 if channel_last else 2
    options = {"activation": "silu", "channel_last": channel_last, "backend": target.backend}
    whole, last = wmkernels.causal_conv1d(
        x, weight, bias, initial_state=state, reset=reset, return_last_state=True, **options
    )
    outputs, start = [], 0
    for length in (1, 70, 2, 30, 47):
        part = slice(start, start + length)
        y, state = wmkernels.causal_conv1d(
            x.narrow(time, start, length),
            weight,
            bias,
            initial_state=state,
            reset=reset[:, part],
            return_last_state=True,
            **options,
        )
        outputs.append(y)
        start += length
    assert torch.equal(torch.cat(outputs, time), whole)
    assert torch.equal(state, last)
    state = problem.tensors["initial_state"].mT if channel_last else problem.tensors["initial_state"]
    for t in range(20):
        before = state.clone()
        y, after = wmkernels.causal_conv1d_step(state, x.select(time, t), weight, bias, reset=reset[:, t], **options)
        assert torch.equal(state, before)
        assert torch.equal(y, whole.select(time, t))
        state = after


@every_target
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 2, 20])
def test_a_step_is_a_sequence_of_one_with_its_gradient(target, dtype, width):
    problem = small_causal_conv(target.device, dtype, time=1, channels=11, width=width)
    problem.tensors["reset"] = torch.tensor([True, False], device=target.device)[:, None]
    expected = problem.solve(target.backend)
    leaves = problem.leaves()
    y, after = wmkernels.causal_conv1d_step(
        leaves["initial_state"],
        leaves["x"][:, :, 0],
        leaves["weight"],
        leaves["bias"],
        activation="silu",
        reset=problem.tensors["reset"][:, 0],
        backend=target.backend,
    )
    assert torch.equal(y[:, :, None], expected["output 0"])
    assert torch.equal(after, expected["output 1"])
    outputs = (y[:, :, None], after)
    gradients = torch.autograd.grad(
        outputs, [*leaves.values()], problem.cotangents(outputs), allow_unused=True, materialize_grads=True
    )
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, expected[f"gradient of {name}"]), name


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded"])
def test_the_fast_path_of_a_step_is_the_ordinary_path(channel_last, layout):
    if dispatch.load_native() is None:
        pytest.skip("no extension")
    problem = small_causal_conv("cpu", torch.float32, time=1, channels=21, width=4)
    x, weight, bias, state = (t.squeeze(-1) for t in problem.tensors.values())
    if channel_last:
        state = state.mT.contiguous()
    if layout == "strided":
        state, weight = state.repeat(1, 1, 2)[..., ::2], weight.repeat(1, 2)[:, ::2]
    elif layout == "expanded":
        state, x = state[:1].expand_as(state), x[:, :1].expand_as(x)
    for reset in (None, torch.tensor([True, False])):
        options = {"activation": "silu", "reset": reset, "channel_last": channel_last, "backend": "cpu"}
        fast = wmkernels.causal_conv1d_step(state, x, weight, bias, **options)
        ordinary = wmkernels.causal_conv1d_step(state, x, weight.requires_grad_(), bias, **options)
        weight = weight.detach()
        for found, expected in zip(fast, ordinary, strict=True):
            assert torch.equal(found, expected)


@every_target
def test_a_window_is_the_last_inputs_after_the_last_reset(target):
    x = torch.arange(1.0, 7, device=target.device)[None, None]
    weight, first = torch.ones(1, 4, device=target.device), torch.tensor([[[-1.0, -2, -3]]], device=target.device)
    reset = torch.zeros(1, 6, dtype=torch.bool, device=target.device)

    def window(time, resets=()):
        flags = reset.clone()
        flags[:, list(resets)] = True
        options = {"initial_state": first, "reset": flags[:, :time], "return_last_state": True}
        return wmkernels.causal_conv1d(x[..., :time], weight, **options, backend=target.backend)[1].flatten().tolist()

    assert window(6) == [4, 5, 6]
    assert window(2) == [-3, 1, 2]
    assert window(2, [0]) == [0, 1, 2]
    assert window(2, [1]) == [0, 0, 2]
    assert window(6, [3]) == [4, 5, 6]
    assert window(6, [4]) == [0, 5, 6]
    assert window(6, [5, 2]) == [0, 0, 6]


@every_target
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_crosses_a_reset_or_a_sequence(target, value):
    problem = small_causal_conv(target.device, torch.float32, batch=1, time=12, width=4)
    problem.tensors["initial_state"] = problem.tensors["initial_state"].repeat(2, 1, 1)
    problem.tensors["cu_seqlens"] = torch.tensor([0, 8, 12], device=target.device)
    problem.tensors["reset"] = torch.zeros(1, 12, dtype=torch.bool, device=target.device)
    problem.tensors["reset"][:, 4] = True

    def run(x, cotangent):
        leaves = {**problem.leaves(), "x": x.clone().requires_grad_()}
        y, last = problem.call(target.backend, leaves)
        (gradient,) = torch.autograd.grad(y, leaves["x"], cotangent)
        return y.detach(), last.detach(), gradient

    ones = torch.ones(1, 3, 12, device=target.device)
    clean = run(problem.tensors["x"], ones)
    for step, until in ((3, 4), (7, 8)):
        x = problem.tensors["x"].clone()
        x[..., step] = value
        y, last, _ = run(x, ones)
        assert torch.equal(y[..., until:], clean[0][..., until:])
        assert torch.equal(last[1], clean[1][1])
        cotangent = ones.clone()
        cotangent[..., until] = value
        gradient = run(problem.tensors["x"], cotangent)[2]
        assert torch.equal(gradient[..., :until], clean[2][..., :until])


@every_target
@pytest.mark.parametrize("sizes", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=["batch", "time", "channels"])
def test_empty_sizes(target, sizes):
    batch, time, channels = sizes
    problem = small_causal_conv(target.device, torch.float32, batch, time, channels)
    leaves = problem.leaves()
    y, last = problem.call(target.backend, leaves)
    assert y.shape == leaves["x"].shape
    assert y is not leaves["x"]
    torch.testing.assert_close(last, leaves["initial_state"], rtol=0, atol=0)
    assert not last.numel() or last.data_ptr() != leaves["initial_state"].data_ptr()
    cotangent = torch.randn_like(last)
    gradients = torch.autograd.grad(
        (y, last), [*leaves.values()], (y, cotangent), allow_unused=True, materialize_grads=True
    )
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        right = cotangent if name == "initial_state" else torch.zeros_like(leaf)
        torch.testing.assert_close(gradient, right, rtol=0, atol=0)


def _short_window(x):
    x["initial_state"] = torch.zeros(2, 3, 3)


def _wrong(name, *shape):
    return lambda x: x.update({name: torch.zeros(shape)})


REFUSALS = {
    "rank": (_wrong("x", 3, 5), "x has shape (3, 5), expected (batch, channels, time)"),
    "channels": (_wrong("x", 2, 4, 5), "weight has shape (3, 3), expected (channels=4, width) to match x"),
    "conv1d": (_wrong("weight", 3, 1, 3), "weight.squeeze(1) has the weights of a depthwise torch.nn.Conv1d"),
    "width": (_wrong("weight", 3, 0), "weight has shape (3, 0), expected (channels=3, width)"),
    "bias": (_wrong("bias", 2), "bias has shape (2,), expected (channels=3) to match x"),
    "order": (_wrong("x", 2, 5, 3), "channel_last=True takes (batch, time, channels)"),
    "window": (_short_window, "initial_state has shape (2, 3, 3), expected (batch=2, channels=3, width - 1=2)"),
    "activation": (lambda x: x.update(activation="relu"), "activation is 'relu', expected \"silu\" or None"),
    "reset": (lambda x: x.update(reset=torch.zeros(2, 4, dtype=torch.bool)), "reset has shape (2, 4), expected"),
    "packed": (lambda x: x.update(cu_seqlens=torch.tensor([0, 5])), "x has a batch of 2, expected 1 with cu_seqlens"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_of_causal_conv1d(case):
    change, message = REFUSALS[case]
    problem = small_causal_conv("cpu", torch.float32)
    x = dict(problem.tensors)
    change(x)
    with pytest.raises(ValueError, match=f"causal_conv1d: .*{re.escape(message)}"):
        wmkernels.causal_conv1d(**x)


@every_target
def test_sequences_that_do_not_fill_the_time_are_refused(target):
    if target.device == "cuda":
        pytest.skip("cu_seqlens is not read on a GPU")
    problem = small_causal_conv(target.device, torch.float32, batch=1)
    problem.tensors["cu_seqlens"] = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"causal_conv1d: cu_seqlens is \[0, 2\], expected bounds that rise from 0"):
        problem.call(target.backend)


def test_a_step_names_itself_in_its_refusals():
    state, x, weight = torch.zeros(2, 3, 2), torch.zeros(2, 3), torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"causal_conv1d_step: x has shape \(2, 3, 1\), expected \(batch, channels\)"):
        wmkernels.causal_conv1d_step(state, x[..., None], weight)
    with pytest.raises(ValueError, match=r"causal_conv1d_step: state has shape \(2, 3, 3\)"):
        wmkernels.causal_conv1d_step(torch.zeros(2, 3, 3), x, weight)
    with pytest.raises(ValueError, match=r"causal_conv1d_step: backend 'tpu' cannot run this call"):
        wmkernels.causal_conv1d_step(state, x, weight, backend="tpu")
