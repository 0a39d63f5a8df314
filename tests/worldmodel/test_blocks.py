import dataclasses
import json
from typing import Any, get_args

import pytest
import torch
from torch import nn
from worldmodel_examples import MEMORIES

from worldmodel.commands.options import train_options, with_kinds
from worldmodel.learning.presets import PRESETS
from worldmodel.model.blocks import (
    BlockConfig,
    ConvLSTMBlock,
    GatedConvBlock,
    GRUBlock,
    RotaryScanBlock,
    TokenAttentionBlock,
)
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.latents import GaussianConfig
from worldmodel.model.memory import MemoryConfig, MemoryStack, build_memory
from worldmodel.model.recurrent import GRU
from worldmodel.model.world_model import WorldModelConfig
from worldmodel.runs.configuration import ConfigurationError, differences, from_json, to_json
from worldmodel.runs.migration import upgrade_config, upgrade_memory

HERE = "test_blocks"


class Leaky(nn.Module):
    def __init__(self, width: int, keep: float = 0.9, extra: int = 0) -> None:
        super().__init__()
        self.width, self.keep, self.extra = width, keep, extra

    def init_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {"mean": torch.zeros(batch_size, self.width)}

    def forward(self, inputs: torch.Tensor, state: Any = None, reset: torch.Tensor | None = None) -> Any:
        state = self.init_state(inputs.shape[0]) if state is None else state
        outputs = []
        for t in range(inputs.shape[1]):
            output, state = self.step(inputs[:, t], state, None if reset is None else reset[:, t])
            outputs.append(output)
        return torch.stack(outputs, 1), state

    def step(self, input: torch.Tensor, state: Any, reset: torch.Tensor | None = None) -> Any:
        mean = state["mean"] if reset is None else state["mean"].masked_fill(reset[:, None], 0)
        mean = self.keep * mean + (1 - self.keep) * input
        return nn.functional.pad(mean, (0, self.extra)), {"mean": mean}


class Stateless(Leaky):
    """Its steps drop the state."""

    def step(self, input: torch.Tensor, state: Any, reset: torch.Tensor | None = None) -> Any:
        return input, {}


class Broken(Leaky):
    def init_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        raise ArithmeticError("no state")


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_as_json_comes_back_as_it_was(name: str) -> None:
    told = json.loads(json.dumps(to_json(MEMORIES[name])))
    assert from_json(MemoryConfig, told) == MEMORIES[name]
    other = {**told, "blocks": [*told["blocks"][:-1], {"kind": "rnn"}]}
    with pytest.raises(ConfigurationError, match=r"blocks\.\d is of kind 'rnn', expected a kind among rotary_scan, "):
        from_json(MemoryConfig, other)


def test_what_two_lists_of_blocks_disagree_about_is_named() -> None:
    one, two = (to_json(MemoryConfig(8, (RotaryScanBlock(d_state=n), GatedConvBlock()))) for n in (4, 8))
    assert differences(one, two) == ["blocks.0.d_state is 4 there and 8 here"]


