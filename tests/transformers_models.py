"""Tiny random models of transformers, for parity with and without kernels: `python tests/transformers_models.py`."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VOCABULARY = 64
SCALE = 0.2
# names of layers; and a chunk that two models' slow path needs before 5.15, where it sums over the wrong chunks
VERSION = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
_OLD = VERSION < (5, 0)
LINEAR, _FULL = ("mamba", "attention") if _OLD else ("linear_attention", "full_attention")
_CHUNK = 32 if VERSION < (5, 15) else 8
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MAMBA = {
    "hidden_size": 24,
    "state_size": 5,
    "num_hidden_layers": 2,
    "time_step_rank": 3,
    "use_associative_scan": False,
}
_SSD = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 8}
_MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_DELTA = {
    "hidden_size": 24,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
} | _ATTENTION
_HYBRID = {
    "layers_block_type": [LINEAR, "hybrid", "hybrid"],
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_FEW = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}

# model -> prefix of its classes, and its configuration; some sizes are no multiples of a vector register
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", _MAMBA),
    "falcon_mamba": ("FalconMamba", _MAMBA),
    "jamba": (
        "Jamba",
        _FEW
        | _ATTENTION
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2}
        | {"mamba_d_state": 5, "mamba_dt_rank": 3, "use_mamba_kernels": False},
    ),
    "zamba": (
        "Zamba",
        _FEW
        | {
            "layers_block_type": [LINEAR, "hybrid", "hybrid"],
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2, "mamba_d_state": 5, "mamba_dt_rank": 3}
        | {"use_mamba_kernels": False},
    ),
    "mamba2": (
        "Mamba2",
        {"hidden_size": 24, "num_heads": 4, "head_dim": 12, "state_size": 6, "n_groups": 2, "num_hidden_layers": 2}
        | {"chunk_size": 8},
    ),
    "zamba2": (
        "Zamba2",
        _FEW
        | {
            "layers_block_type": [LINEAR, "hybrid", "hybrid"],
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        | {"mamba_d_state": 6, "n_mamba_heads": 4, "mamba_ngroups": 2, "chunk_size": _CHUNK, "use_mamba_kernels": False}
        | {"attention_head_dim": 12, "adapter_rank": 4},
    ),
    "bamba": ("Bamba", _FEW | _ATTENTION | _SSD | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", _FEW | _ATTENTION | _SSD | {"mamba_d_ssm": 48}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        _FEW | _ATTENTION | _SSD | {"layer_types": [LINEAR, _FULL]},
    ),
    "nemotron_h": (
        "NemotronH",
        _ATTENTION
        | {"hidden_size": 24, "intermediate_size": 32, "layers_block_type": [LINEAR, _FULL], "head_dim": 6}
        | {"ssm_state_size": 6, "mamba_num_heads": 4, "mamba_head_dim": 12, "n_groups": 2, "chunk_size": _CHUNK}
        | {"use_mamba_kernels": False},
    ),
    "qwen3_next": ("Qwen3Next", _DELTA | _MOE),
    "qwen3_5": ("Qwen3_5", _DELTA | {"intermediate_size": 32}),
    "qwen3_5_moe": ("Qwen3_5Moe", _DELTA | _MOE),
    "olmo_hybrid": ("OlmoHybrid", _DELTA | {"intermediate_size": 32}),
}


class Behaviour(NamedTuple):
    """What a model does, for comparison with and without kernels."""

    logits: Tensor
    padded: Tensor  # with left padding, on its own tokens
    grads: dict[str, Tensor]
    tokens: Tensor


def exists(name: str) -> bool:
    return importlib.util.find_spec(f"transformers.models.{name}") is not None


def build(name: str, **changes: Any) -> Any:
    """A model with random weights, biases too."""
    prefix, settings = TINY[name]
    settings = dict(settings, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes)
    configurations = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config_class = getattr(configurations, f"{prefix}TextConfig", None) or getattr(configurations, f"{prefix}Config")
    torch.manual_seed(0)
    model = getattr(modeling, f"{prefix}ForCausalLM")(config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(SCALE * torch.randn_like(parameter))
    return model


def tokens(rows: int, time: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, time), generator=generator)


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids, **arguments).logits


def new_cache(model: Any, rows: int) -> dict[str, Any]:
    """Hybrid models of version 4 make no cache of their own; the others do."""
    modeling = sys.modules[type(model).__module__]
    made = next((kind for name, kind in vars(modeling).items() if _OLD and name.endswith("HybridDynamicCache")), None)
    made = made or getattr(modeling, "HybridMambaAttentionDynamicCache", None) or _falcon_cache(modeling)
    return {} if made is None else {"past_key_values": made(model.config, rows, torch.float32)}


def _falcon_cache(modeling: Any) -> Any:
    kind = getattr(modeling, "FalconHybridMambaAttentionDynamicCache", None)
    return kind and (lambda config, rows, dtype: kind(config, rows, dtype, ["cpu"] * config.num_hidden_layers))


def packing(lengths: list[int], name: str) -> dict[str, Tensor]:
    """Arguments of packed sequences, in one of the library's two ways."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    if name == "seq_idx":
        packed = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()
    else:
        packed = torch.tensor([0, *lengths]).cumsum(0).int()
    return {name: packed, "position_ids": positions}


