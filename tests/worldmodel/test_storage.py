"""Data loads unchanged or not at all."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worldmodel.runs import storage
from worldmodel.runs.run import Run, RunError
from worldmodel.runs.sequences import Sequences

plain = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(max_size=5)
shapes = st.lists(st.integers(0, 3), max_size=3)
arrays = st.builds(
    lambda shape, dtype: (np.arange(math.prod(shape)) % 2).reshape(shape).astype(dtype),
    shapes,
    st.sampled_from(["bool", "uint8", "int64", "float32", "float64"]),
)
tensors = st.builds(
    lambda array, dtype: torch.from_numpy(array).to(dtype), arrays, st.sampled_from([torch.bfloat16, torch.int32])
)
nested = st.recursive(
    plain | arrays | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape) and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@given(state=nested)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_nested_state_comes_back_as_it_was(tmp_path: Path, state: Any) -> None:
    storage.save(tmp_path / "state.safetensors", state)
    assert equal(storage.load(tmp_path / "state.safetensors"), state)


def test_arrays_without_elements_come_back_as_they_were(tmp_path: Path) -> None:
    state = {"none": np.array([]), "rows": np.zeros((0, 3), np.float32), "tensor": torch.zeros(2, 0)}
    storage.save(tmp_path / "state.safetensors", state)
    assert equal(storage.load(tmp_path / "state.safetensors"), state)


def test_an_optimiser_comes_back_as_it_was(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), betas=(0.8, 0.9))
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    storage.save(tmp_path / "optimizer.safetensors", optimizer.state_dict())
    assert equal(storage.load(tmp_path / "optimizer.safetensors"), optimizer.state_dict())


def test_what_is_no_state_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.inner\.1 is a object"):
        storage.save(tmp_path / "state.safetensors", {"inner": [1, object()]})
    assert not list(tmp_path.glob("*.safetensors"))


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_a_damaged_file_is_told_from_a_whole_one(tmp_path: Path, data: st.DataObject) -> None:
    path, state = tmp_path / "state.safetensors", {"weights": torch.arange(20.0), "updates": 7, "name": "a"}
    storage.save(path, state)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut short"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        content[data.draw(st.integers(0, len(content) - 1), "place")] ^= 1 << data.draw(st.integers(0, 7), "bit")
    path.write_bytes(content)
    try:
        found = storage.load(path)
    except storage.DamagedFile as error:
        assert str(path) in str(error) and "damaged" in str(error)
    else:
        assert equal(found, state)  # the change hit padding


def rewritten(path: Path, **changes: str) -> None:
    """Rewrites the metadata with a valid checksum."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = {**file.metadata(), **changes}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["checksum"] = storage._checksum(tensors, metadata)
    safetensors.torch.save_file(tensors, str(path), metadata)


def test_a_file_says_its_version_and_describes_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "replay.safetensors"
    rewards = {5: np.ones(3, np.float32), 2: np.zeros(1, np.float32)}
    sequences = Sequences(list(rewards), [2], lambda chunk: {"rewards": rewards[chunk]})
    storage.save(path, {"sequences": sequences, "epochs": 2})
    with safetensors.safe_open(str(path), framework="np") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("wmkernels-state", "4")
    schema = json.loads(metadata["schema"])
    assert schema["part"] == "replay"
    assert schema["tensors"]["replay.sequences.packs.0.rewards.rows"] == {
        "dtype": "float32",
        "shape": [4],
        "meaning": "rewards of sequence chunks in the environment's units, (sum of transitions,)",
    }
    assert storage.load_versioned(path)[1] == 4


def test_a_file_of_a_later_release_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    path = run.save(1, {"a": {"x": torch.zeros(2)}}) / "a.safetensors"
    rewritten(path, version="5")
    words = "has version 5 of the state format, this release reads versions up to 4: a later release wrote it"
    with pytest.raises(storage.NewerFile, match=words):
        storage.load(path)
    with pytest.raises(RunError, match=words):
        run.load("a")
    rewritten(path, version="4", schema=json.dumps({"part": "a", "tensors": {}}))
    with pytest.raises(storage.DamagedFile, match="its schema is not that of its tensors"):
        storage.load(path)
    rewritten(path, version="two")
    with pytest.raises(storage.DamagedFile, match="damaged"):
        storage.load(path)


def new_run(folder: Path) -> Run:
    return Run.create(folder / "run", {"train": {}})


class Killed(BaseException):
    """Simulates a kill."""


@pytest.mark.parametrize("call", ["mkdir", "rename", "replace"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_kill_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, count: int
) -> None:
    run = new_run(tmp_path)
    run.save(10, {"a": {"x": torch.zeros(2)}, "b": 1})
    real, calls = getattr(Path, call), []

    def dying(self: Path, *arguments: Any, **options: Any) -> Any:
        calls.append(self)
        if len(calls) == count:
            raise Killed
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, dying)
        try:
            run.save(20, {"a": {"x": torch.ones(2)}, "b": 2})
        except Killed:
            expected = 1
        else:
            expected = 2  # fewer calls are needed
    again = Run(run.folder)
    assert again.load("b") == expected and again.load("a")["x"].sum() == 2 * (expected - 1)
    # Partial files do not block later saves.
    again.save(30, {"a": {"x": torch.ones(2)}, "b": 3})
    assert Run(run.folder).load("b") == 3
    assert [path.name for path in (run.folder / "checkpoints").iterdir() if "partial" in path.name] == []


def test_two_checkpoints_are_kept_and_a_damaged_one_names_the_other(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for steps in (10, 20, 30):
        run.save(steps, {"a": steps})
    assert [path.name for path in run.checkpoints] == ["000000000020", "000000000030"]
    damaged = run.checkpoints[-1] / "a.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"000000000030.a.safetensors is damaged: .*000000000020, the checkpoint before"):
        run.load("a")
    damaged.unlink()
    with pytest.raises(RunError, match="is missing"):
        run.load("a")


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not the folder of a run"):
        Run(tmp_path)
    run = new_run(tmp_path)
    with pytest.raises(RunError, match="no checkpoint yet"):
        run.load("a")
    with pytest.raises(RunError, match="exists and is not empty"):
        new_run(tmp_path)
    (run.folder / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json is damaged"):
        Run(run.folder)
    (run.folder / "config.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(RunError, match="has format 99, this release reads formats 1 to 2"):
        Run(run.folder)


def test_metrics_survive_a_line_that_was_cut_short_and_forget_what_is_done_again(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for steps in (1, 2, 3):
        run.log({"steps": steps, "loss/model": steps / 2})
    run.close()
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"steps": 4, "lo')
    assert [line["steps"] for line in run.metrics] == [1, 2, 3]
    run.forget_metrics_after(2)
    assert [line["loss/model"] for line in run.metrics] == [0.5, 1.0]
    assert list((run.folder / "tensorboard").iterdir())


def test_weights_of_another_configuration_are_refused_by_name(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.save(1, {"world_model": torch.nn.Linear(3, 2).state_dict()})
    with pytest.raises(RunError, match=r"another configuration: weight has shape \(2, 3\), expected \(2, 4\)"):
        run.load_weights(torch.nn.Linear(4, 2))
    with pytest.raises(RunError, match="bias is not known here"):
        run.load_weights(torch.nn.Linear(3, 2, bias=False))
