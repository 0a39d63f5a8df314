"""Converts other ConvLSTMs' weights to ``wmkernels.nn.ConvLSTM`` state dicts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import require_tensor, shown

_GATES = "ifgo"


def conv_lstm_from_cell_list(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From ndrplz/ConvLSTM_pytorch: ``cell_list.{l}.conv.weight`` and ``.bias``, any prefix; gates i, f, o, g.

    Raises:
        ValueError: unexpected key or shape, or unequal layers.
    """
    function = "conv_lstm_from_cell_list"
    layers = []
    for number, found in enumerate(_layers(function, state_dict, ("conv.weight", "conv.bias"), "conv.weight")):
        weight = found["conv.weight"]
        hidden = _hidden_size(function, f"layer {number}'s conv.weight", weight, with_input=True)
        weight = _reordered(weight, "ifog")
        layer = {"weight_ih": weight[:, :-hidden].clone(), "weight_hh": weight[:, -hidden:].clone()}
        if "conv.bias" in found:
            layer["bias"] = _reordered(found["conv.bias"], "ifog")
        layers.append(layer)
    return _joined(function, layers)


def conv_lstm_from_openstl(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From an OpenSTL model or its ``cell_list``, for ``ConvLSTM(..., bias=False)``; gates i, f, g, o.

    ``conv_last`` and unused cell convolutions are ignored. Strides, which also apply to h, cannot be converted.

    Raises:
        ValueError: LayerNorm, unexpected key or shape, or unequal layers.
    """
    function = "conv_lstm_from_openstl"
    _require_mapping(function, state_dict)
    normalised = [key for key in state_dict if re.search(r"conv_[xh]\.1\.(weight|bias)$", key)]
    if normalised:
        raise ValueError(
            f"{function}: state_dict has {normalised[0]}, a LayerNorm of one of the two convolutions; ConvLSTM has "
            "none, so only models trained with layer_norm=False can be converted"
        )
    known = ("conv_x.0.weight", "conv_h.0.weight", "conv_o.0.weight", "conv_o.1.weight", "conv_o.1.bias")
    layers = []
    for number, found in enumerate(_layers(function, state_dict, (*known, "conv_last.weight"), *known[:2])):
        _hidden_size(function, f"layer {number}'s conv_h.0.weight", found[known[1]])
        layers.append({"weight_ih": found[known[0]], "weight_hh": found[known[1]]})
    return _joined(function, layers)


def conv_lstm_from_keras(weights: Sequence[Any], *, recurrent_activation: str) -> dict[str, Tensor]:
    """From ``get_weights()`` of one Keras ``ConvLSTM2D`` with activation tanh.

    Args:
        weights: kernel, recurrent_kernel (height, width, in, 4 * filters) and optional bias; gates i, f, c, o.
        recurrent_activation: must be ``"sigmoid"``; Keras 2 defaults to ``"hard_sigmoid"``.

    Raises:
        ValueError: other recurrent activation, number of weights or shape.
    """
    function = "conv_lstm_from_keras"
    if recurrent_activation != "sigmoid":
        raise ValueError(
            f"{function}: recurrent_activation is {recurrent_activation!r}, expected 'sigmoid': the gates of ConvLSTM "
            "are sigmoids, and weights trained with another function compute something else with them"
        )
    if not isinstance(weights, Sequence) or isinstance(weights, str | bytes):
        raise TypeError(f"{function}: weights is {shown(weights)}, expected a list of arrays as of get_weights()")
    if len(weights) not in (2, 3):
        raise ValueError(
            f"{function}: weights holds {len(weights)} arrays, expected kernel, recurrent_kernel and perhaps bias"
        )
    try:
        kernel, recurrent, *rest = (torch.as_tensor(array) for array in weights)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{function}: weights is {shown(weights)}, expected arrays: {error}") from error
    if kernel.dim() != 4 or recurrent.dim() != 4 or kernel.shape[3] != recurrent.shape[3]:
        raise ValueError(
            f"{function}: kernel has shape {tuple(kernel.shape)} and recurrent_kernel {tuple(recurrent.shape)}, "
            "expected (height, width, input, 4 * filters) and (height, width, filters, 4 * filters)"
        )
    layer = {name: x.permute(3, 2, 0, 1).contiguous() for name, x in (("weight_ih", kernel), ("weight_hh", recurrent))}
    _hidden_size(function, "recurrent_kernel", layer["weight_hh"])
    if rest:
        if tuple(rest[0].shape) != (kernel.shape[3],):
            raise ValueError(f"{function}: bias has shape {tuple(rest[0].shape)}, expected ({kernel.shape[3]},)")
        layer["bias"] = rest[0].clone()
    return _joined(function, [layer])


def _layers(
    function: str, state_dict: Mapping[str, Tensor], known: Sequence[str], *required: str
) -> list[dict[str, Tensor]]:
    _require_mapping(function, state_dict)
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        match = re.search(r"(?:^|\.)cell_list\.(\d+)\.(.+)$", key)
        if match is None:
            continue
        if match[2] not in known:
            raise ValueError(f"{function}: state_dict has {key}, expected only {', '.join(known)} in a cell")
        require_tensor(function, f"state_dict[{key!r}]", value)
        found.setdefault(int(match[1]), {})[match[2]] = value
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(
            f"{function}: state_dict has the layers {sorted(found)}, expected cell_list.0, cell_list.1, ...; its keys "
            f"are {sorted(state_dict)[:4]} ..."
        )
    layers = [found[number] for number in range(len(found))]
    for number, layer in enumerate(layers):
        missing = [name for name in required if name not in layer]
        if missing:
            raise ValueError(f"{function}: state_dict has no cell_list.{number}.{missing[0]}")
    return layers


def _require_mapping(function: str, state_dict: object) -> None:
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"{function}: state_dict is {shown(state_dict)}, expected a dict of tensors by name")


def _hidden_size(function: str, name: str, weight: Tensor, with_input: bool = False) -> int:
    hidden = weight.shape[0] // 4
    fits = weight.dim() == 4 and (weight.shape[1] > hidden if with_input else weight.shape[1] == hidden)
    if not fits or weight.shape[0] % 4:
        wanted = "input + hidden" if with_input else "hidden"
        raise ValueError(
            f"{function}: {name} has shape {tuple(weight.shape)} as (out, in, height, width), expected 4 * hidden out "
            f"and {wanted} in"
        )
    return hidden


def _reordered(parameter: Tensor, order: str) -> Tensor:
    parts = dict(zip(order, parameter.chunk(4), strict=True))
    return torch.cat([parts[gate] for gate in _GATES])


def _joined(function: str, layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    for name in ("hidden sizes", "kernels"):
        shapes = [layer["weight_hh"].shape for layer in layers]
        sizes = [shape[1] if name == "hidden sizes" else tuple(shape[2:]) for shape in shapes]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{function}: the layers have the {name} {sizes}, expected the same in all; convert each layer's keys "
                "by themselves, renamed to cell_list.0, into a ConvLSTM of one layer"
            )
    return {f"{name}_l{number}": value for number, layer in enumerate(layers) for name, value in layer.items()}
