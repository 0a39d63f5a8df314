"""Nested state as one safetensors file, without pickle. Format: ``docs/state_files.md``.

Plain values become JSON metadata. The checksum detects flipped bits, which safetensors does not.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.runs.files import RunError, open_file, replacing, shown
from worldmodel.runs.memory import machine_memory
from worldmodel.runs.optional_dependencies import require
from worldmodel.runs.schema import meaning_of
from worldmodel.runs.sequences import Loaded, Segment, Sequences, unpacked

FORMAT = "wmkernels-state"
VERSION = 4  # a file without one has version 1

_PLAIN = (str, int, float, bool, type(None))


class DamagedFile(ValueError):
    """The content is not what was written."""


class NewerFile(ValueError):
    """A file of a later release."""


Content = tuple[dict[str, Tensor], dict[str, str]]  # tensors, metadata
ReadSegment = Callable[[Mapping[str, Any]], tuple[Any, Segment]]


def save(path: Path, state: Any, append: Callable[[Sequences], Any] = Sequences.inline) -> None:
    """Writes nested tensors, arrays and plain values atomically.

    ``append`` returns what stands for ``Sequences``. Raises TypeError for other values, OSError if it cannot write.
    """
    write(path, content_of(path.stem, state, append))


def content_of(part: str, state: Any, append: Callable[[Sequences], Any] = Sequences.inline) -> Content:
    """Tensors and metadata of a file; "checksum" is in the metadata."""
    tensors: dict[str, Tensor] = {}
    outline = json.dumps(_outline(state, tensors, part, append))
    schema = json.dumps(_schema(part, tensors))
    metadata = {"format": FORMAT, "version": str(VERSION), "outline": outline, "schema": schema}
    metadata["checksum"] = _checksum(tensors, metadata)
    return tensors, metadata


def write(path: Path, content: Content) -> None:
    """Writes a file atomically; raises OSError if it cannot."""
    with replacing(path) as beside:
        _write(content[0], beside, content[1])


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Raises OSError where safetensors gives its number in a message alone."""
    write = require("safetensors.torch", "write checkpoints").save_file
    try:
        write(tensors, str(path), metadata)
    except require("safetensors", "write checkpoints").SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """The state in ``path``; raises as ``load_versioned``."""
    return load_versioned(path, device)[0]


def load_versioned(path: Path, device: torch.device | str = "cpu", read: ReadSegment | None = None) -> tuple[Any, int]:
    """The state in ``path`` and its format version; raises as ``load_with_metadata``."""
    state, metadata = load_with_metadata(path, device, read)
    return state, int(metadata.get("version", 1))


def load_with_metadata(
    path: Path, device: torch.device | str = "cpu", read: ReadSegment | None = None
) -> tuple[Any, dict[str, str]]:
    """The state in ``path`` and the file's metadata; ``read`` reads the segments of ``Sequences``.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: the file is truncated, changed or foreign.
        NewerFile: a later release wrote it.
    """
    safetensors = require("safetensors", "read checkpoints")
    os.close(_open(path))
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        outline = metadata["outline"]
        whole = metadata["checksum"] == _checksum(tensors, metadata)
        version = int(metadata.get("version", 1))
        fits = version == 1 or json.loads(metadata["schema"])["tensors"].keys() == tensors.keys()
        state = json.loads(outline)
    except (OSError, LookupError, TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise DamagedFile(f"{path} is damaged: {shown(error, 400)}") from error
    if not whole:
        raise DamagedFile(f"{path} is damaged: its checksum is not that of its content")
    if version > VERSION:
        raise NewerFile(
            f"{path} has version {version} of the state format, this release reads versions up to {VERSION}: a later "
            "release wrote it and reads it"
        )
    if not fits or metadata.get("format", FORMAT) != FORMAT:
        raise DamagedFile(f"{path} is damaged: its schema is not that of its tensors")
    try:
        return _restored(state, {name: tensor.to(device) for name, tensor in tensors.items()}, read), metadata
    except (DamagedFile, NewerFile, RunError):  # of a segment
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {type(error).__name__}: {shown(error, 400)}") from error


def _open(path: Path) -> int:
    try:
        handle = open_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    size, most = os.fstat(handle).st_size, machine_memory()
    if size > most:
        os.close(handle)
        raise DamagedFile(f"{path} has {size:,} bytes, more than this machine's memory of {most:,}")
    return handle


def has_sequences(path: Path) -> bool:
    """Whether there are ``Sequences`` in a file, by its unchecked header; raises DamagedFile, or as ``open_file``."""
    safetensors = require("safetensors", "read checkpoints")
    os.close(_open(path))
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            return '{"sequences": ' in (file.metadata() or {})["outline"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error


def _schema(part: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    described = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "meaning": meaning_of(name),
        }
        for name, tensor in sorted(tensors.items())
    }
    return {"part": part, "tensors": described}


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Version 1 had only an outline."""
    names = ("format", "version", "schema", "outline") if "version" in metadata else ("outline",)
    digest = hashlib.sha256("\n".join(metadata[name] for name in names).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _outline(value: Any, tensors: dict[str, Tensor], where: str, append: Callable[[Sequences], Any]) -> Any:
    def inner(value: Any, where: str) -> Any:
        return _outline(value, tensors, where, append)

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
    if isinstance(value, Sequences):
        return {"sequences": inner(append(value), where)}
    if isinstance(value, dict):
        return {"dict": [[inner(k, where), inner(v, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [inner(v, f"{where}.{i}") for i, v in enumerate(value)]}
    raise TypeError(f"save: {where} is a {type(value).__name__}, expected a tensor, an array or a plain value")


def _restored(outline: Any, tensors: dict[str, Tensor], read: ReadSegment | None) -> Any:
    if not isinstance(outline, dict):
        return outline
    ((kind, content),) = outline.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].cpu().numpy()
    if kind == "dict":
        return {_restored(key, tensors, read): _restored(value, tensors, read) for key, value in content}
    if kind == "sequences":
        return _sequences(_restored(content, tensors, read), read)
    items = [_restored(item, tensors, read) for item in content]
    return tuple(items) if kind == "tuple" else items


def _sequences(content: dict[str, Any], read: ReadSegment | None) -> Loaded:
    if "packs" in content:
        return unpacked(content, ((pack, None) for pack in content["packs"]))
    if read is None:
        raise ValueError("its sequences are in the segments of a run, which Run.load reads")
    return unpacked(content, map(read, content["segments"]))
