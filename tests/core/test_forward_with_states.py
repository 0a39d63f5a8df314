"""forward_with_states is a call for each part, in one."""

import pytest
import torch

from wmkernels.nn import CausalConv1d, GatedDeltaNet, Mamba, RotaryMamba
from wmkernels.nn.memory_module import forward_in_parts, forward_with_states, takes_elapsed

WIDTH, TIME, STOPS = 6, 11, [1, 4, 5, 9]
MODULES = {
    "CausalConv1d": lambda: CausalConv1d(WIDTH, 4),
    "CausalConv1d of one tap": lambda: CausalConv1d(WIDTH, 1),
    "Mamba": lambda: Mamba(WIDTH, 4, groups=2),
    "RotaryMamba": lambda: RotaryMamba(WIDTH, 4, groups=2, d_conv=3, selective_angle=True, selective_speed=True),
    "GatedDeltaNet": lambda: GatedDeltaNet(WIDTH, heads=2, d_head=4),
}


def case(name):
    torch.manual_seed(0)
    module = MODULES[name]().double()
    inputs = torch.randn(3, TIME, WIDTH, dtype=torch.float64, requires_grad=True)
    _, state = module(torch.randn(3, 5, WIDTH, dtype=torch.float64))
    state = {key: value.detach().requires_grad_() for key, value in state.items()}
    reset = torch.zeros(3, TIME, dtype=torch.bool)
    reset[0, [2, 3]] = reset[1, 8] = reset[2, 4] = True
    elapsed = torch.rand(3, TIME, dtype=torch.float64) if takes_elapsed(module) else None
    return module, (inputs, STOPS, state, reset), {"elapsed": elapsed}


def gradients(module, arguments, found):
    outputs, states = found
    torch.manual_seed(1)
    total = (outputs * torch.randn_like(outputs)).sum()
    for state in states:
        total = total + sum((value * torch.randn_like(value)).sum() for value in state.values() if value.numel())
    leaves = [arguments[0], *arguments[2].values(), *module.parameters()]
    return torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize("name", MODULES)
def test_outputs_states_and_gradients_are_those_of_the_parts(name):
    module, arguments, options = case(name)
    found = forward_with_states(module, *arguments, **options)
    expected = forward_in_parts(module, *arguments, **options)
    assert len(found[1]) == len(STOPS)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(gradients(module, arguments, each) for each in (found, expected)), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["Mamba", "CausalConv1d"])
def test_a_hook_sees_every_part(name):
    module, arguments, options = case(name)
    lengths = []
    module.register_forward_hook(lambda module, inputs, outputs: lengths.append(inputs[0].shape[1]))
    forward_with_states(module, *arguments, **options)
    assert lengths == [1, 3, 1, 4, 2]


@pytest.mark.parametrize("stops", [[0], [3, 3], [5, 4], [TIME + 1]])
def test_steps_that_do_not_rise_or_are_not_there_are_refused(stops):
    module, (inputs, *_), _ = case("Mamba")
    with pytest.raises(ValueError, match=rf"expected to rise from 1 to {TIME}"):
        forward_with_states(module, inputs, stops)


def test_without_stops_there_is_no_state():
    module, (inputs, *_), _ = case("RotaryMamba")
    outputs, states = forward_with_states(module, inputs, [])
    torch.testing.assert_close(outputs, module(inputs)[0])
    assert states == []
