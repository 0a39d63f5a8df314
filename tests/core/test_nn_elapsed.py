"""Time between steps: a memory without input knows only how long it waited."""

import pytest
import torch
from backends import on_every_target
from tolerances import GRADCHECK

from wmkernels.nn import BlockScan, Mamba, RotaryMamba

SCANS = on_every_target("selective_scan")


def without_input(kind, target, **arguments):
    """No bias of the convolution and a window of one step: x is 0, and so are B and C."""
    return kind(6, 4, d_conv=1, conv_bias=False, backend=target.backend, device=target.device, **arguments).double()


@SCANS
@pytest.mark.parametrize("kind", [Mamba, RotaryMamba])
@pytest.mark.parametrize("single_step", [False, True])
def test_one_step_of_n_is_n_steps_without_input(target, kind, single_step):
    torch.manual_seed(0)
    arguments = {"groups": 3, "selective_angle": True} if kind is RotaryMamba else {}
    module = without_input(kind, target, **arguments)
    state = {name: torch.randn_like(x) for name, x in module.init_state(2).items()}
    leaves = [x.requires_grad_() for x in [*state.values(), module.A_log, module.dt_proj.bias] if x.numel()]
    n = torch.tensor([3.0, 5.0], dtype=torch.float64, device=target.device)
    zeros = torch.zeros(2, 5, 6, dtype=torch.float64, device=target.device)
    if single_step:
        _, leapt = module.step(zeros[:, 0], state, elapsed=n)
    else:
        _, leapt = module(zeros[:, :1], state, elapsed=n[:, None])
    waited = [module(zeros[i : i + 1, : int(n[i])], {k: v[i : i + 1] for k, v in state.items()})[1] for i in range(2)]
    waited = {name: torch.cat([x[name] for x in waited]) for name in leapt}
    torch.testing.assert_close(leapt["scan"], waited["scan"])
    if kind is RotaryMamba:
        torch.testing.assert_close(leapt["angle"].cos(), waited["angle"].cos())
        torch.testing.assert_close(leapt["angle"].sin(), waited["angle"].sin())
    weights = torch.randn_like(leapt["scan"])
    found, expected = (
        torch.autograd.grad((x["scan"] * weights).sum(), leaves, allow_unused=True) for x in (leapt, waited)
    )
    torch.testing.assert_close(found, expected)


@SCANS
@pytest.mark.parametrize("kind", [Mamba, RotaryMamba])
def test_steps_of_unequal_times_are_the_rollout(target, kind):
    module = kind(6, 4, backend=target.backend, device=target.device).double()
    inputs = torch.randn(2, 7, 6, dtype=torch.float64, device=target.device)
    elapsed = torch.rand(2, 7, dtype=torch.float64, device=target.device) * 4
    outputs, last = module(inputs, elapsed=elapsed)
    state = module.init_state(2)
    for t in range(7):
        output, state = module.step(inputs[:, t], state, elapsed=elapsed[:, t])
        torch.testing.assert_close(output, outputs[:, t])
    torch.testing.assert_close(state, last)
    ones, _ = module(inputs, elapsed=torch.ones_like(elapsed))
    torch.testing.assert_close(ones, module(inputs)[0])
    assert not torch.allclose(outputs, ones, rtol=0, atol=1e-7)


def test_elapsed_time_has_a_gradient_and_16_bits_do_not_round_it():
    module = RotaryMamba(4, 2, backend="reference").double()
    inputs, elapsed = torch.randn(2, 5, 4).double(), torch.rand(2, 5).double() + 0.5
    turn = torch.randn(2, 5, 1, 1).double()
    leaves = [x.requires_grad_() for x in (inputs, elapsed, turn)]
    assert torch.autograd.gradcheck(
        lambda x, e, t: module(x, elapsed=e, turn=t)[0], leaves, fast_mode=True, **GRADCHECK
    )
    module, elapsed = Mamba(8), torch.full((1, 6), 1000.5)
    inputs = torch.randn(1, 6, 8)
    exact, _ = module(inputs, elapsed=elapsed)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = module(inputs, elapsed=elapsed)
    assert (outputs.dtype, state["scan"].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(outputs.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


@SCANS
def test_a_turn_adds_to_the_angles(target):
    module = RotaryMamba(6, 4, groups=3, backend=target.backend, device=target.device).double()
    inputs = torch.randn(2, 7, 6, dtype=torch.float64, device=target.device)
    faster = RotaryMamba(6, 4, groups=3, backend=target.backend, device=target.device).double()
    faster.load_state_dict(module.state_dict())
    with torch.no_grad():
        faster.angle_rate += 0.25
    turn = torch.full((2, 7, 3, 2), 0.25, dtype=torch.float64, device=target.device)
    expected, last = faster(inputs)
    outputs, found = module(inputs, turn=turn)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(found, last)
    output, _ = module.step(inputs[:, 0], None, turn=turn[:, 0])
    torch.testing.assert_close(output, expected[:, 0])
    opposite, _ = module(inputs, turn=-2 * module.angle_rate.detach().expand(2, 7, 3, 2).double())
    torch.testing.assert_close(opposite, mirrored(module, inputs))
    with pytest.raises(
        ValueError, match=r"RotaryMamba: turn has shape \(2, 7, 3\), expected \(batch=2, time=7, groups=3"
    ):
        module(inputs, turn=turn[..., 0])


def mirrored(module, inputs):
    """The memory whose angles run backwards."""
    other = RotaryMamba(6, 4, groups=3, backend=module.backend, device=inputs.device).double()
    other.load_state_dict({**module.state_dict(), "angle_rate": -module.angle_rate.detach()})
    return other(inputs)[0]


def test_elapsed_time_of_a_frame_passes_before_its_first_token():
    memory = Mamba(4, 2, d_conv=1, conv_bias=False).double()
    module = BlockScan(memory, (1, 2), (1, 4))
    state = {name: torch.randn_like(x) for name, x in module.init_state(1).items()}
    zeros, elapsed = torch.zeros(1, 1, 4, 4, dtype=torch.float64), torch.tensor([[6.0]], dtype=torch.float64)
    _, leapt = module(zeros, state, elapsed=elapsed)
    for index in range(2):
        own = {name: x[:, index] for name, x in state.items()}
        _, waited = memory(torch.zeros(1, 7, 4, dtype=torch.float64), own)
        torch.testing.assert_close(leapt["scan"][:, index], waited["scan"])
