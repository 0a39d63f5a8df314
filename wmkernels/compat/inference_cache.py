"""States of modules in the caches of mamba_ssm, which are updated in place."""

from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import shown
from wmkernels.compat.arguments import rows_of


def cached_states(
    module: Any, inference_params: Any, batch_size: int, initialize_states: bool = False
) -> tuple[Tensor, ...]:
    """The module's tensors in ``inference_params``, made where there are none. Raises ValueError."""
    name, layer = type(module).__name__, module.layer_idx
    if layer is None:
        raise ValueError(f"{name}: layer_idx is None, expected the layer's number: its states are cached under it")
    memory = inference_params.key_value_memory_dict
    if layer not in memory:
        memory[layer] = module.allocate_inference_cache(batch_size, 0)
    states: tuple[Tensor, ...] = memory[layer]
    if states[0].shape[0] != batch_size:
        raise ValueError(
            f"{name}: layer {layer} has a cache of {states[0].shape[0]} rows, expected {batch_size} as the input has"
        )
    if initialize_states:
        for state in states:
            state.zero_()
    return states


def require_token(module: str, hidden_states: Tensor) -> Tensor:
    """(batch, d_model) of a single step; raises ValueError."""
    if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
        raise ValueError(
            f"{module}: hidden_states has shape {tuple(hidden_states.shape)}, expected (batch, 1, d_model) for a step"
        )
    return hidden_states.squeeze(1)


def without_group(module: str, process_group: object) -> None:
    """Raises ValueError."""
    if process_group is not None:
        raise ValueError(f"{module}: process_group is {shown(process_group)}, expected None: this block is not sharded")


def read_window(conv_state: Tensor) -> Tensor:
    """(rows, channels, d_conv) -> the last d_conv - 1 inputs, (rows, d_conv - 1, channels)."""
    return rows_of(None, conv_state)[..., 1:].mT


def write_window(conv_state: Tensor, window: Tensor, is_step: bool) -> None:
    """The inverse in place. The oldest input, which no later output reads, is known after a single step, else 0."""
    oldest = conv_state[..., 1:2] if is_step else conv_state[..., :0]
    newest = torch.cat([oldest, window.mT.to(conv_state.dtype)], -1)
    missing = conv_state.shape[-1] - newest.shape[-1]
    conv_state.copy_(torch.nn.functional.pad(newest, (missing, 0)))
