"""Checks of a replay's saved state: a checkpoint may come from anyone, and training reads it much later."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from worldmodel.data.chunks import Arrays
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.runs.template import check_like


def check_replay(
    saved: Mapping[str, Any],
    observation_spec: ObservationSpec,
    action_spec: ActionSpec,
    window: int,
    num_envs: int,
    empty_state: Arrays,
) -> None:
    """Raises ValueError, TypeError or KeyError if ``saved`` is not what ``Replay.state_dict`` makes of these specs."""
    check_like(saved, {"epochs": 0, "added": 0, "writer": {"next_id": 0}}, "replay")
    sequences, writer, ids = saved["sequences"], saved["writer"], saved["chunk_ids"]
    inside = {}
    for chunk_id in ids:
        arrays = sequences[chunk_id]
        length = _check_steps(chunk_id, arrays, observation_spec, action_spec, window, least=1)
        flags = {name: _array(arrays, name, (1,), kind).item() for name, kind in _FLAGS.items()}
        if not (0 <= flags["burn_in"] < length and flags["version"] >= 0):
            raise ValueError(f"sequence {chunk_id} has burn_in {flags['burn_in']} and version {flags['version']}")
        inside[chunk_id] = flags["inside"]
        if flags["inside"]:
            _check_state({name: arrays[f"state.{name}"][0] for name in empty_state}, empty_state)
    if len(inside) != len(ids):
        raise ValueError("a sequence is named twice")
    whole, later = (set(found) for found in saved["remaining"])
    for chunk_id in saved["unsampled"]:
        if chunk_id not in (later if inside[chunk_id] else whole):
            raise ValueError(f"sequence {chunk_id} would never be sampled")
    running = writer["running"]
    if not len(running) == len(writer["state"]) == len(writer["later"]) == num_envs:
        raise ValueError(f"it has {len(running)} running episodes, expected {num_envs}")
    for fields in running:
        if fields is not None:
            check_like(fields, {"id": 0, "episode_step": 0, "burn_in": 0}, "replay.writer.running")
            length = _check_steps(fields["id"], sequences[fields["id"]], observation_spec, action_spec, window, least=0)
            if not fields["burn_in"] <= length <= fields["episode_step"]:
                raise ValueError(f"running sequence {fields['id']} has other counts than its {length} steps")
    stored = [pair for pair in writer["state"] if pair is not None]
    for step, *pair in itertools.chain.from_iterable(writer["later"]):
        if step is not None:
            check_like(step, 0, "the step of a memory state")
        stored.append(pair)
    for state, version in stored:
        _check_state(state, empty_state)
        check_like(version, 0, "the version of a memory state")
    if writer["next_id"] <= max(sequences, default=-1):
        raise ValueError("the next number of a sequence is one of those that are there")


_FLAGS = {"terminated": "b", "inside": "b", "burn_in": "i", "version": "i"}


def _check_steps(
    name: int, arrays: Arrays, observation_spec: ObservationSpec, action_spec: ActionSpec, window: int, least: int
) -> int:
    """Number of transitions of a sequence."""
    length = len(arrays["elapsed"]) - 1
    if not least <= length < window:
        raise ValueError(f"sequence {name} has {length} transitions, expected {least} to {window - 1}")
    caller, prefix = f"sequence {name}", "observations."
    observations = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    observation_spec.check(observations, length + 1, caller)
    numbers = {"elapsed": length + 1}
    if length:  # else there are no rows of what belongs to a transition
        action_spec.check(arrays["actions"], length, caller)
        _array(arrays, "reward_mask", (length,), "b")
        numbers["rewards"] = length
    for key, steps in numbers.items():
        if not np.isfinite(_array(arrays, key, (steps,), "f")).all():
            raise ValueError(f"{caller}: {key} has NaN or infinity")
    return length


def _check_state(state: Mapping[str, Any], empty_state: Arrays) -> None:
    check_like(state, dict(empty_state), "a memory state")


def _array(arrays: Mapping[str, Any], name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    found = arrays[name]
    if not (isinstance(found, np.ndarray) and found.shape == shape and found.dtype.kind == kind):
        described = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise ValueError(f"{name} is {described}, expected {shape} of kind {kind!r}")
    return found
