"""Weights by another way: adapters, hooks, pruning, parametrisations, quantisation and sharding act as on nn.Linear."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from wmkernels.nn import ConvLSTM, ConvLSTMCell, Mamba, RotaryMamba, no_decay_parameters

BLOCKS = {
    "Mamba": lambda **options: Mamba(8, d_state=4, **options),
    "RotaryMamba": lambda **options: RotaryMamba(8, d_state=4, selective_angle=True, selective_speed=True, **options),
}
every_block = pytest.mark.parametrize("block", list(BLOCKS))
PROJECTIONS = ["in_proj", "x_proj", "dt_proj", "out_proj"]


def both(module, inputs):
    """Outputs of the sequence and of the steps."""
    state, outputs = None, []
    for t in range(inputs.shape[1]):
        output, state = module.step(inputs[:, t], state)
        outputs.append(output)
    return module(inputs)[0], torch.stack(outputs, 1)


class LowRank(nn.Module):
    """An adapter: what the module returns, and a low-rank product."""

    def __init__(self, base, features, width):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(width, 2, bias=False), nn.Linear(2, features, bias=False)

    def forward(self, x, *args, **options):
        found = self.base(x, *args, **options)
        low = self.up(self.down(x))
        return (found[0] + low, found[1]) if isinstance(found, tuple) else found + low


@every_block
def test_every_submodule_is_called_by_a_sequence_and_by_a_step(block):
    module, called = BLOCKS[block](), []
    for name, part in module.named_modules():
        part.register_forward_hook(lambda part, args, output, name=name: called.append(name))
    inputs, names = torch.randn(2, 3, 8), {name for name, _ in module.named_modules()}
    module(inputs)
    assert set(called) == names
    called.clear()
    module.step(inputs[:, 0], None)
    assert set(called) == names


@every_block
@pytest.mark.parametrize("name", [*PROJECTIONS, "conv1d"])
def test_an_adapter_counts_and_trains(block, name):
    module, inputs = BLOCKS[block](dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    plain, _ = both(module, inputs)
    base = getattr(module, name)
    features = module.d_inner if name == "conv1d" else base.out_features
    adapter = LowRank(base, features, features if name == "conv1d" else base.in_features).double()
    setattr(module, name, adapter)
    nn.init.zeros_(adapter.up.weight)
    for found in both(module, inputs):
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)  # with the bias, once
    nn.init.normal_(adapter.up.weight)
    sequence, stepped = both(module, inputs)
    torch.testing.assert_close(stepped, sequence, rtol=0, atol=1e-12)
    assert not torch.allclose(sequence, plain)
    sequence.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters() if p is not base)


@every_block
def test_a_hook_changes_the_step_size_with_its_bias(block):
    module, inputs = BLOCKS[block](dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    scaled = copy.deepcopy(module)
    with torch.no_grad():
        scaled.dt_proj.weight.mul_(2), scaled.dt_proj.bias.mul_(2)
    module.dt_proj.register_forward_hook(lambda part, args, output: 2 * output)
    for found, expected in zip(both(module, inputs), both(scaled, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


REWRITES = {
    "pruned": lambda part: prune.random_unstructured(part, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": lambda part: parametrizations.spectral_norm(part).eval(),
    "hooks of weight norm": nn.utils.weight_norm,
}


@every_block
@pytest.mark.parametrize("rewrite", list(REWRITES))
@pytest.mark.parametrize("name", [*PROJECTIONS, "conv1d"])
def test_a_weight_that_is_computed_is_the_one_used_and_trains(block, rewrite, name):
    module, inputs = BLOCKS[block](dtype=torch.float64).eval(), torch.randn(2, 4, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        REWRITES[rewrite](getattr(module, name))
    plain = BLOCKS[block](dtype=torch.float64)
    for _ in range(2):
        module(inputs)
        weights = {key: value for key, value in module.state_dict().items() if key in plain.state_dict()}
        weights[f"{name}.weight"] = getattr(module, name).weight.detach()
        plain.load_state_dict(weights)
        for found, expected in zip(both(module, inputs), both(plain, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        trained = [p for key, p in module.named_parameters() if key.startswith(f"{name}.") and "bias" not in key]
        output, _ = module.step(inputs[:, 0], None)
        gradients = torch.autograd.grad(output.square().sum(), trained)
        with torch.no_grad():
            for p, gradient in zip(trained, gradients, strict=True):
                p.sub_(0.1 * gradient)


@pytest.mark.parametrize("make", [lambda: ConvLSTM(2, 3, 3, 2), lambda: ConvLSTMCell(2, 3, 3), lambda: Mamba(8)])
def test_a_pruned_parameter_of_the_module_itself_is_new_in_each_step(make):
    module = make()
    name = "A_log" if isinstance(module, Mamba) else next(iter(dict(module.named_parameters())))
    prune.random_unstructured(module, name, 0.5)
    inputs = torch.randn(2, 8) if isinstance(module, Mamba) else torch.randn(2, 2, 4, 4)
    for _ in range(2):
        module.step(inputs, None)[0].square().sum().backward()  # a stale mask would be freed by now


def test_dynamic_quantisation():
    module, inputs = Mamba(32), torch.randn(2, 6, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear})
    assert type(quantised.dt_proj).__module__.startswith("torch.ao.nn.quantized")
    with torch.no_grad():
        for found, expected in zip(both(quantised, inputs), both(module, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert quantised.init_state(2).keys() == module.init_state(2).keys()


@every_block
def test_weights_that_exist_only_during_a_call(block):
    """As sharding does: gathered before a module's call, freed after it."""
    module, inputs = BLOCKS[block](), torch.randn(2, 4, 8)
    with torch.no_grad():
        expected = both(module, inputs)
        for part in module.children():
            kept = {name: p.detach().clone() for name, p in part.named_parameters()}

            def gather(part, args, kept=kept):
                for name, p in part.named_parameters():
                    p.untyped_storage().resize_(p.numel() * p.itemsize)
                    p.copy_(kept[name])

            def free(part, args, output):
                for p in part.parameters():
                    p.untyped_storage().resize_(0)

            part.register_forward_pre_hook(gather)
            part.register_forward_hook(free)
            free(part, None, None)
        for found, whole in zip(both(module, inputs), expected, strict=True):
            torch.testing.assert_close(found, whole)


