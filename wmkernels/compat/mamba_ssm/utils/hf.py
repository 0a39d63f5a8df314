"""Files of a model, from a local folder."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS, SAFETENSORS = "config.json", "pytorch_model.bin", "model.safetensors"


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """config.json. Raises FileNotFoundError, ValueError."""
    found = json.loads(_file(model_name, CONFIG).read_text())
    if not isinstance(found, dict):
        raise ValueError(f"load_config_hf: {CONFIG} holds a {type(found).__name__}, expected an object")
    return found


def load_state_dict_hf(
    model_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Tensors by name; nothing in the file is executed. Raises FileNotFoundError."""
    safe = Path(model_name) / SAFETENSORS
    if safe.is_file() and importlib.util.find_spec("safetensors"):
        weights = importlib.import_module("safetensors.torch").load_file(safe)
    else:
        weights = torch.load(_file(model_name, WEIGHTS), map_location="cpu", weights_only=True)
    return {name: value.to(device=device, dtype=dtype) for name, value in weights.items()}


def _file(model_name: str | Path, name: str) -> Path:
    path = Path(model_name) / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, expected a local folder with {name}: nothing is downloaded")
    return path
