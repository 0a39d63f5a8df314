"""Language models of Mamba blocks."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wmkernels.checks import shown
from wmkernels.compat.mamba_ssm.models.config_mamba import MambaConfig
from wmkernels.compat.mamba_ssm.modules.block import Block, add_and_norm
from wmkernels.compat.mamba_ssm.modules.mamba2 import Mamba2
from wmkernels.compat.mamba_ssm.modules.mamba3 import Mamba3
from wmkernels.compat.mamba_ssm.modules.mamba_simple import Mamba
from wmkernels.compat.mamba_ssm.modules.mlp import GatedMLP
from wmkernels.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from wmkernels.compat.mamba_ssm.utils.generation import GenerationMixin
from wmkernels.compat.mamba_ssm.utils.hf import CONFIG, WEIGHTS, load_config_hf, load_state_dict_hf

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}


class CausalLMOutput(NamedTuple):
    """(batch, time, vocabulary)."""

    logits: Tensor


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A block of the mixer ``ssm_cfg["layer"]``; raises ValueError for another kind, and for attention."""
    if attn_layer_idx:
        raise ValueError(
            f"create_block: attn_layer_idx is {shown(attn_layer_idx)}, expected none: there is no attention"
        )
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    settings = dict(ssm_cfg or {})
    kind = settings.pop("layer", "Mamba1")
    if kind not in _MIXERS:
        raise ValueError(f"create_block: layer is {shown(kind)}, expected {', '.join(_MIXERS)}")
    mixer = partial(_MIXERS[kind], layer_idx=layer_idx, **settings, **factory)
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    return Block(d_model, mixer, mlp, norm, fused_add_norm, residual_in_fp32)


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Of GPT-2: what is added to the residual is smaller by the root of the number of additions."""
    if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if not rescale_prenorm_residual:
        return
    for name, parameter in module.named_parameters():
        if name in ("out_proj.weight", "fc2.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            with torch.no_grad():
                parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and a last norm; arguments as of ``MambaConfig``."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        kind = (ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, residual_in_fp32, fused_add_norm)
        self.layers = nn.ModuleList(
            create_block(d_model, d_intermediate, *kind, layer_idx=i, **factory) for i in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        residuals = 2 if d_intermediate else 1
        self.apply(partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {}), n_residuals_per_layer=residuals))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """States of each block by its number."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """Token numbers (batch, time) -> (batch, time, d_model); other arguments are the mixers'."""
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params, **mixer_kwargs)
        return add_and_norm(self.norm_f, hidden_states, residual, self.fused_add_norm, False)[0]


class MambaLMHeadModel(GenerationMixin, nn.Module):
    """A language model: ``MixerModel`` and an output layer.

    Example:
        >>> import torch
        >>> from wmkernels.compat.mamba_ssm.models.config_mamba import MambaConfig
        >>> from wmkernels.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        >>> model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=100))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 104])
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_length=8).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        vocab_size = -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            vocab_size,
            config.ssm_cfg,
            config.attn_layer_idx,
            config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """With ``tie_embeddings``, the output layer takes the embedding's weights."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """As of ``MixerModel``."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits (batch, time, vocabulary), or of the last ``num_last_tokens`` steps; there are no positions."""
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden_states[:, -num_last_tokens:]))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "MambaLMHeadModel":
        """From a local folder with config.json and pytorch_model.bin or model.safetensors; nothing is downloaded.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: another configuration.
            RuntimeError: weights of another model.
        """
        settings = load_config_hf(pretrained_model_name)
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(MambaConfig)})
        if unknown:
            raise ValueError(f"from_pretrained: {CONFIG} has {unknown[0]!r}, expected only settings of MambaConfig")
        model = cls(MambaConfig(**settings), device=device, dtype=dtype, **kwargs)
        weights = load_state_dict_hf(pretrained_model_name, device, dtype)
        embedding = weights.get("backbone.embedding.weight")
        if model.config.tie_embeddings and embedding is not None:  # a file may hold shared weights once
            weights.setdefault("lm_head.weight", embedding)
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the two files that ``from_pretrained`` reads."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(self.config), indent=4))
