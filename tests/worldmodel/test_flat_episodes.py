"""Flat columns of episodes: read a part at a time, and told where they are wrong."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldmodel.data.datasets import RecordedSource
from worldmodel.data.flat_episodes import FlatEpisodes
from worldmodel.data.selection import SelectedEpisodes
from worldmodel.runs.files import RunError
from worldmodel.runs.optional_dependencies import MissingPackage

PATH = Path("walks.h5")
LENGTHS = [4, 6, 3]


def columns(**changed):
    random, rows = np.random.default_rng(0), sum(LENGTHS)
    ends = np.cumsum(LENGTHS)
    action = random.uniform([-3, 0], [5, 1], (rows, 2)).astype(np.float32)
    action[ends - 1] = np.nan
    found = {
        "ep_len": np.array(LENGTHS),
        "ep_offset": ends - LENGTHS,
        "action": action,
        "pixels": random.integers(0, 256, (rows, 20, 20, 3), dtype=np.uint8),
        "proprio": random.normal(size=(rows, 4)),
    }
    return found | changed


class Spied:
    """An array that notes how many rows were read at once."""

    def __init__(self, array, read):
        self.array, self.read, self.shape, self.dtype = array, read, array.shape, array.dtype

    def __getitem__(self, index):
        found = self.array[index]
        self.read.append(len(found))
        return found


def test_rows_are_those_of_the_columns_and_read_a_part_at_a_time():
    made, read = columns(), []
    spied = {name: Spied(array, read) if name in ("pixels", "proprio") else array for name, array in made.items()}
    file = FlatEpisodes(PATH, spied, ["pixels", "proprio"])
    assert (file.steps, file.episodes, read) == (13, 3, [])
    rows = file.rows(np.array([2, 8]), 5)
    assert max(read) == 5
    for row, start in enumerate((2, 8)):
        assert np.array_equal(rows["observations/pixels"][row], made["pixels"][start : start + 5])
        assert np.allclose(rows["observations/proprio"][row], made["proprio"][start : start + 5])
        taken = file.action_spec.to_env(rows["actions"][row])
        last = np.isnan(made["action"][start : start + 5, 0])
        assert np.allclose(taken[~last], made["action"][start : start + 5][~last], atol=1e-5)
        assert np.array_equal(rows["is_last"][row], last) and not rows["actions"][row][last].any()
    assert np.flatnonzero(file.rows(np.array([0]), 13)["is_first"][0]).tolist() == [0, 4, 10]
    assert [file.place(step) for step in (0, 9, 10)] == ["episode 0, step 0", "episode 1, step 5", "episode 2, step 0"]


def test_a_source_makes_batches_of_them():
    batch, _ = RecordedSource(FlatEpisodes(PATH, columns()), batch_size=2, window=6).sample()
    assert batch.shape == (2, 6) and batch.observations["pixels"].dtype == torch.uint8
    assert batch.actions.abs().max() <= 1 and batch.is_first[:, 0].all()


def test_chosen_episodes_have_actions_of_several_steps():
    made = columns()
    found = SelectedEpisodes([FlatEpisodes(PATH, made, ["proprio"])], np.array([0, 2]), action_steps=2)
    assert (found.steps, found.episodes) == (4, 2)
    rows = {name: array[0] for name, array in found.rows(np.array([0]), 4).items()}
    assert np.allclose(rows["observations/proprio"], made["proprio"][[0, 2, 10, 12]])
    assert rows["is_last"].tolist() == [False, True, False, True] and not rows["actions"][[1, 3]].any()
    for step, first in ((0, 0), (2, 10)):
        assert np.allclose(
            found.action_spec.to_env(rows["actions"][step]), made["action"][first : first + 2], atol=1e-5
        )


def test_what_is_wrong_is_told_with_its_episode_and_step():
    def changed(name, index, value):
        made = columns()
        made[name][index] = value
        return made

    without = columns()
    del without["ep_len"]
    for wrong, said in (
        (without, "has no column ep_len"),
        (changed("action", (6, 1), np.nan), "episode 1, step 2: the action is missing or infinite"),
        (changed("action", (12, 0), np.inf), None),  # of a last step, which is not read
        (columns(ep_len=np.array([4, 8, 1])), r"episode 2: it has 1 steps, expected two at least"),
        (columns(ep_offset=np.array([0, 5, 10])), "episode 1: it begins at row 5, expected 4"),
        (columns(ep_len=np.array([4.0, 6.0, 3.0])), "ep_len is float64 and ep_offset int64, expected whole numbers"),
        (
            columns(pixels=np.zeros((12, 20, 20, 3), np.uint8)),
            r"pixels is uint8 \(12, 20, 20, 3\), expected numbers of 13",
        ),
        (columns(action=np.zeros(13)), r"action is float64 \(13,\), expected numbers of 13 rows, \(rows, width\)"),
        (columns(pixels=np.array([None] * 13)), r"pixels is object \(13,\), expected numbers"),
    ):
        if said is None:
            FlatEpisodes(PATH, wrong)
            continue
        with pytest.raises(RunError, match=rf"walks\.h5.*{said}"):
            FlatEpisodes(PATH, wrong)
    file = FlatEpisodes(PATH, changed("proprio", (11, 2), np.nan), ["proprio"])
    with pytest.raises(RunError, match=r"walks\.h5: episode 2, step 1: .*NaN"):
        file.rows(np.array([0, 8]), 5)


def test_without_h5py_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingPackage, match="the package 'h5py' is needed to read HDF5 and is not installed: pip"):
        FlatEpisodes.open(PATH)


@pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="h5py is not installed")
def test_an_hdf5_file_is_read(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, array in columns().items():
            file.create_dataset(name, data=array)
    read, made = FlatEpisodes.open(tmp_path / "a.h5"), FlatEpisodes(PATH, columns())
    for name, array in read.rows(np.array([2, 8]), 5).items():
        assert np.array_equal(array, made.rows(np.array([2, 8]), 5)[name])
    (tmp_path / "b.h5").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"b\.h5 cannot be read as HDF5"):
        FlatEpisodes.open(tmp_path / "b.h5")