class Trained(NamedTuple):
    """Logits, and gradients of their sum with random weights."""

    logits: Tensor
    grads: dict[str, Tensor]


def summed_gradients(model: Any, ids: Tensor, **arguments: Any) -> Trained:
    """In training."""
    model.train()
    model.zero_grad()
    known = inspect.signature(model.forward).parameters
    if "position_ids" not in known:
        arguments.pop("position_ids", None)
    out = model(ids, use_cache=False, **arguments).logits
    (out * (ids[..., None] - 30.0)).mean(-1).sum().backward()
    return Trained(out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def second_part(model: Any, ids: Tensor, first: int, **arguments: Any) -> Tensor:
    """Logits after ``first`` steps, from a cache of those."""
    model.eval()
    known = inspect.signature(model.forward).parameters
    steps = torch.arange(ids.shape[1])
    positions = {"cache_position": steps[first:], "position_ids": steps[None, first:]}
    positions = {name: value for name, value in positions.items() if name in known}
    with torch.no_grad():
        output = model(ids[:, :first], use_cache=True, **new_cache(model, len(ids)))
        names = ("cache", "past_key_values", "cache_params")
        made = next(output[name] for name in names if getattr(output, name, None) is not None)
        cache = {next(name for name in names if name in known): made}
        return model(ids[:, first:], use_cache=True, **(positions | cache | arguments)).logits


def gradients(model: Any, ids: Tensor, **arguments: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def behaviour(model: Any, rows: int = 2, time: int = 21, first: int = 9) -> Behaviour:
    ids = tokens(rows, time)
    mask = torch.ones_like(ids)
    mask[0, : time // 3] = 0
    padded = logits(model, ids, attention_mask=mask)[mask.bool()]
    model.eval()
    generated = model.generate(
        ids[:, :first], attention_mask=mask[:, :first], max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    return Behaviour(logits(model, ids), padded, gradients(model, ids), generated)


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def worst_gradient(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of the gradients' difference, relative to the largest entry of the same parameter's gradient."""
    assert a.keys() == b.keys()
    scale = max(float(x.abs().max()) for x in b.values())
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp_min(1e-3 * scale)) for name in b)


def main(names: list[str]) -> None:
    """Prints, for each model of the installed version, the differences with and without kernels."""
    import transformers

    import wmkernels.integrations.transformers as ours

    print(f"transformers {transformers.__version__}")
    for name in names or TINY:
        if not exists(name):
            print(f"{name:18} not in this version")
            continue
        model = build(name)
        ids, first = tokens(2, 21), 9
        before = behaviour(model)
        try:
            was = f"{error(second_part(model, ids, first), before.logits[:, first:]):.0e}"
        except Exception as failure:  # the library's, for the table
            was = type(failure).__name__
        ours.enable(name)
        after, second, report = behaviour(model), second_part(model, ids, first), ours.report()
        ours.disable()
        print(
            f"{name:17} logits {error(after.logits, before.logits):.0e}"
            f"  padded {error(after.padded, before.padded):.0e}"
            f"  gradient {worst_gradient(after.grads, before.grads):.0e}"
            f"  tokens {'equal' if torch.equal(after.tokens, before.tokens) else 'DIFFER'}"
            f"  second part {error(second, after.logits[:, first:]):.0e} (was {was})"
            f"  {dict(report.calls)}{dict(report.left_alone) or ''}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
