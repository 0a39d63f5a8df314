"""The configuration of a language model."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class MambaConfig:
    """Arguments of ``MambaLMHeadModel``.

    Attributes:
        d_model: features.
        d_intermediate: of the MLP in a block; 0 for none.
        n_layer: blocks.
        vocab_size: tokens, rounded up to ``pad_vocab_size_multiple``.
        ssm_cfg: arguments of the mixer, and its kind as ``layer``: ``"Mamba1"``, ``"Mamba2"`` or ``"Mamba3"``.
        attn_layer_idx: empty; blocks of attention are refused.
        attn_cfg: of such blocks.
        rms_norm: RMS norms instead of LayerNorm.
        residual_in_fp32: the residual is float32.
        fused_add_norm: sum and norm in float32.
        tie_embeddings: the output layer has the weights of the embedding.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
