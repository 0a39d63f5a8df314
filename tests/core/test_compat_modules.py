"""wmkernels.compat: modules, caches and models of mamba_ssm."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_compat import WIDE, normal

import wmkernels
from wmkernels.compat.mamba_ssm import Mamba, Mamba2, Mamba3, MambaLMHeadModel
from wmkernels.compat.mamba_ssm.models.config_mamba import MambaConfig
from wmkernels.compat.mamba_ssm.models.mixer_seq_simple import MixerModel, create_block
from wmkernels.compat.mamba_ssm.ops.triton import layernorm
from wmkernels.compat.mamba_ssm.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    rms_norm_fn,
)
from wmkernels.compat.mamba_ssm.utils.generation import InferenceParams, penalise_repetition, sample

SIZES = {
    "Mamba1": {"d_state": 4, "d_conv": 3},
    "Mamba2": {"d_state": 4, "d_conv": 3, "headdim": 4, "ngroups": 2},
    "Mamba2 with an MLP": {"d_state": 4, "headdim": 4, "d_ssm": 8, "D_has_hdim": True, "rmsnorm": False},
    "Mamba3": {"d_state": 8, "headdim": 4, "ngroups": 2, "is_outproj_norm": True},
}
KINDS = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}
OURS = {"Mamba1": wmkernels.nn.Mamba, "Mamba2": wmkernels.nn.Mamba2, "Mamba3": wmkernels.nn.Mamba3}
every_kind = pytest.mark.parametrize("kind", list(SIZES))


def block(kind, **options):
    options = {"layer_idx": 3, "dtype": WIDE} | options
    return KINDS[kind[:6]](8, **SIZES[kind], **options)


@every_kind
def test_a_block_is_the_one_of_wmkernels_and_returns_a_tensor(kind):
    torch.manual_seed(1)
    module = block(kind)
    torch.manual_seed(1)
    ours = OURS[kind[:6]](8, **SIZES[kind], dtype=WIDE)
    assert ours.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in module.state_dict().items())
    inputs = normal(2, 7, 8)
    assert torch.equal(module(inputs), ours(inputs)[0])


@every_kind
@pytest.mark.parametrize("prompt", [1, 2, 6])
def test_a_cache_continues_a_sequence_in_place(kind, prompt):
    module, inputs = block(kind), normal(2, 9, 8)
    whole, params = module(inputs), InferenceParams(max_seqlen=9, max_batch_size=2)
    with torch.no_grad():
        outputs = [module(inputs[:, :prompt], inference_params=params)]
        states = params.key_value_memory_dict[3]
        pointers = [state.data_ptr() for state in states]
        for length in (1, 1, 9 - prompt - 2):  # single steps, then the rest at once
            params.seqlen_offset = sum(x.shape[1] for x in outputs)
            part = inputs[:, params.seqlen_offset : params.seqlen_offset + length]
            outputs.append(module(part, inference_params=params))
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert [state.data_ptr() for state in params.key_value_memory_dict[3]] == pointers
    params.seqlen_offset = 0
    torch.testing.assert_close(module(inputs, inference_params=params), whole)  # what the cache held is dropped


@every_kind
def test_steps_return_the_states_that_they_updated_and_are_differentiable(kind):
    module, inputs = block(kind), normal(2, 5, 8).requires_grad_()
    states = module.allocate_inference_cache(2, 5)
    outputs = []
    for t in range(5):
        given = inputs[:, t] if kind == "Mamba3" else inputs[:, t : t + 1]
        out, *after = module.step(given, *states)
        assert all(a is b for a, b in zip(after, states, strict=True))
        outputs.append(out.view(2, 1, 8))
    found, expected = torch.cat(outputs, 1), module(inputs)
    torch.testing.assert_close(found, expected)
    leaves = [inputs, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_convolutions_cache_holds_its_last_inputs():
    module, inputs = block("Mamba1"), normal(2, 5, 8)
    conv_state, ssm_state = module.allocate_inference_cache(2, 5)
    assert conv_state.shape == (2, 16, 3) and ssm_state.shape == (2, 16, 4)
    x = module.in_proj(inputs)[..., :16].mT.detach()
    with torch.no_grad():
        for t in range(5):
            module.step(inputs[:, t : t + 1], conv_state, ssm_state)
    torch.testing.assert_close(conv_state, x[..., 2:])


def test_the_cache_of_a_mamba_3_holds_the_turned_B_of_the_last_step():
    module, inputs = block("Mamba3"), normal(1, 4, 8)
    cache = module.allocate_inference_cache(1, 4)
    params = InferenceParams(4, 1, key_value_memory_dict={3: cache})
    with torch.no_grad():
        module(inputs, inference_params=params)
        _, state = wmkernels.nn.Mamba3.forward(module, inputs)
    angle, scan, k, v = cache
    assert torch.equal(scan, state["scan"]) and torch.equal(v, state["x"]) and torch.equal(angle, state["phase"])
    pairs = torch.view_as_complex(state["B"][..., : 2 * module.pairs].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    torch.testing.assert_close(k[:, 0, :, : 2 * module.pairs], turned)
    torch.testing.assert_close(k[:, 0, :, 2 * module.pairs :], state["B"][..., 2 * module.pairs :])


@pytest.mark.parametrize("kind", ["Mamba2", "Mamba2 with an MLP", "Mamba3"])
@pytest.mark.parametrize("padding", [0, 2])
def test_packed_sequences_and_their_caches(kind, padding):
    module = block(kind)
    parts = [normal(1, length, 8) for length in (3, 1, 5)]
    packed = torch.cat([*parts, normal(1, padding, 8)], 1)
    bounds = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    index = torch.tensor([[0] * 3 + [1] + [2] * 5 + [-1] * padding], dtype=torch.int32)
    expected, following = torch.cat([module(part) for part in parts], 1), normal(3, 1, 8)
    for options in ({"seq_idx": index}, {"cu_seqlens": bounds}, {"seq_idx": index, "cu_seqlens": bounds}):
        torch.testing.assert_close(module(packed, **options)[:, :9], expected)
    params = InferenceParams(max_seqlen=20, max_batch_size=3)
    with torch.no_grad():
        module(packed, seq_idx=index, cu_seqlens=bounds, inference_params=params)
        params.seqlen_offset = 1
        out = module(following, inference_params=params)
    for row, part in enumerate(parts):
        torch.testing.assert_close(out[row], module(torch.cat([part, following[row : row + 1]], 1))[0, -1:])


def test_batch_and_time_in_one_dimension():
    module, inputs = block("Mamba2"), normal(2, 5, 8)
    torch.testing.assert_close(module(inputs.flatten(0, 1), seqlen=5), module(inputs).flatten(0, 1))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_cache_of_16_bits_has_the_dtype_of_the_weights(kind):
    module, inputs = block(kind, dtype=torch.bfloat16), torch.randn(2, 6, 8, dtype=torch.bfloat16)
    params = InferenceParams(max_seqlen=6, max_batch_size=2)
    with torch.no_grad():
        whole = module(inputs)
        prompt = module(inputs[:, :5], inference_params=params)
        params.seqlen_offset = 5
        step = module(inputs[:, 5:], inference_params=params)
    held = {state.dtype for state in params.key_value_memory_dict[3]}
    assert held == ({torch.float64, torch.float32, torch.bfloat16} if kind == "Mamba3" else {torch.bfloat16})
    assert torch.equal(prompt, whole[:, :5])
    torch.testing.assert_close(step, whole[:, 5:], rtol=2e-2, atol=2e-2)


# norms


def test_the_sum_and_its_norms():
    x, residual, x1, weight, bias = normal(2, 3, 8), normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8)
    first, second, total = layer_norm_fn(x, weight, bias, residual, x1, bias, None, eps=1e-3, prenorm=True)
    torch.testing.assert_close(total, x + x1 + residual)
    torch.testing.assert_close(first, F.layer_norm(x + x1 + residual, (8,), weight, bias, 1e-3))
    torch.testing.assert_close(second, F.layer_norm(x + x1 + residual, (8,), bias, None, 1e-3))
    scale = normal(2, 3)
    scaled = rms_norm_fn(x, weight, bias, residual, rowscale=scale)
    torch.testing.assert_close(scaled, F.rms_norm(x * scale[..., None] + residual, (8,), weight, 1e-6) + bias)
    linear, same = layer_norm_linear_fn(x, weight, None, normal(5, 8), normal(5), residual, prenorm=True)
    assert linear.shape == (2, 3, 5) and torch.equal(same, x + residual)


@pytest.mark.parametrize(
    ("residual", "in_fp32", "held"),
    [(None, False, torch.float16), (None, True, torch.float32), (torch.bfloat16, True, torch.bfloat16)],
)
def test_the_dtype_of_the_sum(residual, in_fp32, held):
    x = torch.randn(2, 8, dtype=torch.float16)
    given = None if residual is None else torch.randn(2, 8).to(residual)
    out, total = rms_norm_fn(x, torch.ones(8), None, given, prenorm=True, residual_in_fp32=in_fp32)
    assert out.dtype == torch.float16 and total.dtype == held


def test_dropout_before_a_norm():
    x, x1 = torch.ones(500, 8, dtype=WIDE), torch.ones(500, 8, dtype=WIDE)
    _, total, mask, mask1 = layer_norm_fn(
        x, torch.ones(8), None, x1=x1, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    torch.testing.assert_close(total, (mask.double() + mask1.double()) / 0.75)
    assert abs(mask.double().mean().item() - 0.75) < 0.05 and not torch.equal(mask, mask1)
    module = RMSNorm(8, dropout_p=0.5)
    dropped, kept = module(torch.ones(50, 8), prenorm=True)[1], module.eval()(torch.ones(50, 8), prenorm=True)[1]
    assert (dropped == 0).any() and (kept == 1).all()
    assert layernorm.RMSNorm is RMSNorm


# models


def model(kind="Mamba2", **options):
    torch.manual_seed(0)
    settings = {"d_model": 8, "n_layer": 2, "vocab_size": 27, "ssm_cfg": {"layer": kind[:6], **SIZES[kind]}}
    return MambaLMHeadModel(MambaConfig(**settings | options), dtype=WIDE)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("d_intermediate", [0, 16])
def test_a_model_is_blocks_with_norms_and_residuals(fused, rms_norm, d_intermediate):
    net = model(fused_add_norm=fused, rms_norm=rms_norm, d_intermediate=d_intermediate, residual_in_fp32=False)
    tokens = torch.randint(27, (2, 5))
    logits = net(tokens).logits
    assert logits.shape == (2, 5, 32)
    x = net.backbone.embedding(tokens)
    for layer in net.backbone.layers:
        x = x + layer.mixer(layer.norm(x))
        if d_intermediate:
            values, gate = layer.mlp.fc1(layer.norm2(x)).chunk(2, -1)
            x = x + layer.mlp.fc2(values * F.silu(gate))
    torch.testing.assert_close(logits, net.backbone.norm_f(x) @ net.backbone.embedding.weight.T)
    torch.testing.assert_close(net(tokens, num_last_tokens=2).logits, logits[:, -2:])


def test_the_residual_branches_start_small():
    net = MixerModel(64, 8, 0, 16, {"d_state": 4}, rms_norm=True)
    bound = math.sqrt(1 / 128) / math.sqrt(8)  # kaiming uniform over the inner channels, over the root of the additions
    weights = torch.cat([layer.mixer.out_proj.weight.flatten() for layer in net.layers])
    assert 0.99 * bound < weights.abs().max().item() <= bound
    assert abs(net.embedding.weight.std().item() - 0.02) < 0.002
    assert all((layer.mixer.dt_proj.bias != 0).all() for layer in net.layers)


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2", "Mamba3"])
def test_generation_equals_the_forward_pass_of_what_was_generated(kind):
    net, prompt = model(kind), torch.randint(27, (2, 3))
    found = net.generate(prompt, max_length=9, output_scores=True, return_dict_in_generate=True, vocab_size=27)
    assert found.sequences.shape == (2, 9) and torch.equal(found.sequences[:, :3], prompt)
    with torch.no_grad():
        logits = net(found.sequences).logits[:, 2:-1, :27]
    torch.testing.assert_close(torch.stack(found.scores, 1), logits)
    assert torch.equal(logits.argmax(-1), found.sequences[:, 3:])
    taught = torch.randint(27, (2, 9))
    found = net.generate(taught[:, :3], max_length=9, teacher_outputs=taught)
    assert torch.equal(found, taught)


class Heard:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, tokens):
        self.tokens.append(tokens.shape)

    def end(self):
        self.ended = True


def test_generation_ends_and_is_streamed():
    net, prompt, heard = model(), torch.randint(27, (1, 3)), Heard()
    greedy = net.generate(prompt, max_length=9)
    ended = net.generate(prompt, max_length=9, eos_token_id=greedy[0, 4].item(), streamer=heard)
    assert ended.shape[1] <= 5 and torch.equal(ended, greedy[:, : ended.shape[1]])
    assert heard.ended and heard.tokens == [(1, 3), *[(1, 1)] * (ended.shape[1] - 3)]


def test_sampling_leaves_out_what_is_unlikely():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, 4)
    assert set(sample(logits).tolist()) == {0}
    assert set(sample(logits, top_k=3).tolist()) == {0, 1, 2}
    assert set(sample(logits, top_k=0).tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, top_k=0, top_p=0.6).tolist()) == {0, 1}
    assert set(sample(logits, top_k=3, top_p=0.5).tolist()) == {0}
    assert set(sample(logits, top_k=0, min_p=0.29).tolist()) == {0, 1, 2}
    share = (sample(logits, top_k=2, temperature=0.5) == 0).double().mean().item()
    assert abs(share - 0.25 / 0.34) < 0.05
    lowered = penalise_repetition(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[0, 1]]), 2.0)
    assert torch.equal(lowered, torch.tensor([[1.0, -4.0, 1.0]]))


def test_a_model_is_saved_and_loaded(tmp_path):
    net, tokens = model(), torch.randint(27, (1, 4))
    net.save_pretrained(tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.json", "pytorch_model.bin"}
    again = MambaLMHeadModel.from_pretrained(tmp_path / "run", dtype=WIDE)
    assert again.config == net.config and torch.equal(again(tokens).logits, net(tokens).logits)
    safetensors = pytest.importorskip("safetensors.torch")
    (tmp_path / "run" / "pytorch_model.bin").unlink()
    once = {name: value for name, value in net.state_dict().items() if name != "lm_head.weight"}
    safetensors.save_file(once, tmp_path / "run" / "model.safetensors")
    again = MambaLMHeadModel.from_pretrained(tmp_path / "run", dtype=WIDE)
    assert torch.equal(again(tokens).logits, net(tokens).logits)
    assert again.lm_head.weight is again.backbone.embedding.weight


def wrong_config(folder):
    (folder / "config.json").write_text(json.dumps({"d_model": 8, "hidden_size": 8}))
    return folder


PARAMS = InferenceParams(4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: Mamba3(8, is_mimo=True), "Mamba3: is_mimo is True, expected False: blocks of more than one rank"),
        (lambda f: Mamba3(8, headdim=4, chunk_size=0), "Mamba3: chunk_size is 0, expected 1"),
        (lambda f: Mamba2(8, headdim=4, chunk_size=2.5), "Mamba2: chunk_size is 2.5, expected a whole number"),
        (lambda f: Mamba2(8, headdim=4, use_mem_eff_path="no"), "use_mem_eff_path is 'no', expected True or False"),
        (lambda f: Mamba(8, use_fast_path=None), "Mamba: use_fast_path is None, expected True or False"),
        (lambda f: Mamba3(8, dropout=0.1), "dropout is 0.1, expected 0"),
        (lambda f: Mamba2(8, process_group="group"), "Mamba2: process_group is 'group', expected None"),
        (lambda f: block("Mamba1", layer_idx=None)(normal(2, 3, 8), PARAMS), "Mamba: layer_idx is None, expected"),
        (
            lambda f: block("Mamba1")(
                normal(1, 3, 8), InferenceParams(4, 1, key_value_memory_dict={3: (torch.zeros(2),)})
            ),
            "layer 3 has a cache of 2 rows, expected 1",
        ),
        (
            lambda f: block("Mamba2").step(normal(2, 3, 8), *block("Mamba2").allocate_inference_cache(2, 3)),
            r"Mamba2: hidden_states has shape \(2, 3, 8\), expected \(batch, 1, d_model\)",
        ),
        (lambda f: create_block(8, 0, attn_layer_idx=[1]), r"attn_layer_idx is \[1\], expected none"),
        (lambda f: create_block(8, 0, {"layer": "Mamba4"}), "layer is 'Mamba4', expected Mamba1, Mamba2, Mamba3"),
        (lambda f: model().generate(torch.zeros(1, 1).long(), 3, cg=True), "decode: cg is True, expected False"),
        (lambda f: MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m"), "expected a local folder with config"),
        (lambda f: MambaLMHeadModel.from_pretrained(wrong_config(f)), "config.json has 'hidden_size', expected only"),
        (
            lambda f: layer_norm_fn(normal(2, 8), normal(8), None, normal(3, 8)),
            r"residual has shape \(3, 8\), expected",
        ),
        (
            lambda f: layer_norm_fn(normal(2, 8), normal(8), None, x1=normal(2, 8), rowscale=normal(2)),
            "rowscale is given with x1",
        ),
    ],
)
def test_a_bad_call_gets_one_clear_sentence(call, message, tmp_path):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
