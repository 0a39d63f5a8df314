"""Models of transformers do on these kernels what they do without, and keep sequences apart.

The version is the one installed; CONTRIBUTING.md says how to run others.
"""

import copy
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers_models as tiny
from torch import Tensor, nn

import wmkernels.integrations.transformers as ours
from wmkernels.integrations.transformers import switch

MODELS = [name for name in tiny.TINY if tiny.exists(name)]
BEFORE = tiny.VERSION < (5, 15)  # whole mixers are replaced, and the layers of a delta rule are left alone
RUNS = [name for name in MODELS if not (BEFORE and "linear_key_head_dim" in tiny.TINY[name][1])]
# the attention of version 4 mixes packed sequences
PACKED = [name for name in RUNS if name in ("mamba", "falcon_mamba", "mamba2") or tiny.VERSION >= (5, 0)]
FIRST, TIME = 9, 21
PARITY = 1e-5
GRADIENT_PARITY = 2 * PARITY  # each of the two is within PARITY of float64's


@pytest.fixture(autouse=True)
def _left_as_it_was() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.disable()


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Before any test's time is taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODELS:
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def modeling(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@pytest.mark.parametrize("name", RUNS)
def test_a_model_does_on_kernels_what_it_does_without(name: str) -> None:
    model = tiny.build(name)
    before = tiny.behaviour(model)
    ours.enable(name)
    after, calls = tiny.behaviour(model), ours.report().calls
    assert tiny.error(after.logits, before.logits) < PARITY
    assert tiny.error(after.padded, before.padded) < PARITY
    assert tiny.worst_gradient(after.grads, before.grads) < GRADIENT_PARITY
    assert torch.equal(after.tokens, before.tokens)
    assert calls and "original" not in calls


@pytest.mark.parametrize("name", RUNS)
def test_a_prompt_in_two_parts_is_the_prompt(name: str) -> None:
    model, ids = tiny.build(name), tiny.tokens(2, TIME)
    ours.enable(name)
    whole = tiny.logits(model, ids)
    assert tiny.error(tiny.second_part(model, ids, FIRST), whole[:, FIRST:]) < PARITY


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_are_trained_as_each_by_itself(name: str) -> None:
    # the attention of this model mixes packed sequences
    changes = {"layer_types": [tiny.LINEAR] * 2} if name == "granitemoehybrid" else {}
    model, ids = tiny.build(name, **changes), tiny.tokens(1, TIME)
    ours.enable(name)
    parts = ids.split([FIRST, TIME - FIRST], dim=1)
    alone = [tiny.summed_gradients(model, part) for part in parts]
    for packed in ("seq_idx", "cu_seq_lens_q"):
        together = tiny.summed_gradients(model, ids, **tiny.packing([FIRST, TIME - FIRST], packed))
        assert tiny.error(together.logits, torch.cat([part.logits for part in alone], 1)) < PARITY
        summed = {key: alone[0].grads[key] + alone[1].grads[key] for key in alone[0].grads}
        assert tiny.worst_gradient(together.grads, summed) < GRADIENT_PARITY


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_packed_sequences_with_a_cached_state_are_refused_and_the_model_goes_on(name: str) -> None:
    model, ids = tiny.build(name), tiny.tokens(1, TIME)
    ours.enable(name)
    whole = tiny.logits(model, ids)
    with pytest.raises(ValueError, match="with a cached state, expected one of them"):
        tiny.second_part(model, ids, FIRST, **tiny.packing([4, TIME - FIRST - 4], "seq_idx"))
    assert torch.equal(tiny.logits(model, ids), whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seq_idx", r"seq_idx has shape \(1, 21\), expected \(batch=2, time=21\)"),
        ("cu_seq_lens_q", "cu_seq_lens_q with a batch of 2, expected 1"),
    ],
)
def test_packing_of_another_shape_is_refused(name: str, message: str) -> None:
    model, ids = tiny.build("mamba"), tiny.tokens(2, TIME)
    ours.enable("mamba")
    packing = tiny.packing([FIRST, TIME - FIRST], name)
    with pytest.raises(ValueError, match=message):
        model(ids, use_cache=False, **{name: packing[name]})


def test_packing_that_a_layer_would_forget_in_the_backward_pass_is_refused() -> None:
    model, ids = tiny.build("mamba"), tiny.tokens(1, TIME)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ours.enable("mamba")
    with pytest.raises(ValueError, match="seq_idx with gradient checkpointing: this model does not pass it"):
        tiny.summed_gradients(model, ids, **tiny.packing([FIRST, TIME - FIRST], "seq_idx"))


@pytest.mark.parametrize("name", RUNS)
def test_disable_puts_back_what_was_there(name: str) -> None:
    module = modeling(name)
    mixer = getattr(module, switch.MODELS[name].name)
    before = dict(vars(module)), mixer.forward
    ours.enable(name)
    assert mixer.forward is not before[1]
    ours.enable(name)  # twice is once
    ours.disable()
    assert mixer.forward is before[1] and dict(vars(module)) == before[0]
    assert not ours.report().enabled


def test_an_unknown_version_is_left_alone_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "_version", lambda: "6.1.0")
    forward = modeling("mamba").MambaMixer.forward
    with pytest.warns(UserWarning, match=r"transformers 6\.1\.0 is not known, expected one of 4\.57, "):
        ours.enable()
    ours.enable()
    assert modeling("mamba").MambaMixer.forward is forward and not ours.report().enabled


