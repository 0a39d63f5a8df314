"""Nested state as one safetensors file: no pickle, and a damaged file is told from a whole one.

A state is what ``state_dict`` functions return: dicts, lists and tuples, nested, of tensors, arrays and plain values.
Its tensors become the tensors of the file; everything else becomes JSON in the file's metadata, in which a tensor
stands as ``{"tensor": key}``, so a dict whose keys are numbers and a tuple come back as they were. Metadata also holds
a checksum of the tensors, because safetensors itself notices a file that is cut short but not one with a flipped bit.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.runs.optional_dependencies import require

_PLAIN = (str, int, float, bool, type(None))


class DamagedFile(ValueError):
    """A file that is not what was written."""


def save(path: Path, state: Any) -> None:
    """Writes ``state`` to ``path``: beside it first, then renamed, so that a whole file stands there at any moment.

    Raises:
        TypeError: a value that is neither a tensor, an array, a plain value nor a container of them.
    """
    tensors: dict[str, Tensor] = {}
    outline = json.dumps(_outline(state, tensors, path.stem))
    metadata = {"outline": outline, "checksum": _checksum(tensors, outline)}
    beside = path.with_name(path.name + ".partial")
    require("safetensors.torch", "write checkpoints").save_file(tensors, str(beside), metadata)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``save`` wrote, with its tensors on ``device``.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: the file was cut short, changed, or written by something else.
    """
    safetensors = require("safetensors", "read checkpoints")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        outline = metadata["outline"]
        whole = metadata["checksum"] == _checksum(tensors, outline)
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error
    if not whole:
        raise DamagedFile(f"{path} is damaged: its checksum is not that of its content")
    return _restored(json.loads(outline), {name: tensor.to(device) for name, tensor in tensors.items()})


def _checksum(tensors: dict[str, Tensor], outline: str) -> str:
    digest = hashlib.sha256(outline.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _outline(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """JSON for ``value``; its tensors go into ``tensors``, named for their place."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {"tensor": where}
    if isinstance(value, np.ndarray):
        tensors[where] = torch.from_numpy(value.copy())
        return {"array": where}
    if isinstance(value, dict):
        pairs = [[_outline(k, tensors, where), _outline(v, tensors, f"{where}.{k}")] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_outline(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]}
    raise TypeError(f"save: {where} is a {type(value).__name__}, expected a tensor, an array or a plain value")


def _restored(outline: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(outline, dict):
        return outline
    ((kind, content),) = outline.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].cpu().numpy()
    if kind == "dict":
        return {_restored(key, tensors): _restored(value, tensors) for key, value in content}
    items = [_restored(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
