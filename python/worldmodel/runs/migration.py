"""Migration of configurations, weights and checkpoints from earlier releases."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from worldmodel.runs.sequences import Loaded

Value = TypeVar("Value")

MOST_BLOCKS = 256  # of a memory

# Fields of ``config.json``, old -> new.
FIELDS = {
    "train.model.perception.variables": "train.model.perception.latent.variables",
    "train.model.perception.classes": "train.model.perception.latent.classes",
    "train.model.perception.drawn": "train.model.perception.latent.stochastic",
    "train.model.perception.uniform": "train.model.perception.latent.unimix_ratio",
    "spaces.observation.leaves": "spaces.observation.modalities",
    "train.model.evaluation.trace": "train.model.evaluation.lambda_",
    "train.model.evaluation.slow": "train.model.evaluation.tau",
    "train.model.decision.improve": "train.model.decision.gradient",
    "train.model.decision.few": "train.model.decision.max_enumerated_actions",
    "train.model.decision.uniform": "train.model.decision.unimix_ratio",
    "train.learner.learning_rate": "train.learner.model_lr",
    "train.learner.value_rate": "train.learner.value_lr",
    "train.learner.policy_rate": "train.learner.policy_lr",
    "train.learner.clip": "train.learner.max_grad_norm",
    "train.learner.average": "train.learner.ema",
    "train.learner.objective.starts": "train.learner.objective.imagination_starts",
}

# Field -> old -> new value.
VALUES: dict[str, dict[Any, Any]] = {
    "train.model.decision.gradient": {"exact": "all_action", "dynamics": "pathwise"},
    "train.model.decision.greedy": {"look_ahead": "one_step_planning"},
}

# Environments, module prefix -> id prefix.
ENVIRONMENTS = {"worldmodel.hidden_ball:": "worldmodel/", "worldmodel.minigrid:": "worldmodel/"}

# Parts of weight names, old -> new.
WEIGHTS = {
    "evaluation.slow": "evaluation.target",
    "low": "v_min",
    "high": "v_max",
}

# Checkpoint files, new -> old.
PARTS = {"ema": "average"}

# Keys in version 1, old -> new.
KEYS = {
    "replay": {
        "unfinished": "writer",
        "pieces": "chunks",
        "numbers": "chunk_ids",
        "next_number": "next_id",
        "left": "remaining",
        "undrawn": "unsampled",
        "passes": "epochs",
    },
}


def load_part(name: str, read: Callable[[str], tuple[Any, int]], exists: Callable[[str], bool]) -> Any:
    """A checkpoint's part, upgraded; ``read`` returns (state, format version)."""
    old = PARTS.get(name, name)
    state, version = read(old if exists(old) and not exists(name) else name)
    if version > 3:
        return state
    if version == 3:
        return _later(state) if name == "replay" else state
    if version == 2:
        return _replay(state) if name == "replay" else state
    if name in ("world_model", "ema"):
        rewards = read("learner")[0]["rewards"]  # the reward scale in version 1
        device = next(iter(state.values())).device
        scale = {
            "reward_scale.count": torch.tensor(rewards["count"], dtype=torch.float64, device=device),
            "reward_scale.mean_square": torch.tensor(rewards["square"], dtype=torch.float64, device=device),
        }
        return {**upgrade_weights(state), **scale}
    upgraded = {KEYS.get(name, {}).get(key, key): value for key, value in state.items()}
    if name == "replay":
        writer = dict(upgraded["writer"])
        writer["reward_mask"] = np.ones(writer["rewards"].shape, bool)
        num_envs, transitions = writer["rewards"].shape
        writer["elapsed"] = np.ones((num_envs, transitions + 1), np.float32)
        return _replay({**upgraded, "writer": writer})
    if name == "learner":
        del upgraded["rewards"]
    if name == "collector" and "numbers" in (upgraded["episodes"] or {}):  # a gymnasium vector environment has none
        episodes = dict(upgraded["episodes"])
        episodes["episode_ids"] = episodes.pop("numbers")
        upgraded["episodes"] = episodes
    return upgraded