def test_a_block_of_the_users_own_is_built_with_its_options() -> None:
    memory = build_memory(MemoryConfig(4, (CustomBlock(f"{HERE}:Leaky", {"keep": 0.5}), RotaryScanBlock())))
    assert memory.blocks[0].keep == 0.5 and "0.mean" in memory.init_state(2)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (CustomBlock("nowhere:Leaky"), "block is 'nowhere:Leaky', expected module:Class that can be imported"),
        (CustomBlock(f"{HERE}:Nothing"), "expected module:Class that can be imported"),
        (CustomBlock(HERE), "expected module:Class$"),
        (
            CustomBlock("torch.nn:Embedding", {"embedding_dim": -1}),
            "cannot be called .*: RuntimeError: Trying to create",
        ),
        (CustomBlock(f"{HERE}:Leaky", {"speed": 1}), r"cannot be called with \(4, \*\*\{'speed': 1\}\)"),
        (CustomBlock("builtins:complex"), "block is 'builtins:complex', expected module:Class of a torch.nn.Module"),
        (CustomBlock("torch.nn:ReLU"), "has no init_state, step, expected init_state, forward and step"),
        (CustomBlock(f"{HERE}:Leaky", {"extra": 1}), r"forward returned \(1, 2, 5\), expected \(1, 2, 4\)"),
        (CustomBlock(f"{HERE}:Stateless"), r"the state that .*forward returned is \{\}, expected that of init_state"),
        (CustomBlock(f"{HERE}:Broken"), "fails on two steps of zeros, ArithmeticError: no state"),
    ],
)
def test_a_block_that_is_none_is_refused_with_the_reason(block: CustomBlock, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_memory(MemoryConfig(4, (block,)))


def test_checking_a_block_moves_no_random_generator() -> None:
    state = torch.get_rng_state()
    CustomBlock(f"{HERE}:Leaky").build(4)
    assert torch.equal(torch.get_rng_state(), state)


def test_kinds_on_the_command_line_keep_what_the_preset_says_of_them() -> None:
    popgym = PRESETS["popgym"]().model
    (preset,) = popgym.memory.blocks
    blocks = with_kinds(popgym, f"rotary_scan*2, gru,none,{HERE}:Leaky", None).memory.blocks
    assert [block.kind for block in blocks] == ["rotary_scan", "rotary_scan", "gru", "gated_conv", "custom"]
    assert blocks[:2] == (preset, preset) and blocks[3] == GatedConvBlock(d_conv=1)
    assert with_kinds(popgym, None, "gaussian").perception.latent == GaussianConfig()
    assert with_kinds(popgym, None, "categorical") == popgym
    for kind in get_args(BlockConfig):
        if kind is not CustomBlock:
            assert isinstance(with_kinds(popgym, kind.kind, None).memory.blocks[0], kind)
    options = ["--model.memory.blocks.1.kernel", "5", "--model.perception.latent.size", "6"]
    arguments = ["--env", "CartPole-v1", "--memory", "rotary_scan,conv_lstm", "--latent", "gaussian", *options]
    model = train_options(arguments)[0].model
    assert model.memory.blocks[1].kernel == 5 and model.perception.latent == GaussianConfig(size=6)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("memory", "latent", "message"),
    [
        ("rnn", None, "--memory has 'rnn', expected rotary_scan, scan, .*, memory_attention, place, none or module"),
        ("", None, "--memory has '', expected"),
        ("gru*0", None, r"--memory has 'gru\*0', expected KIND\*N with N from 1 to 256"),
        ("gru*two", None, r"expected KIND\*N"),
        (None, "tokens", "--latent is 'tokens', expected one of categorical, gaussian"),
    ],
)
def test_a_kind_that_does_not_exist_is_refused(memory: str | None, latent: str | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        with_kinds(WorldModelConfig(), memory, latent)
    narrow = dataclasses.replace(WorldModelConfig(), memory=MemoryConfig(20))
    with pytest.raises(ConfigurationError, match=r"--memory is 'conv_lstm': ConvLSTMBlock: map_size is \(4, 4\)"):
        with_kinds(narrow, "conv_lstm", None)


OLD = {"expand": 1.5, "states": 6, "groups": 2, "convolution": 3, "width": 8, "selective_angle": True, "decay": 0.1}
SCAN = {"d_state": 6, "groups": 2, "d_conv": 3, "expand": 1.5}


@pytest.mark.parametrize(
    ("old", "blocks"),
    [
        ({}, [{"kind": "rotary_scan", **SCAN, "selective_angle": True, "decay": 0.1}]),
        ({"kind": "scan", "rotated": False, "layers": 2}, [{"kind": "scan", **SCAN}] * 2),
        ({"scan": False}, [{"kind": "gated_conv", "d_conv": 3, "expand": 1.5}]),
        ({"kind": "none"}, [{"kind": "gated_conv", "d_conv": 1, "expand": 1.5}]),
        ({"kind": "gru", "layers": 3}, [{"kind": "gru"}] * 3),
        ({"kind": "conv_lstm", "map_size": [2, 2]}, [{"kind": "conv_lstm", "map_size": [2, 2], "kernel": 3}]),
    ],
)
def test_the_memory_of_an_earlier_release_becomes_blocks(old: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    told = upgrade_memory({**OLD, **old})
    assert told == {"width": 8, "blocks": blocks}
    build_memory(from_json(MemoryConfig, told))
    assert upgrade_memory(told) == told


def test_a_configuration_of_today_is_left_as_it_is() -> None:
    config = {"train": {"model": to_json(WorldModelConfig())}}
    assert upgrade_config(config) == config
    assert from_json(WorldModelConfig, config["train"]["model"]) == WorldModelConfig()


def test_a_gru_is_a_block_like_any_other() -> None:
    assert isinstance(CustomBlock("worldmodel.model.blocks:GRU").build(4), GRU)


def tokens_stack(tokens: int, *blocks: Any) -> MemoryStack:
    return build_memory(MemoryConfig(8, blocks, tokens=tokens)).double()


def test_a_block_runs_on_each_token_alone() -> None:
    memory = tokens_stack(3, GRUBlock(), ConvLSTMBlock((2, 2)))
    inputs, reset = torch.randn(2, 5, 24, dtype=torch.float64), torch.rand(2, 5) < 0.3
    s, state = memory(inputs, memory.init_state(2), reset)
    assert s.shape == (2, 5, 3, 8) and state["0.hidden"].shape == (2, 3, 8) and state["1.cell"].shape == (2, 3, 2, 2, 2)
    memory.tokens = 1
    for token in range(3):
        alone, own = memory(inputs[..., 8 * token : 8 * token + 8], None, reset)
        torch.testing.assert_close(s[:, :, token], alone)
        torch.testing.assert_close(state["0.hidden"][:, token], own["0.hidden"])
    assert torch.equal(memory.pool(alone), alone)
    memory.tokens = 3
    assert torch.equal(memory.pool(s), s.mean(2))


def test_attention_mixes_the_tokens_of_a_step_and_no_steps() -> None:
    memory = tokens_stack(3, TokenAttentionBlock(heads=2))
    inputs = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    s, state = memory(inputs)
    assert state == {}
    (grad,) = torch.autograd.grad((s[:, 2, 0] * torch.randn(2, 8, dtype=torch.float64)).sum(), inputs)
    touched = grad.unflatten(-1, (3, 8)).abs().sum(-1) > 0
    assert touched[:, 2].all() and touched.sum() == 2 * 3
    one = tokens_stack(1, TokenAttentionBlock(heads=2))  # a single token attends to itself, not to other steps
    inputs = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((one(inputs)[0][:, 2] * torch.randn(2, 8, dtype=torch.float64)).sum(), inputs)
    assert (grad.abs().sum(-1) > 0).sum(0).tolist() == [0, 0, 2, 0, 0]


class SumOfTokens(torch.nn.Module):
    mixes_tokens = True

    def __init__(self, width: int) -> None:
        super().__init__()

    def init_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {}

    def forward(self, inputs: torch.Tensor, state: Any = None, reset: Any = None) -> tuple[torch.Tensor, Any]:
        return inputs.sum(-2, keepdim=True).expand_as(inputs), {}

    step = forward


def test_a_users_block_may_mix_tokens() -> None:
    memory = tokens_stack(3, CustomBlock(f"{HERE}:SumOfTokens"))
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    normal = memory.norms[0](x)
    torch.testing.assert_close(memory(x.flatten(-2))[0], memory.norm(x + normal.sum(2, keepdim=True)))
