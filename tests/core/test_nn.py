"""wmkernels.nn beyond the laws."""

import copy
import doctest
import io
import pathlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from backends import on_every_target
from recurrences_nn import random_state, resets
from tolerances import GRADCHECK, SAME_KERNEL

from wmkernels.nn import CausalConv1d, Mamba

SCANS = on_every_target("selective_scan")
GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "modules.md"


def rollout(module, inputs, state, reset=None):
    outputs = []
    for t in range(inputs.shape[1]):
        output, state = module.step(inputs[:, t], state, None if reset is None else reset[:, t])
        outputs.append(output)
    return torch.stack(outputs, 1), state


def assert_near(actual, expected, dtype):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=SAME_KERNEL[dtype] * scale)


def published_mamba(weights, inputs):
    """The block of Gu & Dao 2023 in plain PyTorch."""
    rank, (inner, states) = weights["dt_proj.weight"].shape[1], weights["A_log"].shape
    x, z = F.linear(inputs, weights["in_proj.weight"], weights.get("in_proj.bias")).chunk(2, -1)
    kernel = weights["conv1d.weight"]
    x = F.conv1d(x.mT, kernel, weights.get("conv1d.bias"), padding=kernel.shape[2] - 1, groups=inner).mT
    x = F.silu(x[:, : inputs.shape[1]])
    low_rank, B, C = F.linear(x, weights["x_proj.weight"]).split([rank, states, states], -1)
    delta = F.softplus(F.linear(low_rank, weights["dt_proj.weight"], weights["dt_proj.bias"]))
    h, outputs = x.new_zeros(len(x), inner, states), []
    for t in range(inputs.shape[1]):
        decay = torch.exp(-delta[:, t, :, None] * weights["A_log"].exp())
        h = decay * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1))
    y = (torch.stack(outputs, 1) + weights["D"] * x) * F.silu(z)
    return F.linear(y, weights["out_proj.weight"], weights.get("out_proj.bias"))


@SCANS
@pytest.mark.parametrize("arguments", [{}, {"d_state": 5, "d_conv": 2, "expand": 3, "dt_rank": 4, "bias": True}])
def test_it_computes_the_published_block(target, arguments):
    module = Mamba(24, **arguments, backend=target.backend, device=target.device, dtype=torch.float64)
    inputs = torch.randn(2, 17, 24, dtype=torch.float64, device=target.device)
    outputs, _ = module(inputs)
    assert_near(outputs, published_mamba(module.state_dict(), inputs), torch.float64)


def test_its_state_dict_is_that_of_existing_mamba_blocks():
    shapes = {name: tuple(value.shape) for name, value in Mamba(64).state_dict().items()}
    assert shapes == {
        "A_log": (128, 16),
        "D": (128,),
        "in_proj.weight": (256, 64),
        "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,),
        "x_proj.weight": (4 + 2 * 16, 128),
        "dt_proj.weight": (128, 4),
        "dt_proj.bias": (128,),
        "out_proj.weight": (64, 128),
    }


def test_initial_values():
    module = Mamba(40, d_state=6, dt_min=0.01, dt_max=0.05)
    torch.testing.assert_close(module.A_log.exp(), torch.arange(1.0, 7).expand(80, 6))
    assert torch.equal(module.D, torch.ones(80))
    step = F.softplus(module.dt_proj.bias)
    assert step.min() >= 0.0099 and step.max() <= 0.0501 and step.std() > 0.005
    assert module.dt_proj.weight.abs().max() <= module.dt_rank**-0.5
    constant = Mamba(40, dt_rank=4, dt_init="constant", dt_scale=3.0, dt_init_floor=0.2)
    assert torch.equal(constant.dt_proj.weight, torch.full((80, 4), 1.5))
    torch.testing.assert_close(F.softplus(constant.dt_proj.bias), torch.full((80,), 0.2))


def test_initialisation_is_reproducible():
    torch.manual_seed(5)
    first = Mamba(16, bias=True)
    torch.manual_seed(5)
    second = Mamba(16, bias=True)
    third = Mamba(16, bias=True)
    torch.manual_seed(5)
    third.reset_parameters()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(value, third.state_dict()[name]), name


@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(m).double()]
)
def test_optimizers_are_told_what_not_to_decay(copied):
    module = copied(Mamba(8))
    exempt = {name for name, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert exempt == {"A_log", "D"}
    assert module.dt_proj.bias._no_reinit


@SCANS
def test_a_copy_and_a_reloaded_module_compute_the_same(target):
    module = Mamba(12, backend=target.backend, device=target.device)
    inputs, state = torch.randn(2, 9, 12, device=target.device), random_state(module, 2)
    expected = module(inputs, state)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    reloaded = Mamba(12, backend=target.backend, device=target.device)
    reloaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), reloaded):
        torch.testing.assert_close(other(inputs, state), expected, rtol=0, atol=0)