def _replay(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replay of version 2, whose chunks are concatenated and whose unfinished ones are padded, as sequences."""
    if not {"writer", "chunks", "chunk_ids"} <= state.keys():  # another source
        return state
    sequences = Loaded(zip(state["chunk_ids"], _chunks(state["chunks"]), strict=True))
    writer, next_id = state["writer"], state["next_id"]
    running = []
    for row, length in enumerate(writer["length"].tolist()):
        running.append(
            {
                "id": next_id + row,
                "episode_step": int(writer["episode_step"][row]),
                "burn_in": int(writer["repeated"][row]),
            }
        )
        sequences[next_id + row] = {
            **{f"observations.{name}": array[row, : length + 1] for name, array in writer["observations"].items()},
            **{name: writer[name][row, :length] for name in ("actions", "rewards", "reward_mask")},
            "elapsed": writer["elapsed"][row, : length + 1],
        }
    kept = {name: value for name, value in state.items() if name not in ("chunks", "next_id")}
    states = {name: writer[name] for name in ("state", "next_state")}
    writer = {"running": running, "next_id": next_id + len(running), **states}
    return _later({**kept, "sequences": sequences, "writer": writer})


def _later(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replay of version 3, which had at most one state of a later chunk, that of the next."""
    if "writer" not in state:  # another source
        return state
    writer = dict(state["writer"])
    writer["later"] = [[] if stored is None else [(None, *stored)] for stored in writer.pop("next_state")]
    return {**state, "writer": writer}


def _chunks(packed: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    start = used_states = 0
    for index, length in enumerate(packed["length"].tolist() if packed else ()):
        first = start + index  # each earlier chunk has one extra observation
        steps, transitions = slice(first, first + length + 1), slice(start, start + length)
        chunk = {f"observations.{name}": array[steps].copy() for name, array in packed["observations"].items()}
        chunk |= {name: packed[name][transitions].copy() for name in ("actions", "rewards")}
        chunk["reward_mask"] = packed["reward_mask"][transitions] if "reward_mask" in packed else np.ones(length, bool)
        chunk["elapsed"] = packed["elapsed"][steps] if "elapsed" in packed else np.ones(length + 1, np.float32)
        if packed["inside"][index]:
            chunk |= {f"state.{name}": array[used_states][None].copy() for name, array in packed["states"].items()}
            used_states += 1
        chunk |= {name: packed[name][index : index + 1] for name in ("inside", "terminated", "burn_in", "version")}
        yield chunk
        start += length


# Options of commands other than train, old -> new.
OPTIONS = {"imagine": {"--draw": "--sample-latents"}}


def renamed_option(argument: str, command: str = "train") -> str | None:
    """The current option for an earlier one, else None.

    Example:
        >>> renamed_option("--learner.policy-rate=1")
        '--learner.policy-lr'
        >>> renamed_option("--learner.policy-lr")
        >>> renamed_option("--draw", "imagine")
        '--sample-latents'
    """
    if not argument.startswith("--"):
        return None
    if command != "train":
        return OPTIONS.get(command, {}).get(argument.partition("=")[0])
    field = f"train.{argument[2:].partition('=')[0].replace('-', '_')}"
    if field in FIELDS:
        return _option(FIELDS[field])
    parent, _, name = field.rpartition(".")
    if parent == "train.model.memory" and name in _MEMORY and name != "width":
        return "--memory, which chooses blocks, and --model.memory.blocks.N, which has their settings"
    return None


def _option(field: str) -> str:
    return "--" + re.sub("_(?=.)", "-", field.removeprefix("train."))


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` with current names; ``from_json`` rejects unknown ones."""
    upgraded = _copied(config)
    for old, new in FIELDS.items():
        parent, name = _parent(upgraded, old)
        if parent is not None and name in parent:
            value = parent.pop(name)
            target = upgraded
            *path, last = new.split(".")
            for part in path:
                target = target.setdefault(part, {})
            target[last] = value
    for field, values in VALUES.items():
        parent, name = _parent(upgraded, field)
        if parent is not None and isinstance(parent.get(name), str):
            parent[name] = values.get(parent[name], parent[name])
    train, _ = _parent(upgraded, "train.env")
    if train is not None and isinstance(train.get("env"), str):
        for old, new in ENVIRONMENTS.items():
            train["env"] = train["env"].replace(old, new)
    latent, _ = _parent(upgraded, "train.model.perception.latent.kind")
    if latent is not None:
        latent.setdefault("kind", "categorical")
    spaces, _ = _parent(upgraded, "spaces.observation.modalities")
    parts = spaces.get("modalities") if spaces is not None else None
    for part in parts.values() if isinstance(parts, dict) else ():
        if isinstance(part, dict) and "channels_first" in part:  # then of pictures alone
            first = part.pop("channels_first")
            part["layout"] = ("CHW" if first else "HWC") if part.get("kind") in ("image", "grid") else ""
    model, _ = _parent(upgraded, "train.model.memory")
    if model is not None and isinstance(model.get("memory"), dict):
        model["memory"] = upgrade_memory(model["memory"])
    return upgraded


def upgrade_memory(old: Mapping[str, Any]) -> dict[str, Any]:
    """Converts an old ``MemoryConfig`` to ``width`` and ``blocks``.

    Example:
        >>> upgrade_memory({"kind": "gru", "width": 128, "layers": 2})
        {'width': 128, 'blocks': [{'kind': 'gru'}, {'kind': 'gru'}]}
    """
    if "blocks" in old:
        return dict(old)
    given = {**_MEMORY, **old}
    conv = {"d_conv": given["convolution"], "expand": given["expand"]}
    scan = {"d_state": given["states"], "groups": given["groups"], **conv}
    block: dict[str, Any]
    if given["kind"] == "gru":
        block = {"kind": "gru"}
    elif given["kind"] == "conv_lstm":
        block = {"kind": "conv_lstm", "map_size": given["map_size"], "kernel": given["kernel"]}
    elif given["kind"] == "none":
        block = {"kind": "gated_conv", **conv, "d_conv": 1}
    elif not given["scan"]:
        block = {"kind": "gated_conv", **conv}
    elif not given["rotated"]:
        block = {"kind": "scan", **scan}
    else:
        rotation = {"selective_angle": given["selective_angle"], "decay": given["decay"]}
        block = {"kind": "rotary_scan", **scan, **rotation}
    unknown = {name: value for name, value in old.items() if name not in _MEMORY}
    layers = given["layers"] if type(given["layers"]) is int else 0  # which is refused as too few blocks
    return {"width": given["width"], "blocks": [dict(block) for _ in range(min(layers, MOST_BLOCKS + 1))], **unknown}


_MEMORY: dict[str, Any] = {
    "kind": "scan",
    "width": 64,
    "layers": 1,
    "expand": 2,
    "states": 16,
    "groups": 4,
    "convolution": 4,
    "scan": True,
    "rotated": True,
    "selective_angle": False,
    "decay": 0.5,
    "map_size": [4, 4],
    "kernel": 3,
}


def upgrade_weights(weights: Mapping[str, Value]) -> dict[str, Value]:
    """A world model's state dict with current names.

    Example:
        >>> upgrade_weights({"evaluation.slow.3.low": 1, "prediction.reward.project.bias": 2})
        {'evaluation.target.3.v_min': 1, 'prediction.reward.project.bias': 2}
    """
    upgraded = {}
    for name, value in weights.items():
        renamed = f".{name}."
        for old, new in WEIGHTS.items():
            renamed = renamed.replace(f".{old}.", f".{new}.")
        upgraded[renamed[1:-1]] = value
    return upgraded


def _parent(config: dict[str, Any], field: str) -> tuple[dict[str, Any] | None, str]:
    *path, last = field.split(".")
    inner: Any = config
    for part in path:
        inner = inner.get(part) if isinstance(inner, dict) else None
    return (inner if isinstance(inner, dict) else None), last


def _copied(value: Any) -> Any:
    return {name: _copied(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value