def test_a_subclass_with_a_forward_of_its_own_steps():
    class Doubled(Mamba):
        def forward(self, inputs, state=None, reset=None):
            outputs, state = super().forward(inputs, state, reset)
            return 2 * outputs, state

    module, inputs = Doubled(8), torch.randn(2, 3, 8)
    torch.testing.assert_close(module.step(inputs[:, 0], None)[0], module(inputs)[0][:, 0] / 2)


ROUTES = {
    "made": lambda m: m,
    "loaded by assignment": lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()},
                                                         assign=True), m)[1],
    "from meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "copied": copy.deepcopy,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    "cast": lambda m: m.double(),
    "inside a model, loaded by assignment": lambda m: (
        nn.Sequential(m).load_state_dict({f"0.{k}": v.clone() for k, v in m.state_dict().items()}, assign=True), m)[1],
    "loaded after a copy": lambda m: ROUTES["loaded by assignment"](copy.deepcopy(m)),
}  # fmt: skip


@every_block
@pytest.mark.parametrize("route", list(ROUTES))
def test_marks_against_weight_decay_stay(block, route):
    module = ROUTES[route](BLOCKS[block]())
    names = {"A_log", "D"} | ({"angle_rate"} if block == "RotaryMamba" else set())
    assert {name for name, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)} == names
    assert module.dt_proj.bias._no_reinit
    found = module.no_decay_parameters()
    assert {id(p) for p in found} == {id(getattr(module, name)) for name in names}
    assert [id(p) for p in no_decay_parameters(nn.Sequential(module, nn.Linear(2, 2)))] == [id(p) for p in found]


def test_pruned_and_parametrised_parameters_need_no_decay_either():
    module = Mamba(8)
    prune.random_unstructured(module, "A_log", 0.5)
    nn.utils.parametrize.register_parametrization(module, "D", nn.Identity())
    expected = [module.A_log_orig, module.parametrizations.D.original]
    assert {id(p) for p in module.no_decay_parameters()} == {id(p) for p in expected}