def test_the_convolution_is_that_of_conv1d():
    for bias in (True, False):
        torch.manual_seed(3)
        peer = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3, bias=bias)
        torch.manual_seed(3)
        ours = CausalConv1d(6, 4, bias=bias)
        assert all(torch.equal(value, ours.state_dict()[name]) for name, value in peer.state_dict().items())
        inputs = torch.randn(2, 11, 6)
        assert_near(ours(inputs)[0], peer(inputs.mT)[..., :11].mT, torch.float32)


@SCANS
def test_gradcheck_through_state_and_resets(target):
    module = Mamba(3, d_state=2, d_conv=3, backend=target.backend, device=target.device, dtype=torch.float64)
    reset = resets(2, 6, target.device)
    names = [name for name, _ in module.named_parameters()]

    def run(inputs, window, scan, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        given = (inputs, {"window": window, "scan": scan}, reset)
        outputs, state = torch.func.functional_call(module, weights, given)
        return outputs, state["window"], state["scan"]

    state = random_state(module, 2)
    inputs = torch.randn(2, 6, 3, dtype=torch.float64, device=target.device)
    leaves = [inputs, state["window"], state["scan"], *(p.detach() for p in module.parameters())]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in leaves], **GRADCHECK)


@SCANS
def test_autocast_keeps_the_state_in_float32(target):
    module = Mamba(16, backend=target.backend, device=target.device)
    inputs, reset = torch.randn(2, 12, 16, device=target.device), resets(2, 12, target.device)
    exact, _ = module(inputs, reset=reset)
    with torch.autocast(target.device, torch.bfloat16):
        outputs, state = module(inputs, reset=reset)
        stepped, last = rollout(module, inputs, module.init_state(2), reset)
    assert outputs.dtype == torch.bfloat16
    assert {value.dtype for value in (*state.values(), *last.values())} == {torch.float32}
    assert_near(stepped, outputs, torch.bfloat16)
    # Four projections round to eight bits.
    torch.testing.assert_close(outputs.float(), exact, rtol=0, atol=0.03 * exact.abs().max().item())
    outputs.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in module.parameters())


@SCANS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_module_keeps_decay_and_state_in_float32(target, dtype):
    module = Mamba(16, backend=target.backend, device=target.device, dtype=dtype)
    assert module.A_log.dtype == module.D.dtype == torch.float32
    inputs = torch.randn(2, 12, 16, device=target.device, dtype=dtype)
    for whole in (module, copy.deepcopy(module).to(dtype)):
        outputs, state = whole(inputs)
        assert outputs.dtype == dtype
        assert {value.dtype for value in state.values()} == {torch.float32}
        stepped, _ = rollout(whole, inputs, whole.init_state(2))
        assert_near(stepped, outputs, dtype)


def test_the_convolution_sums_in_float32():
    module = CausalConv1d(4, kernel_size=4, bias=False)
    torch.nn.init.ones_(module.weight)
    inputs = torch.tensor([256.0, 1.0, 1.0, 1.0]).repeat(4, 1).T[None].bfloat16()
    assert module(inputs)[0][0, 3, 0] == torch.tensor(259.0).bfloat16() != 256


@SCANS
def test_gradients_of_each_sample_by_vmap(target):
    module = Mamba(4, d_state=3, backend=target.backend, device=target.device, dtype=torch.float64)
    inputs = torch.randn(3, 7, 4, dtype=torch.float64, device=target.device)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights, sample):
        return torch.func.functional_call(module, weights, (sample[None],))[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, inputs)
    for index, sample in enumerate(inputs):
        alone = torch.func.grad(loss)(weights, sample)
        for name, gradient in alone.items():
            assert_near(together[name][index], gradient, torch.float64)


@SCANS
def test_activation_checkpointing_changes_nothing(target):
    module = Mamba(8, backend=target.backend, device=target.device)
    inputs = torch.randn(2, 9, 8, device=target.device, requires_grad=True)
    kept, _ = module(inputs)
    again, _ = torch.utils.checkpoint.checkpoint(module, inputs, use_reentrant=False)
    expected, actual = (torch.autograd.grad(x.square().sum(), inputs)[0] for x in (kept, again))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("module", [Mamba(8, backend="reference"), CausalConv1d(8)], ids=["Mamba", "CausalConv1d"])
def test_a_state_is_never_changed_and_holds_no_more_than_itself(module):
    state = random_state(module, 2)
    before = {name: value.clone() for name, value in state.items()}
    inputs = torch.randn(2, 50, 8)
    with torch.no_grad():
        results = [module(inputs, state), module.step(inputs[:, 0], state), module(inputs, state, resets(2, 50))]
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    for _, after in results:
        for value in after.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_a_step_without_a_state_is_the_first():
    for module in (Mamba(8, backend="reference"), CausalConv1d(8)):
        inputs = torch.randn(2, 8)
        torch.testing.assert_close(module.step(inputs, None), module.step(inputs, module.init_state(2)))


