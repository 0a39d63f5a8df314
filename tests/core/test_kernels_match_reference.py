import contextlib

import pytest
import torch
from backends import instruction_sets, on_every_target
from delta_rule_problems import delta_rules
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    DTYPES,
    STATES,
    Problem,
    assert_as_accurate_as_the_reference,
    few_channels,
    linear_scans,
    scans,
    steps,
)
from ssd_problems import ssd_scans

import wmkernels
from wmkernels.dispatch import load_native


@contextlib.contextmanager
def instruction_set(name):
    native = load_native()
    before = native.cpu_isa()
    native.cpu_set_isa(name)
    try:
        assert native.cpu_isa() == name
        yield
    finally:
        native.cpu_set_isa(before)


@on_every_target("selective_scan", kernels_only=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_selective_scan(target, dtype, data):
    assert_as_accurate_as_the_reference(data.draw(scans([dtype], target.device)), target.backend)


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_selective_scan_in_chunks(data):
    assert_as_accurate_as_the_reference(data.draw(scans(max_time=24)), "chunked")


@on_every_target("selective_step", kernels_only=True)
@given(data=st.data())
def test_selective_step(target, data):
    assert_as_accurate_as_the_reference(data.draw(steps(device=target.device)), target.backend)


@on_every_target("linear_scan", without=("reference",))
@given(data=st.data())
def test_linear_scan(target, data):
    assert_as_accurate_as_the_reference(data.draw(linear_scans(device=target.device)), target.backend)


@on_every_target("gated_delta_rule", without=("reference",))
@settings(max_examples=max(8, settings().max_examples // 2))
@given(data=st.data())
def test_gated_delta_rule(target, data):
    assert_as_accurate_as_the_reference(data.draw(delta_rules(device=target.device)), target.backend)


@pytest.mark.parametrize("level", instruction_sets())
@given(data=st.data())
def test_every_instruction_set(level, data):
    problem = data.draw(
        st.one_of(
            scans(max_time=20), linear_scans(max_time=20), steps(), delta_rules(max_time=20), ssd_scans(max_time=20)
        )
    )
    with instruction_set(level):
        assert_as_accurate_as_the_reference(problem, "cpu")


@on_every_target("selective_scan", without=("reference",))
@settings(max_examples=max(8, settings().max_examples // 4))
@given(data=st.data())
def test_large_states(target, data):
    states = [*STATES[-3:], 65, 100, 127, 128, 129, 200, 255, 256]
    problem = data.draw(scans(device=target.device, states=states, max_time=12, max_channels=18))
    assert_as_accurate_as_the_reference(problem, target.backend)


@on_every_target("selective_scan", without=("reference",))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "time"), [(torch.float32, 2000), (torch.float64, 1801)])
def test_few_channels_and_a_long_time(target, dtype, time, packed):
    assert_as_accurate_as_the_reference(few_channels(dtype, time, target.device, packed), target.backend)


@on_every_target("linear_scan", without=("reference",))
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_over_a_long_time(target, reverse):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "gates": torch.rand((1, 2, 5000), generator=generator).to(target.device),
        "tokens": torch.randn((1, 2, 5000), generator=generator).to(target.device),
        "reset": torch.rand((1, 5000), generator=generator).to(target.device) < 0.001,
    }
    problem = Problem(wmkernels.linear_scan, tensors, {"reverse": reverse, "return_last_state": True})
    assert_as_accurate_as_the_reference(problem, target.backend)
