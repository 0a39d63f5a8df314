"""Minari data sets: rows are those that were written, and what is wrong is told with its place."""

import json

import numpy as np
import pytest
from gymnasium import spaces

from worldmodel.data.datasets import RecordedSource
from worldmodel.data.minari_episodes import MinariEpisodes
from worldmodel.data.selection import open_episodes
from worldmodel.runs.files import RunError

h5py = pytest.importorskip("h5py")
serialization = pytest.importorskip("minari.serialization")

ACTIONS = [3, 5, 2]
PLACES = spaces.Dict(place=spaces.Box(-9, 9, (2,)), eye=spaces.Box(0, 255, (20, 20, 3), np.uint8))


def write(folder, action_space, actions, about=(), drop=(), places=None):
    (folder / "data").mkdir(parents=True)
    random, written = np.random.default_rng(0), []
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for episode, count in enumerate(ACTIONS):
            group = file.create_group(f"episode_{episode}")
            seen = {
                "place": random.uniform(-9, 9, (count + 1, 2)).astype(np.float32)
                if places is None
                else places[episode],
                "eye": random.integers(0, 256, (count + 1, 20, 20, 3), np.uint8),
            }
            for name, array in seen.items():
                group.create_dataset(f"observations/{name}", data=array)
            ended = np.arange(count) == count - 1
            columns = {
                "actions": actions[episode],
                "rewards": np.arange(count, dtype=np.float64) + episode,
                "terminations": ended & (episode != 1),
                "truncations": ended & (episode == 1),
            }
            for name, array in columns.items():
                if name not in drop:
                    group.create_dataset(name, data=array)
            written.append({**seen, **columns})
    told = {
        "data_format": "hdf5",
        "total_episodes": len(ACTIONS),
        "observation_space": serialization.serialize_space(PLACES),
        "action_space": serialization.serialize_space(action_space),
    }
    (folder / "data" / "metadata.json").write_text(json.dumps({**told, **dict(about)}))
    return written


def moves(width=2):
    random = np.random.default_rng(1)
    return [random.uniform(-2, 3, (count, width)).astype(np.float32) for count in ACTIONS]


@pytest.mark.parametrize("bounded", [True, False])
def test_rows_are_those_that_were_written(tmp_path, bounded):
    space = spaces.Box(-4, 4, (2,)) if bounded else spaces.Box(-np.inf, np.inf, (2,))
    written = write(tmp_path / "set", space, moves())
    (file,) = open_episodes(tmp_path / "set")
    assert isinstance(file, MinariEpisodes) and (file.steps, file.episodes) == (13, 3)
    assert bounded == (file.action_spec.high == (4.0, 4.0))
    rows = {name: array[0] for name, array in file.rows(np.array([0]), 13).items()}
    for name in ("place", "eye"):
        expected = np.concatenate([episode[name] for episode in written])
        assert np.array_equal(rows[f"observations/{name}"], expected)
        assert np.array_equal(file.rows(np.array([3]), 7, 3)[f"observations/{name}"][0], expected[3:10:3])
    acts = ~rows["is_last"]
    assert np.flatnonzero(rows["is_last"]).tolist() == [3, 9, 12]
    assert np.flatnonzero(rows["is_first"]).tolist() == [0, 4, 10]
    assert np.allclose(file.action_spec.to_env(rows["actions"][acts]), np.concatenate(moves()), atol=1e-5)
    assert rows["rewards"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 2, 3, 0]
    assert np.flatnonzero(rows["terminated"]).tolist() == [2, 11], "a limit is no end"
    batch, _ = RecordedSource(file, batch_size=2, window=4).sample()
    assert batch.actions.shape == (2, 4, 2)


def test_discrete_actions_are_their_classes(tmp_path):
    chosen = [np.arange(count) % 3 + 1 for count in ACTIONS]
    write(tmp_path / "set", spaces.Discrete(3, start=1), chosen)
    (file,) = open_episodes(tmp_path / "set" / "data")
    assert file.rows(np.array([4]), 6)["actions"][0].tolist() == [0, 1, 2, 0, 1, 0]


def test_what_is_wrong_is_told_with_file_episode_and_step(tmp_path):
    box, wrong = spaces.Box(-4, 4, (2,)), moves()
    wrong[1][2, 0] = 7
    write(tmp_path / "a", box, wrong)
    with pytest.raises(RunError, match=r"main_data\.hdf5: episode 1, step 2: "):
        open_episodes(tmp_path / "a")[0].rows(np.array([4]), 6)
    wrong[1][2, 0] = np.nan
    write(tmp_path / "b", spaces.Box(-np.inf, np.inf, (2,)), wrong)
    with pytest.raises(RunError, match="episode 1, step 2: the action is missing or infinite"):
        open_episodes(tmp_path / "b")
    places = [np.zeros((count + 1, 2), np.float32) for count in ACTIONS]
    places[2][1, 1] = np.nan
    write(tmp_path / "c", box, moves(), places=places)
    with pytest.raises(RunError, match=r"episode 2, step 1: .*NaN"):
        open_episodes(tmp_path / "c")[0].rows(np.array([8]), 5)
    write(tmp_path / "d", box, moves(), drop=["rewards"])
    with pytest.raises(RunError, match="episode 0: no rewards for 3 actions"):
        open_episodes(tmp_path / "d")
    write(tmp_path / "e", box, moves(), {"data_format": "arrow"})
    with pytest.raises(RunError, match="e/data: its data_format is arrow, expected 'hdf5'"):
        open_episodes(tmp_path / "e")
    write(tmp_path / "f", box, moves(), {"total_episodes": 9})
    with pytest.raises(RunError, match=r"main_data\.hdf5 is no data set of Minari, or damaged"):
        open_episodes(tmp_path / "f")
