"""Error messages name the op, the argument, its value and the expectation."""

import dataclasses
import re

import pytest
import torch
from backends import on_every_target, targets
from test_gradients import SMALL

import wmkernels
from wmkernels import dispatch
from wmkernels.registry import OPS, op_names

every_target = on_every_target("selective_scan")


def scan(target, **changes):
    x = SMALL["selective_scan"](target.device, torch.float32).tensors | {"backend": target.backend} | changes
    return wmkernels.selective_scan(**x)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# u is (batch=2, channels=3, time=4), state 2; B and C (2, 2, 4).
SCAN_ERRORS = {
    "u no tensor": ({"u": [1.0]}, TypeError, "u is a list, expected a torch.Tensor"),
    "A no tensor": ({"A": 1.0}, TypeError, "A is a float, expected a torch.Tensor"),
    "z no tensor": ({"z": 1.0}, TypeError, "z is a float, expected a torch.Tensor"),
    "D no tensor": ({"D": 1.0}, TypeError, "D is a float, expected a torch.Tensor"),
    "reset no tensor": ({"reset": [True]}, TypeError, "reset is a list, expected a torch.Tensor"),
    "initial_state no tensor": ({"initial_state": 0}, TypeError, "initial_state is a int, expected a torch.Tensor"),
    "cu_seqlens no tensor": ({"cu_seqlens": [0, 4]}, TypeError, "cu_seqlens is a list, expected a torch.Tensor"),
    "u of integers": ({"u": zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "u has dtype int64, expected float32 or"),
    "u of two dimensions": ({"u": zeros(3, 4)}, ValueError, "u has shape (3, 4), expected (batch, channels, time)"),
    "delta": (
        {"delta": zeros(2, 3, 5)},
        ValueError,
        "delta has shape (2, 3, 5), expected (batch=2, channels=3, time=4) to match u",
    ),
    "z": (
        {"z": zeros(2, 4, 3)},
        ValueError,
        "z has shape (2, 4, 3), expected (batch=2, channels=3, time=4) to match u",
    ),
    "delta of another dtype": (
        {"delta": zeros(2, 3, 4, dtype=torch.float64)},
        TypeError,
        "delta has dtype float64, expected float32 beside u of torch.float32",
    ),
    "z of another dtype": (
        {"z": zeros(2, 3, 4, dtype=torch.float64)},
        TypeError,
        "z has dtype float64, expected float32 beside u of torch.float32",
    ),
    "A of other channels": (
        {"A": zeros(4, 2)},
        ValueError,
        "A has shape (4, 2), expected (channels=3, state) to match u",
    ),
    "A without states": ({"A": zeros(3, 0)}, ValueError, "A has shape (3, 0), expected (channels=3, state) to match u"),
    "A of one dimension": ({"A": zeros(3)}, ValueError, "A has shape (3,), expected (channels=3, state) to match u"),
    "complex A": (
        {"A": zeros(3, 2, dtype=torch.complex64)},
        TypeError,
        "A is complex (torch.complex64), expected a real A",
    ),
    "A of a wider dtype": (
        {"A": zeros(3, 2, dtype=torch.float64)},
        TypeError,
        "A has dtype float64, expected float32 beside u of torch.float32",
    ),
    "B of another time": (
        {"B": zeros(2, 2, 5)},
        ValueError,
        "B has shape (2, 2, 5), expected (batch=2, state=2, time=4) to match u and A",
    ),
    "time-major B": (
        {"B": zeros(2, 4, 2)},
        ValueError,
        "B has shape (2, 4, 2), expected (batch=2, state=2, time=4) to match u and A; "
        "channel_last=True takes this order",
    ),
    "time-major B with groups": (
        {"B": zeros(2, 3, 4, 2)},
        ValueError,
        "B has shape (2, 3, 4, 2), expected (batch=2, groups=3, state=2, time=4) to match u and A; "
        "channel_last=True takes this order",
    ),
    "C of one dimension": (
        {"C": zeros(2)},
        ValueError,
        "C has shape (2,), expected (channels, state), (batch, state, time)",
    ),
    "constant C": (
        {"C": zeros(3, 5)},
        ValueError,
        "C has shape (3, 5), expected (channels=3, state=2) to match u and A",
    ),
    "C of another dtype": (
        {"C": zeros(2, 2, 4, dtype=torch.float64)},
        TypeError,
        "C has dtype float64, expected float32 beside u of torch.float32",
    ),
    "groups that do not divide": (
        {"B": zeros(2, 2, 2, 4)},
        ValueError,
        "B has 2 groups, expected a divisor of channels=3",
    ),
    "no groups": ({"B": zeros(2, 0, 2, 4)}, ValueError, "B has 0 groups, expected a divisor of channels=3"),
    "D": ({"D": zeros(2)}, ValueError, "D has shape (2,), expected (channels=3) to match u"),
    "delta_bias": (
        {"delta_bias": zeros(3, 1)},
        ValueError,
        "delta_bias has shape (3, 1), expected (channels=3) to match u",
    ),
    "initial_state": (
        {"initial_state": zeros(1, 3, 2)},
        ValueError,
        "initial_state has shape (1, 3, 2), expected (batch=2, channels=3, state=2) to match u and A",
    ),
    "initial_state of another dtype": (
        {"initial_state": zeros(2, 3, 2, dtype=torch.float64)},
        TypeError,
        "initial_state has dtype float64, expected float32 beside u of torch.float32",
    ),
    "reset of numbers": (
        {"reset": zeros(2, 4)},
        TypeError,
        "reset has dtype float32, expected bool (true where a new sequence starts)",
    ),
    "reset of bytes": ({"reset": zeros(2, 4, dtype=torch.uint8)}, TypeError, "reset has dtype uint8, expected bool"),
    "reset shape": (
        {"reset": zeros(4, 2, dtype=torch.bool)},
        ValueError,
        "reset has shape (4, 2), expected (batch=2, time=4) to match u",
    ),
    "packed batch": (
        {"cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        "u has a batch of 2, expected 1 with cu_seqlens: packed sequences lie along time",
    ),
    "bounds of numbers": ({"cu_seqlens": zeros(2)}, TypeError, "cu_seqlens has dtype float32, expected int64 or int32"),
    "bounds of two dimensions": (
        {"cu_seqlens": zeros(1, 2, dtype=torch.int64)},
        ValueError,
        "cu_seqlens has shape (1, 2), expected (sequences + 1,)",
    ),
    "another device": ({"z": torch.zeros(2, 3, 4, device="meta")}, ValueError, "z is on meta, expected"),
    "A on another device": ({"A": torch.zeros(3, 2, device="meta")}, ValueError, "A is on meta, expected"),
    "reset on another device": (
        {"reset": torch.zeros(2, 4, dtype=torch.bool, device="meta")},
        ValueError,
        "reset is on meta, expected",
    ),
}


@every_target
@pytest.mark.parametrize("case", list(SCAN_ERRORS))
def test_selective_scan(target, case):
    changes, error, message = SCAN_ERRORS[case]
    moved = {
        k: v.to(target.device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for k, v in changes.items()
    }
    with pytest.raises(error, match=f"selective_scan: {re.escape(message)}"):
        scan(target, **moved)


@every_target
def test_groups_of_B_and_C(target):
    x = SMALL["selective_scan"](target.device, torch.float32, channels=6).tensors
    x["B"], x["C"] = torch.zeros(2, 2, 2, 4, device=target.device), torch.zeros(2, 3, 2, 4, device=target.device)
    with pytest.raises(
        ValueError, match="selective_scan: B has 2 groups and C has 3, expected as many in both, or one"
    ):
        wmkernels.selective_scan(**x, backend=target.backend)


@every_target
@pytest.mark.parametrize("bounds", [[1, 4], [0, 3], [0, 3, 2, 4], [0, 5], [0, -1, 4], [0, 2, 5, 4]])
def test_bounds_that_do_not_rise(target, bounds):
    if target.device != "cpu":
        pytest.skip("checked on the CPU only: on a GPU reading the bounds would synchronise")
    x = {k: v[:1] if v.dim() == 3 else v for k, v in SMALL["selective_scan"]("cpu", torch.float32).tensors.items()}
    x["initial_state"] = None
    with pytest.raises(
        ValueError, match=r"selective_scan: cu_seqlens is \[.*\], expected bounds that rise from 0 to time=4"
    ):
        wmkernels.selective_scan(**x, cu_seqlens=torch.tensor(bounds), backend=target.backend)


@every_target
def test_channel_last_messages_show_what_was_passed(target):
    x = SMALL["selective_scan"](target.device, torch.float32).tensors
    with pytest.raises(ValueError, match=r"A has shape \(3, 2\), expected \(channels=4, state\)"):
        wmkernels.selective_scan(**x, channel_last=True, backend=target.backend)
    turned = {k: v.transpose(1, 2) if k in ("u", "delta", "z") else v for k, v in x.items()}
    message = (
        r"B has shape \(2, 2, 4\), expected \(batch=2, time=4, state=2\) to match u and A; channel_last=False takes"
    )
    with pytest.raises(ValueError, match=message):
        wmkernels.selective_scan(**turned, channel_last=True, backend=target.backend)
    with pytest.raises(ValueError, match=r"z has shape \(2, 3, 4\), expected \(batch=2, time=4, channels=3\)"):
        wmkernels.selective_scan(**{**turned, "z": x["z"]}, channel_last=True, backend=target.backend)
    with pytest.raises(
        ValueError, match=r"u has shape \(3, 4\), expected \(batch, time, channels\) with channel_last=True"
    ):
        wmkernels.selective_scan(**{**turned, "u": x["u"][0]}, channel_last=True, backend=target.backend)


STEP_ERRORS = {
    "u no tensor": ({"u": 1.0}, TypeError, "u is a float, expected a torch.Tensor"),
    "u of integers": ({"u": zeros(2, 3, dtype=torch.int32)}, TypeError, "u has dtype int32, expected float32 or"),
    "u with time": ({"u": zeros(2, 3, 1)}, ValueError, "u has shape (2, 3, 1), expected (batch, channels)"),
    "delta": ({"delta": zeros(2, 4)}, ValueError, "delta has shape (2, 4), expected (batch=2, channels=3) to match u"),
    "z dtype": (
        {"z": zeros(2, 3, dtype=torch.float64)},
        TypeError,
        "z has dtype float64, expected float32 beside u of torch.float32",
    ),
    "A": ({"A": zeros(2, 2)}, ValueError, "A has shape (2, 2), expected (channels=3, state) to match u"),
    "complex A": (
        {"A": zeros(3, 2, dtype=torch.complex64)},
        TypeError,
        "A is complex (torch.complex64), expected a real A",
    ),
    "B": ({"B": zeros(2, 3)}, ValueError, "B has shape (2, 3), expected (batch=2, state=2) to match u and A"),
    "C": (
        {"C": zeros(2, 1, 3)},
        ValueError,
        "C has shape (2, 1, 3), expected (batch=2, groups=1, state=2) to match u and A",
    ),
    "groups": ({"B": zeros(2, 2, 2)}, ValueError, "B has 2 groups, expected a divisor of channels=3"),
    "D": ({"D": zeros(1)}, ValueError, "D has shape (1,), expected (channels=3) to match u"),
    "delta_bias": ({"delta_bias": zeros(4)}, ValueError, "delta_bias has shape (4,), expected (channels=3) to match u"),
    "state": (
        {"state": zeros(1, 3, 2)},
        ValueError,
        "state has shape (1, 3, 2), expected (batch=2, channels=3, state=2) to match u and A",
    ),
    "state dtype": (
        {"state": zeros(2, 3, 2, dtype=torch.float64)},
        TypeError,
        "state has dtype float64, expected float32 beside u of torch.float32",
    ),
    "reset dtype": ({"reset": zeros(2)}, TypeError, "reset has dtype float32, expected bool"),
    "reset": ({"reset": zeros(3, dtype=torch.bool)}, ValueError, "reset has shape (3,), expected (batch=2) to match u"),
    "device": ({"z": torch.zeros(2, 3, device="meta")}, ValueError, "z is on meta, expected"),
}


@on_every_target("selective_step")
@pytest.mark.parametrize("case", list(STEP_ERRORS))
def test_selective_step(target, case):
    changes, error, message = STEP_ERRORS[case]
    moved = {
        k: v.to(target.device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for k, v in changes.items()
    }
    x = SMALL["selective_step"](target.device, torch.float32).tensors | {"backend": target.backend} | moved
    with pytest.raises(error, match=f"selective_step: {re.escape(message)}"):
        wmkernels.selective_step(**x)


UPDATE_NAMES = {"u": "x", "delta": "dt", "delta_bias": "dt_bias"}


@pytest.mark.parametrize("case", [name for name in STEP_ERRORS if not name.startswith("reset")])
def test_selective_state_update(case):
    changes, error, message = STEP_ERRORS[case]
    x = SMALL["selective_step"]("cpu", torch.float32).tensors | changes
    for name, other in UPDATE_NAMES.items():
        x[other] = x.pop(name)
        message = re.sub(rf"(?<![\w=]){name}(?= (is|has|of|and)|$)", other, message)
    with pytest.raises(error, match=f"selective_state_update: {re.escape(message)}"):
        wmkernels.selective_state_update(**x)


def test_selective_state_update_with_indices_and_heads():
    x = SMALL["selective_step"]("cpu", torch.float32).tensors
    for name, other in UPDATE_NAMES.items():
        x[other] = x.pop(name)
    with pytest.raises(
        TypeError, match="selective_state_update: state_batch_indices has dtype float32, expected int64"
    ):
        wmkernels.selective_state_update(**x, state_batch_indices=zeros(2))
    message = r"selective_state_update: state_batch_indices has shape \(3,\), expected \(batch=2\) to match x"
    with pytest.raises(ValueError, match=message):
        wmkernels.selective_state_update(**x, state_batch_indices=torch.tensor([0, 1, 1]))
    headed = x | {"state": zeros(2, 3, 1, 2)}
    message = r"selective_state_update: x has shape \(2, 3\), expected \(batch, heads=3, headdim=1\) to match state"
    with pytest.raises(ValueError, match=message):
        wmkernels.selective_state_update(**headed)


LINEAR_ERRORS = {
    "gates no tensor": ({"gates": 1.0}, TypeError, "gates is a float, expected a torch.Tensor"),
    "gates of integers": (
        {"gates": zeros(2, 3, 5, dtype=torch.int64)},
        TypeError,
        "gates has dtype int64, expected float32",
    ),
    "gates of one dimension": ({"gates": zeros(5)}, ValueError, "gates has shape (5,), expected (batch, ..., time)"),
    "tokens": ({"tokens": zeros(2, 3, 4)}, ValueError, "tokens has shape (2, 3, 4), expected (2, 3, 5) to match gates"),
    "tokens dtype": (
        {"tokens": zeros(2, 3, 5, dtype=torch.float64)},
        TypeError,
        "tokens has dtype float64, expected float32 beside gates of torch.float32",
    ),
    "initial_state": (
        {"initial_state": zeros(2, 4)},
        ValueError,
        "initial_state has shape (2, 4), expected (batch=2, ",
    ),
    "initial_state dtype": (
        {"initial_state": zeros(2, 3, dtype=torch.float64)},
        TypeError,
        "initial_state has dtype float64, expected float32 beside gates of torch.float32",
    ),
    "reset dtype": ({"reset": zeros(2, 5)}, TypeError, "reset has dtype float32, expected bool"),
    "reset": (
        {"reset": zeros(5, 2, dtype=torch.bool)},
        ValueError,
        "reset has shape (5, 2), expected (batch=2, time=5)",
    ),
    "device": ({"tokens": torch.zeros(2, 3, 5, device="meta")}, ValueError, "tokens is on meta, expected"),
}


@on_every_target("linear_scan")
@pytest.mark.parametrize("case", list(LINEAR_ERRORS))
def test_linear_scan(target, case):
    changes, error, message = LINEAR_ERRORS[case]
    moved = {
        k: v.to(target.device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for k, v in changes.items()
    }
    x = SMALL["linear_scan"](target.device, torch.float32).tensors | {"backend": target.backend} | moved
    with pytest.raises(error, match=f"linear_scan: {re.escape(message)}"):
        wmkernels.linear_scan(**x)


def test_the_kernels_are_built():
    """Other tests run only on available backends."""
    for op in op_names():
        assert dispatch.reasons(op, "cpu", torch.device("cpu")) == []
    if torch.cuda.is_available():
        assert len(targets("selective_scan")) == 6


@pytest.mark.parametrize(
    "op", ["selective_scan", "selective_step", "linear_scan", "gated_delta_rule", "ssd_scan", "causal_conv1d"]
)
@pytest.mark.parametrize("backend", ["triton", "cuda", "tpu"])
def test_a_backend_that_cannot_run_says_why_and_what_could(op, backend):
    with pytest.raises(ValueError, match=f"{op}: backend '{backend}' cannot run this call") as error:
        x = SMALL[op]("cpu", torch.float32).tensors
        getattr(wmkernels, op)(**x, backend=backend)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines][:5] == ["cuda", "triton", "cpu", "chunked", "reference"]
    assert "  chunked: can run it" in lines
    assert "  reference: can run it" in lines
    assert "  cpu: can run it" in lines
    assert any("the tensors are on cpu" in line for line in lines)
    if backend == "tpu":
        assert "there is no backend 'tpu'; the backends are cuda, triton, cpu, chunked, reference" in lines[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", [257, 1025])
@pytest.mark.parametrize("op", ["selective_scan", "selective_step"])
def test_states_past_what_kernels_hold(op, states, dtype):
    problem = SMALL[op]("cpu", dtype, state=states)
    x = {name: value.detach() for name, value in problem.tensors.items() if value is not None}
    with pytest.raises(ValueError, match=f"at most 256 states a channel, this call has {states}"):
        problem.function(**x, backend="cpu")
    expected = problem.function(**x, backend="chunked")
    torch.testing.assert_close(problem.function(**x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("states", [257, 1025])
def test_a_state_update_past_what_kernels_hold(states):
    x = dict(SMALL["selective_step"]("cpu", torch.float32, state=states).tensors)
    u, delta = x.pop("u"), x.pop("delta")
    state, A, B, C = x["state"].clone(), x["A"], x["B"], x["C"]
    expected, after = wmkernels.selective_step(state, u, delta, A, B, C, backend="reference")
    torch.testing.assert_close(wmkernels.selective_state_update(state, u, delta, A, B, C), expected)
    torch.testing.assert_close(state, after)


def test_the_best_backend_is_chosen():
    assert dispatch.choose("selective_scan", torch.device("cpu")) == (dispatch.REQUESTED or "cpu")


@pytest.fixture
def gpu_kernels_that_run(monkeypatch):
    for cached in (dispatch._device_reasons, dispatch._default_backend):
        cached.cache_clear()
    monkeypatch.setattr(dispatch, "REQUESTED", None)
    monkeypatch.setattr(dispatch, "_cuda_reasons", lambda op, device, index: () if device == "cuda" else ("no GPU",))
    monkeypatch.setattr(dispatch, "_triton_reasons", lambda op, device: () if device == "cuda" else ("no GPU",))
    yield
    for cached in (dispatch._device_reasons, dispatch._default_backend):
        cached.cache_clear()


UNVERIFIED = ("conv_lstm", "gated_delta_rule", "place_memory", "ssd_scan", "causal_conv1d")


@pytest.mark.parametrize("op", op_names())
def test_only_kernels_that_were_held_against_the_reference_on_a_gpu_are_chosen(op, gpu_kernels_that_run):
    gpu = torch.device("cuda", 0)
    verified = op not in UNVERIFIED
    assert dispatch.choose(op, gpu) == ("cuda" if verified else "chunked")
    assert OPS[op].verified.get("triton", ()) == ()
    for backend in ("triton", "cuda"):
        assert dispatch.choose(op, gpu, backend) == backend
    with pytest.raises(ValueError, match=f"{op}: backend 'cpu' cannot run this call") as error:
        dispatch.choose(op, gpu, "cpu")
    lines = str(error.value).splitlines()
    assert f"  triton: can run it; {dispatch.UNVERIFIED}" in lines
    assert ("  cuda: can run it" in lines) == verified


def test_a_kernel_verified_on_a_gpu_is_chosen(gpu_kernels_that_run, monkeypatch):
    monkeypatch.setitem(OPS, "conv_lstm", dataclasses.replace(OPS["conv_lstm"], verified={"triton": (90,)}))
    assert dispatch.choose("conv_lstm", torch.device("cuda", 0)) == "triton"


@pytest.mark.parametrize("op", op_names())
def test_where_no_kernel_may_be_chosen_the_chunked_form_runs(op, monkeypatch):
    monkeypatch.setattr(dispatch, "REQUESTED", None)
    assert dispatch.choose(op, torch.device("mps")) == "chunked"
    assert dispatch.choose(op, torch.device("cpu"), state=257) == ("chunked" if OPS[op].max_state == 256 else "cpu")
    monkeypatch.setattr(dispatch, "load_native", lambda: None)
    for cached in (dispatch._device_reasons, dispatch._default_backend):
        cached.cache_clear()
    try:
        assert dispatch.choose(op, torch.device("cpu")) == "chunked"
    finally:
        for cached in (dispatch._device_reasons, dispatch._default_backend):
            cached.cache_clear()


def test_an_instruction_set_that_is_not_there():
    native = dispatch.load_native()
    before = native.cpu_isa()
    with pytest.raises(ValueError, match=r"there is no instruction-set level 'v9' here, only \w+"):
        native.cpu_set_isa("v9")
    assert native.cpu_isa() == before


def test_complex_linear_scans_are_refused():
    gates = torch.zeros(1, 2, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match="linear_scan: gates has dtype complex64, expected float32 or"):
        wmkernels.linear_scan(gates, gates)