def test_a_model_that_another_patched_is_left_alone_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = modeling("mamba").MambaMixer

    def theirs(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    monkeypatch.setattr(mixer, "forward", theirs)
    with pytest.warns(UserWarning, match=r"mamba is left alone: MambaMixer\.forward was replaced by test_transformers"):
        ours.enable("mamba", "mamba2")
    ours.enable("mamba", "mamba2")
    assert mixer.forward is theirs
    assert ours.report().enabled == ("mamba2",) and list(ours.report().left_alone) == ["mamba"]
    assert "left alone: mamba: " in str(ours.report())


def test_what_another_patches_after_enable_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = modeling("mamba").MambaMixer
    original = mixer.forward
    ours.enable("mamba")
    theirs = copy.copy(mixer.forward)
    mixer.forward = theirs = lambda self, hidden_states, *args, **kwargs: hidden_states
    try:
        with pytest.warns(UserWarning, match="mamba: forward was replaced after enable"):
            ours.disable()
        assert mixer.forward is theirs
    finally:
        mixer.forward = original


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="enable: 'llama' is not a known model, expected one of mamba, "):
        ours.enable("llama")


def test_a_traced_model_keeps_the_librarys_operators() -> None:
    model, ids = tiny.build("mamba", num_hidden_layers=1).eval(), tiny.tokens(1, 3)
    ours.enable("mamba")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Logits(model), ids, check_trace=False)
    operators = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert "aten" in operators and "wmkernels" not in operators


def test_an_activation_that_the_kernels_do_not_have_runs_in_the_library() -> None:
    model, ids = tiny.build("mamba", hidden_act="gelu"), tiny.tokens(1, 5)
    before = tiny.logits(model, ids)
    ours.enable("mamba")
    assert tiny.error(tiny.logits(model, ids), before) < PARITY
    assert ours.report().calls["original"]


def test_models_on_other_devices_stay_with_the_library() -> None:
    model = tiny.build("mamba").to("meta")
    ours.enable("mamba")
    model(tiny.tokens(1, 5).to("meta"), use_cache=False)
    assert set(ours.report().calls) == {"original"}


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.conv = modeling("mamba").causal_conv1d_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.weight, None, activation="silu")


@pytest.mark.skipif(BEFORE, reason="mixers before 5.15 call no such function")
class TestFunctions:
    def test_an_exported_program_keeps_the_librarys_operators(self) -> None:
        ours.enable("mamba")
        program = torch.export.export(Conv(), (torch.randn(2, 6, 9),))
        assert "wmkernels" not in str(program.graph)

    @pytest.mark.parametrize(("name", "op"), [("mamba", "selective_scan"), ("mamba2", "ssd_scan")])
    def test_a_compiled_mixer_is_one_graph_that_calls_the_kernels(self, name: str, op: str) -> None:
        mixer = tiny.build(name, num_hidden_layers=1).eval().backbone.layers[0].mixer
        x = torch.randn(1, TIME, 24)
        ours.enable(name)
        graphs = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(str(graph.graph))
            return graph.forward

        with torch.no_grad():
            compiled = torch.compile(mixer, backend=backend, fullgraph=True)(x)
            assert f"wmkernels.{op}" in graphs[0] and "wmkernels.causal_conv1d" in graphs[0]
            assert tiny.error(compiled, mixer(x)) < PARITY

    def test_a_function_that_the_package_kernels_made_a_module_of_is_known(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, func = modeling("mamba"), modeling("mamba").causal_conv1d_fn

        class Func(nn.Module):
            kernel_layer_name = "causal_conv1d_fn"

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return func(*args, **kwargs)

        made = Func()
        monkeypatch.setattr(module, "causal_conv1d_fn", made)
        model, ids = tiny.build("mamba"), tiny.tokens(1, TIME)
        before = tiny.logits(model, ids)
        ours.enable("mamba")
        assert tiny.error(tiny.logits(model, ids), before) < PARITY
        assert ours.report().calls["conv"] and "original" not in ours.report().calls
        module.causal_conv1d_fn(torch.randn(1, 6, 9, device="meta"), torch.randn(6, 4, device="meta"))
        assert ours.report().calls["original"] == 1
        ours.disable()
        assert module.causal_conv1d_fn is made

    def test_a_function_called_outside_a_mixer_keeps_packed_sequences_apart(self) -> None:
        ours.enable("mamba", "mamba2")
        x, weight = torch.randn(1, 6, 9), torch.randn(6, 4)
        conv = modeling("mamba").causal_conv1d_fn
        apart = torch.cat([conv(part, weight) for part in x.split([4, 5], dim=2)], 2)
        together = conv(x, weight, seq_idx=torch.tensor([[0] * 4 + [1] * 5]))
        assert torch.equal(together, apart)

    @pytest.mark.parametrize("width", [3, 4, 7])
    def test_a_window_may_be_wider_than_the_convolution(self, width: int) -> None:
        update = modeling("mamba").causal_conv1d_update
        x, state, weight, bias = torch.randn(2, 6, 1), torch.randn(2, 6, width), torch.randn(6, 4), torch.randn(6)
        expected_state = state.clone()
        expected = update(x, expected_state, weight, bias, "silu")
        ours.enable("mamba")
        out = modeling("mamba").causal_conv1d_update(x, state, weight, bias, "silu")
        torch.testing.assert_close(out, expected)
        assert torch.equal(state, expected_state)

    def test_a_window_that_is_too_narrow_is_refused(self) -> None:
        ours.enable("mamba")
        with pytest.raises(ValueError, match=r"conv_state has shape \(2, 6, 2\), expected at least width - 1 = 3"):
            modeling("mamba").causal_conv1d_update(torch.randn(2, 6, 1), torch.randn(2, 6, 2), torch.randn(6, 4))