def test_construction_on_a_device_in_a_dtype():
    module = Mamba(8, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {name for name, p in module.named_parameters() if p.dtype != torch.bfloat16} == {"A_log", "D"}
    assert {value.device.type for value in module.init_state(2).values()} == {"meta"}
    assert {value.dtype for value in Mamba(8).double().init_state(2).values()} == {torch.float64}


def test_repr_shows_the_arguments():
    assert "8, d_state=16, d_conv=4, expand=2, dt_rank=1\n" in repr(Mamba(8))
    assert "backend='reference'" in repr(Mamba(8, backend="reference"))
    assert repr(CausalConv1d(8, bias=False)) == "CausalConv1d(8, kernel_size=4, bias=False)"


def wrong_state(**changed):
    return {**Mamba(8).init_state(2), **changed}


SEQUENCE, BOUNDS = torch.zeros(2, 5, 8), torch.tensor([0, 3, 5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mamba(0), "d_model is 0, expected a whole number, at least 1"),
        (lambda: Mamba(8, dt_rank="all"), "dt_rank is 'all'"),
        (lambda: Mamba(8, dt_init="zero"), "dt_init is 'zero', expected 'random' or 'constant'"),
        (lambda: Mamba(8, dt_min=0.2), "dt_min is 0.2 and dt_max 0.1"),
        (lambda: CausalConv1d(8, kernel_size=0), "kernel_size is 0, expected a whole number, at least 1"),
        (lambda: Mamba(8, backend="fast")(SEQUENCE), "there is no backend 'fast'"),
        (lambda: Mamba(8)(SEQUENCE[..., :7]), r"inputs has shape \(2, 5, 7\), expected \(batch, time, d_model=8\)"),
        (lambda: Mamba(8)(SEQUENCE[0]), r"inputs has shape \(5, 8\), .* step\(\) takes one step of time"),
        (lambda: Mamba(8).step(SEQUENCE, None), r"input has shape \(2, 5, 8\), expected \(batch, d_model=8\)"),
        (lambda: Mamba(8)(SEQUENCE.long()), "inputs has dtype int64"),
        (lambda: Mamba(8)([1.0]), "inputs is a list, expected a torch.Tensor"),
        (lambda: Mamba(8)(SEQUENCE, torch.zeros(2, 16, 16)), r"state is a Tensor, expected a dict with \['scan', "),
        (lambda: Mamba(8)(SEQUENCE, {"scan": 0}), r"state is the keys \['scan'\], expected a dict"),
        (
            lambda: Mamba(8)(SEQUENCE[:1], wrong_state()),
            r"state\['window'\] has shape \(2, 3, 16\), expected \(1, 3, 16\)",
        ),
        (lambda: Mamba(8)(SEQUENCE, wrong_state(scan=torch.zeros(2, 16, 1))), r"state\['scan'\] has shape"),
        (
            lambda: Mamba(8)(SEQUENCE, wrong_state(scan=torch.zeros(2, 16, 16, device="meta"))),
            "is on meta, expected cpu",
        ),
        (lambda: Mamba(8)(SEQUENCE, None, torch.zeros(2, 5)), "reset has dtype float32, expected bool"),
        (
            lambda: Mamba(8)(SEQUENCE, None, torch.zeros(2, 4) > 0),
            r"reset has shape \(2, 4\), expected \(batch=2, time=5\)",
        ),
        (
            lambda: Mamba(8).step(SEQUENCE[:, 0], None, torch.zeros(3) > 0),
            r"reset has shape \(3,\), expected \(batch=2\)",
        ),
        (lambda: Mamba(8)(SEQUENCE, cu_seqlens=BOUNDS), "a batch of 2, expected 1 with cu_seqlens"),
        (
            lambda: Mamba(8)(SEQUENCE[:1], cu_seqlens=BOUNDS[:1]),
            r"cu_seqlens has shape \(1,\), expected \(sequences \+ 1,\)",
        ),
        (lambda: Mamba(8)(SEQUENCE[:1], cu_seqlens=BOUNDS * 2), "expected bounds that rise from 0 to time=5"),
        (lambda: Mamba(8)(SEQUENCE[:1], cu_seqlens=BOUNDS / 1), "cu_seqlens has dtype float32"),
    ],
)
def test_an_error_says_what_was_expected(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_the_guide_runs():
    results = doctest.testfile(str(GUIDE), module_relative=False, raise_on_error=True)
    assert results.attempted > 5
