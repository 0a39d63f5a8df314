"""place_memory: the reference against its equations, kernels against the reference."""

import pytest
import torch
from backends import instruction_sets, on_every_target
from hypothesis import given, settings
from hypothesis import strategies as st
from place_memory_problems import place_memories, small_place_memory
from problems import assert_as_accurate_as_the_reference
from test_gradients import check_gradients
from test_kernels_match_reference import instruction_set

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
