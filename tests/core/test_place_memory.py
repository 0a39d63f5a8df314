"""place_memory: the reference against its equations, kernels against the reference."""

import re

import pytest
import torch
from backends import instruction_sets, on_every_target
from hypothesis import given, settings
from hypothesis import strategies as st
from place_memory_problems import inverse_of, phases, place_memories, small_place_memory, view_keys
from problems import Problem, assert_as_accurate_as_the_reference
from test_concurrency import assert_bitwise, torch_threads
from test_gradients import check_gradients
from test_kernels_match_reference import instruction_set
from torch.utils.flop_counter import FlopCounterMode

import wmkernels
from wmkernels.place_memory.meta import PlaceMemoryInputs

few = settings(max_examples=max(10, settings().max_examples // 3))


def by_numbers(values, phase, keys, inverse, gate, initial_state, initial_phase, reset):
    """One place, frequency and channel at a time, by complex numbers: a state is x - iy, a key c - is."""
    batch, time, places, channels = values.shape
    groups, frequencies = phase.shape[2], keys.shape[1] // 2
    per_group = channels // groups
    out, last = torch.zeros_like(values), torch.zeros_like(initial_state)

    def key(place, f, turn):
        return complex(keys[place, f], -keys[place, frequencies + f]) * complex(turn[f], -turn[frequencies + f])

    for b in range(batch):
        for c in range(channels):
            g, k = divmod(c, per_group)
            h = [
                complex(initial_state[b, g, f, k], -initial_state[b, g, frequencies + f, k]) for f in range(frequencies)
            ]
            turn = initial_phase[b, g].tolist()

            def read(turn, h):
                found = [(key(j, f, turn).conjugate() * h[f]).real for j in range(places) for f in range(frequencies)]
                return [sum(found[j * frequencies : (j + 1) * frequencies]) for j in range(places)]

            for t in range(time):
                if reset[b, t]:
                    h, turn = [0j] * frequencies, [1.0] * frequencies + [0.0] * frequencies
                held = read(turn, h)
                e = [(values[b, t, j, c].item() - held[j]) * gate[b, t, j, g].item() for j in range(places)]
                m = [sum(inverse[i, j].item() * e[j] for j in range(places)) for i in range(places)]
                h = [h[f] + sum(key(j, f, turn) * m[j] for j in range(places)) for f in range(frequencies)]
                turn = phase[b, t, g].tolist()
                out[b, t, :, c] = torch.tensor(read(turn, h), dtype=torch.float64)
            last[b, g, :, k] = torch.tensor([x.real for x in h] + [-x.imag for x in h], dtype=torch.float64)
    return out, last


@on_every_target("place_memory")
def test_the_equations_one_number_at_a_time(target):
    problem = small_place_memory(target.device, time=4)
    reset = torch.tensor([[False, True, False, False], [False, False, False, True]], device=target.device)
    problem.tensors["reset"] = reset
    found = problem.call(target.backend)
    expected = by_numbers(**{name: x.cpu() for name, x in problem.tensors.items()})
    torch.testing.assert_close([x.cpu() for x in found], list(expected), rtol=1e-12, atol=1e-12)


@on_every_target("place_memory", without=("reference",))
@given(data=st.data())
def test_the_kernel_is_as_accurate_as_the_reference(target, data):
    assert_as_accurate_as_the_reference(data.draw(place_memories(device=target.device)), target.backend)


@pytest.mark.parametrize("level", instruction_sets())
@few
@given(data=st.data())
def test_every_instruction_set(level, data):
    with instruction_set(level):
        assert_as_accurate_as_the_reference(data.draw(place_memories(max_time=20)), "cpu")


@on_every_target("place_memory", without=("reference",))
@few
@given(data=st.data())
def test_by_finite_differences(target, data):
    sizes = {"max_time": 4, "max_places": 3, "max_frequencies": 3, "max_channels": 3}
    problem = data.draw(place_memories([torch.float64], target.device, **sizes))
    check_gradients(problem, target.backend, fast_mode=True)


def big_place_memory(time=40, packed=False):
    """Several vectors of channels, groups and sequences."""
    generator = torch.Generator().manual_seed(0)
    keys = view_keys(11, 21, True, generator)
    batch, sequences = (1, 5) if packed else (3, 3)
    tensors = {
        "values": torch.randn(batch, time, 11, 42, generator=generator),
        "phase": phases([batch, time, 2], 21, generator).float(),
        "keys": keys,
        "inverse": inverse_of(keys),
        "gate": torch.rand(batch, time, 11, 2, generator=generator),
        "initial_state": torch.randn(sequences, 2, 42, 21, generator=generator),
        "reset": torch.rand(batch, time, generator=generator) < 0.1,
    }
    if packed:
        tensors["cu_seqlens"] = torch.tensor([0, 3, 3, 20, 21, time])
    return Problem(wmkernels.place_memory, tensors, {"return_last_state": True})


@pytest.mark.parametrize("packed", [False, True])
def test_any_number_of_threads_and_run_after_run(packed):
    problem = big_place_memory(packed=packed)
    first = problem.solve("cpu")
    for count in (1, 2, 3, 16):
        with torch_threads(count):
            assert_bitwise(problem.solve("cpu"), first)


def test_errors_do_not_grow_over_a_long_sequence():
    """Against float64, the last hundred steps are as exact as the first."""
    problem = big_place_memory(time=4000)
    problem.tensors |= {"reset": None, "gate": None}
    out, expected = (x.call("cpu")[0] for x in (problem, problem.in_float64()))
    error = (out - expected).abs().amax((0, 2, 3))
    assert error[-100:].max() < 4 * error[:100].max()


@on_every_target("place_memory")
def test_a_shut_gate_keeps_even_subnormal_states(target):
    problem = small_place_memory(target.device, torch.float32, time=20)
    problem.tensors["gate"] = torch.zeros_like(problem.tensors["gate"])
    tiny = torch.tensor([1e-40, -1e-42, 1.0, -2.5], device=target.device)
    problem.tensors["initial_state"] = tiny[torch.randint(4, (2, 2, 2, 2))]
    _, last = problem.call(target.backend)
    assert torch.equal(last.view(torch.int32), problem.tensors["initial_state"].view(torch.int32))


@on_every_target("place_memory")
def test_nan_is_nan_where_it_is_in_the_reference(target):
    for name in ("values", "phase", "gate", "initial_state"):
        problem = small_place_memory(target.device, torch.float32, time=4)
        poisoned = problem.tensors[name].clone()
        poisoned[0] = float("nan")
        problem.tensors[name] = poisoned
        found, expected = (problem.call(backend)[0].isnan() for backend in (target.backend, "reference"))
        assert torch.equal(found, expected), name
        assert not found[1].any()


@on_every_target("place_memory")
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs(target, sizes):
    batch, time, channels = sizes
    problem = small_place_memory(target.device, torch.float32, batch=2, time=3)
    x = problem.leaves()
    cut = {
        "values": x["values"][:batch, :time, :, :channels],
        "phase": x["phase"][:batch, :time],
        "gate": x["gate"][:batch, :time],
        "initial_state": x["initial_state"][:batch, ..., : channels // 2],
        "initial_phase": x["initial_phase"][:batch],
    }
    out, last = problem.call(target.backend, {**x, **cut})
    assert out.shape == (*sizes[:2], 2, channels)
    assert torch.equal(last, cut["initial_state"])
    gradient = torch.autograd.grad(last.sum() + out.sum(), x["initial_state"])[0]
    assert gradient.sum() == cut["initial_state"].numel()


@on_every_target("place_memory")
def test_packed_sequences_of_which_most_are_empty(target):
    problem = small_place_memory(target.device, batch=1, time=3)
    firsts = {name: torch.cat([problem.tensors[name]] * 4) for name in ("initial_state", "initial_phase")}
    bounds = torch.tensor([0, 0, 3, 3, 3], device=target.device)
    out, last = problem.call(target.backend, {**firsts, "cu_seqlens": bounds})
    expected, expected_last = problem.call(target.backend)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        last, torch.cat([firsts["initial_state"][:1], expected_last, firsts["initial_state"][2:]])
    )


@on_every_target("place_memory", kernels_only=True)
@pytest.mark.parametrize("delta", [True, False])
def test_the_registration(target, delta):
    x = small_place_memory(target.device, torch.bfloat16 if delta else torch.float32).leaves()
    reset = torch.tensor([[False, True], [True, False]], device=target.device)
    inputs = [x[name] for name in PlaceMemoryInputs._fields[:7]]
    if not delta:
        inputs[3] = inputs[4] = None
    tracing = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.wmkernels.place_memory_forward.default
    torch.library.opcheck(op, (*inputs, reset, None, True, target.backend), test_utils=tracing)
    inputs = [None if v is None else v.detach() for v in inputs]
    out, last, residual = op(*inputs, reset, None, True, target.backend)
    assert residual.numel() == (out.numel() if delta else 0)
    backward = torch.ops.wmkernels.place_memory_backward.default
    for wanted in ((True, True), (False, False)):
        arguments = (torch.randn_like(out), torch.randn_like(last), *inputs, reset, None, residual, *wanted)
        torch.library.opcheck(backward, (*arguments, target.backend), test_utils=tracing)


@on_every_target("place_memory", kernels_only=True)
def test_without_gradients_no_residual_is_kept(target):
    x = small_place_memory(target.device, torch.float32).tensors
    inputs = [x[name] for name in PlaceMemoryInputs._fields[:7]]
    found = torch.ops.wmkernels.place_memory_forward(*inputs, None, None, False, target.backend)
    assert found[2].numel() == 0
    assert torch.equal(found[0], torch.ops.wmkernels.place_memory_forward(*inputs, None, None, True, target.backend)[0])


def test_counted_operations():
    problem = small_place_memory("cpu", torch.float32)
    values, keys = problem.tensors["values"], problem.tensors["keys"]
    leaves = {**problem.tensors, "values": values.detach().requires_grad_()}
    with FlopCounterMode(display=False) as forward:
        out, _ = problem.call("cpu", leaves)
    expected = 2 * values.numel() * (2 * keys.shape[1] + len(keys))  # a write, a read, the product by the inverse
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == expected


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


ERRORS = {
    "values": (
        {"values": zeros(2, 2, 2)},
        ValueError,
        "values has shape (2, 2, 2), expected (batch, time, places",
    ),
    "keys": ({"keys": zeros(2, 3)}, ValueError, "keys has shape (2, 3), expected (places, 2 * frequencies), cosines"),
    "places": ({"keys": zeros(3, 2)}, ValueError, "keys has shape (3, 2), expected (places=2, 2 * frequencies=2)"),
    "phase": ({"phase": zeros(2, 2, 2)}, ValueError, "phase has shape (2, 2, 2), expected (batch, time, groups, 2 *"),
    "time": (
        {"phase": zeros(2, 3, 2, 2)},
        ValueError,
        "phase has shape (2, 3, 2, 2), expected (batch=2, time=2",
    ),
    "groups": ({"phase": zeros(2, 2, 3, 2)}, ValueError, "phase has 3 groups, expected a divisor of channels=4"),
    "inverse": ({"inverse": zeros(2, 3)}, ValueError, "inverse has shape (2, 3), expected (places=2, places=2)"),
    "gate": ({"gate": zeros(2, 2, 2)}, ValueError, "gate has shape (2, 2, 2), expected (batch=2, time=2, places=2, gr"),
    "state": ({"initial_state": zeros(2, 2, 2, 3)}, ValueError, "initial_state has shape (2, 2, 2, 3), expected (ba"),
    "first": ({"initial_phase": zeros(1, 2, 2)}, ValueError, "initial_phase has shape (1, 2, 2), expected (batch=2"),
    "dtype": ({"phase": zeros(2, 2, 2, 2, dtype=torch.float64)}, TypeError, "phase has dtype float64, expected float3"),
    "reset": (
        {"reset": zeros(2, 3, dtype=torch.bool)},
        ValueError,
        "reset has shape (2, 3), expected (batch=2, time=2)",
    ),
    "packing": (
        {"cu_seqlens": torch.tensor([0, 2])},
        ValueError,
        "values has a batch of 2, expected 1",
    ),
    "device": ({"gate": zeros(2, 2, 2, 2, device="meta")}, ValueError, "gate is on meta, expected cpu as values is"),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_bad_input_says_what_was_expected(case):
    changes, error, message = ERRORS[case]
    with pytest.raises(error, match=re.escape(f"place_memory: {message}")):
        wmkernels.place_memory(**small_place_memory("cpu", torch.float32).tensors | changes)


def test_sequences_that_do_not_end_at_the_last_step_are_refused():
    x = small_place_memory("cpu", torch.float32, batch=1).tensors
    for backend in ("cpu", "chunked", "reference"):
        with pytest.raises(ValueError, match=r"place_memory: cu_seqlens is \[0, 1\], expected bounds that rise"):
            wmkernels.place_memory(**x, cu_seqlens=torch.tensor([0, 1]), backend=backend)
