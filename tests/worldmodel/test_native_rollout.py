"""Imagination in one native call is imagination by PyTorch's operators."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from wmkernels.dispatch import load_native
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.model.blocks import BlockConfig, GatedConvBlock, GRUBlock, RotaryScanBlock, ScanBlock
from worldmodel.model.decision import DecisionConfig
from worldmodel.model.latents import CategoricalConfig, EmbeddingConfig, LatentConfig
from worldmodel.model.memory import MemoryConfig
from worldmodel.model.native_rollout import roll_out, roll_out_latents
from worldmodel.model.perception import PerceptionConfig
from worldmodel.model.policies import Policy
from worldmodel.model.prediction import PredictionConfig
from worldmodel.model.world_model import Imagined, WorldModel, WorldModelConfig, _memory_part

pytestmark = pytest.mark.skipif(load_native() is None, reason="the extension was not built")
HORIZON, THREE = 5, spaces.Discrete(3)


def model_of(
    latent: LatentConfig, *blocks: BlockConfig, actions: spaces.Space = THREE, gate: bool = False
) -> WorldModel:
    """Small sizes that are no multiples of a vector, and random weights."""
    torch.manual_seed(0)
    config = WorldModelConfig(
        PerceptionConfig(latent, hidden=20),
        MemoryConfig(width=24, blocks=blocks),
        PredictionConfig(hidden=28, action_gate=gate),
        decision=DecisionConfig(hidden=36),
    )
    specs = ObservationSpec.from_space(spaces.Discrete(4)), ActionSpec.from_space(actions)
    model = WorldModel(*specs, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def conv(taps: int) -> GatedConvBlock:
    return GatedConvBlock(d_conv=taps, expand=1.5)


def state_of(model: WorldModel, rows: int) -> dict[str, Tensor]:
    return {name: torch.randn(value.shape, dtype=value.dtype) for name, value in model.init_state(rows).items()}


def by_operators(model: WorldModel, state: dict[str, Tensor], *arguments: Tensor) -> Imagined:
    def policy(*given: Tensor) -> Policy:
        return model.decision(*given)

    return model.imagine(state, policy, HORIZON, *arguments)


CASES = [
    (CategoricalConfig(3, 5, stochastic=False), (conv(1),), THREE),
    (CategoricalConfig(3, 5), (conv(4),), THREE),
    (CategoricalConfig(2, 4, unimix_ratio=0.0), (conv(2), conv(1), conv(3)), spaces.MultiDiscrete([2, 4, 3])),
    (CategoricalConfig(3, 5), (RotaryScanBlock(groups=3, d_state=10),), THREE),
    (CategoricalConfig(3, 5, stochastic=False), (ScanBlock(groups=2, d_state=5, d_conv=1), conv(2)), THREE),
]


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("latent", "blocks", "actions"), CASES)
@torch.no_grad()
def test_one_call_imagines_what_the_operators_imagine(latent, blocks, actions, gate, first: bool, rows: int) -> None:
    model = model_of(latent, *blocks, actions=actions, gate=gate)
    state = state_of(model, rows)
    given = [model.action_spec.encode(torch.zeros(rows, *model.action_spec.shape))] if first else []
    before = {name: value.clone() for name, value in state.items()}
    torch.manual_seed(1)
    assert roll_out(model, state["features"], _memory_part(state), HORIZON, *(given or [None])) is not None
    torch.manual_seed(1)
    native = model.imagine(state, model.decision, HORIZON, *given)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    expected = by_operators(model, state, *given)
    assert torch.equal(torch.get_rng_state(), after), "as many random numbers"
    assert torch.equal(native.actions, expected.actions)
    for name in ("features", "latent", "rewards", "continues"):
        torch.testing.assert_close(getattr(native, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert list(native.state) == list(expected.state)
    for name, value in expected.state.items():
        torch.testing.assert_close(native.state[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(state[name], before[name]), "the state before is as it was"


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("blocks", [blocks for _, blocks, _ in CASES])
def test_plans_of_embeddings_are_imagined_in_one_call(blocks, gate: bool, rows: int) -> None:
    model = model_of(EmbeddingConfig(size=10), *blocks, actions=spaces.Box(-1, 1, (3,), np.float32), gate=gate)
    state, seen = state_of(model, rows), []
    before = {name: value.clone() for name, value in state.items()}
    actions = torch.randn(HORIZON, rows, 3).movedim(0, 1)
    expected = model.imagine_latents(state, actions)
    assert expected.requires_grad, "by operators"
    handle = model.prediction.latent[-1].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        assert roll_out_latents(model, state, _memory_part(state), actions) is None, "hooks see the operators"
        handle.remove()
        found = model.imagine_latents(state, actions, model.perception.latent.mode)
        noisy = model.imagine_latents(state, actions, lambda z: z + 1)
    assert not seen, "no operator ran"
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    assert (noisy - found)[:, 0].sub(1).abs().max() < 1e-4, "another sampler is asked"
    for name, value in before.items():
        assert torch.equal(state[name], value), "the state before is as it was"


@torch.no_grad()
def test_a_step_that_draws_no_number_has_one_call() -> None:
    model = model_of(CategoricalConfig(3, 5, stochastic=False), conv(1), actions=THREE)
    state = state_of(model, 4)
    action = model.action_spec.encode(torch.zeros(4, dtype=torch.int64))
    found = roll_out(model, state["features"], _memory_part(state), 1, action)
    expected = model.imagine(state, lambda *given: model.decision(*given), 1, action)
    assert found is not None
    torch.testing.assert_close(found.features, expected.features, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_call_is_as_exact_as_the_operators_on_every_instruction_set() -> None:
    model = model_of(CategoricalConfig(3, 5, stochastic=False), conv(3), RotaryScanBlock(groups=3, d_state=10))
    state, exact = state_of(model, 40), copy.deepcopy(model).double()
    native, level = load_native(), load_native().cpu_isa()
    for name in native.cpu_isa_available().split(","):
        native.cpu_set_isa(name)
        try:
            found = model.imagine(state, model.decision, HORIZON)
        finally:
            native.cpu_set_isa(level)
        wide = {key: value.double() for key, value in state.items()}
        truth = exact.imagine_actions(wide, found.actions.double()).features
        operators = model.imagine_actions(state, found.actions).features
        error, usual = ((x - truth).abs().max().item() for x in (found.features, operators))
        assert error <= 3 * usual + 1e-6, name


def test_what_must_see_the_operators_sees_them() -> None:
    model = model_of(CategoricalConfig(3, 5, stochastic=False), conv(1))
    state, seen = state_of(model, 2), []

    def found(model: WorldModel = model, state: dict[str, Tensor] = state) -> bool:
        return roll_out(model, state["features"], _memory_part(state), 2, None) is not None

    assert not found(), "gradients"
    with torch.no_grad():
        assert found()
        assert not found(model.double(), {name: value.double() for name, value in state.items()})
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert not found()
        handle = model.prediction.latent[0].register_forward_hook(lambda *_: seen.append(1))
        model.imagine(state, model.decision, HORIZON)
        assert len(seen) == HORIZON
        handle.remove()
        assert found()
        model.memory.blocks[0] = GRUBlock().build(24)
        assert not found()


def test_layers_beyond_the_scratch_are_refused() -> None:
    from wmkernels.layers import LayerChain

    chain, tensor = LayerChain(), torch.zeros(2, 64)
    chain.load(tensor, chain.columns(64) + 1)
    with pytest.raises(ValueError, match="do not fit their scratch"):
        chain.run(2)
