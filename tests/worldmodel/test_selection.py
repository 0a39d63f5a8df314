"""Training from recorded data alone: chosen episodes of several files, actions of several steps, and bad data."""

import json
import zipfile

import numpy as np
import pytest
from gymnasium import spaces

from worldmodel.__main__ import main
from worldmodel.acting.recording import record
from worldmodel.commands.options import train_options
from worldmodel.data.datasets import EpisodeWriter, RecordedSource
from worldmodel.data.selection import SelectedEpisodes, held_out_split, open_episodes, repeated
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import RunError
from worldmodel.runs.run import Run

LENGTHS = [7, 10, 6, 9, 8, 11]  # steps of episodes, the first three in one file
SPECS = ObservationSpec.from_space(spaces.Box(-9, 9, (2,))), ActionSpec.from_space(spaces.Box(-2, 2, (1,)))


def write(path, lengths, first=0):
    """Observations are (episode, step), actions a hundredth of the step, elapsed times a tenth of it."""
    with EpisodeWriter(path, *SPECS) as writer:
        for episode, length in enumerate(lengths, first):
            for step in range(length):
                ends = step == length - 1
                done = {} if ends else {"actions": [0.01 * step], "rewards": step, "terminated": step == length - 2}
                seen = {"observation": np.array([episode + 0.1 * step, 0.1 * step])}
                writer.step(seen, is_first=not step, is_last=ends, elapsed=0.1 * step, **done)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walks")
    write(folder / "a.npz", LENGTHS[:3])
    write(folder / "b.npz", LENGTHS[3:], 3)
    return folder


@pytest.mark.parametrize("k", [1, 3])
def test_rows_are_those_of_the_chosen_episodes(folder, k):
    chosen = np.array([1, 2, 4, 5])
    found = SelectedEpisodes(open_episodes(folder), chosen, k)
    steps = [(LENGTHS[episode] - 1) // k + 1 for episode in chosen]
    assert (found.steps, found.episodes) == (sum(steps), 4)
    assert found.episode_starts.tolist() == np.cumsum([0, *steps[:-1]]).tolist()
    whole = [(episode, step) for episode, count in zip(chosen, steps, strict=True) for step in range(count)]
    window = 5
    starts = np.arange(found.steps - window + 1)
    rows = found.rows(starts, window)
    assert rows["actions"].shape == (len(starts), window, k) and found.action_spec == repeated(SPECS[1], k)
    for start in starts:
        for at, (episode, step) in enumerate(whole[start : start + window]):
            row = {name: array[start, at] for name, array in rows.items()}
            last = (step + 1) * k > LENGTHS[episode] - 1
            taken = np.zeros(k) if last else np.arange(step * k, step * k + k)
            assert row["observations/observation"] == pytest.approx([episode + 0.1 * step * k, 0.1 * step * k])
            assert row["actions"] == pytest.approx(0.01 * taken) and row["rewards"] == taken.sum()
            assert (row["is_first"], row["is_last"]) == (step == 0, last)
            assert row["terminated"] == (not last and taken[-1] == LENGTHS[episode] - 2)
            if step:
                assert row["elapsed"] == pytest.approx(
                    0.1 * np.mean(np.arange(step * k - k + 1, step * k + 1)), rel=1e-5
                )
    batch, _ = RecordedSource(found, batch_size=3, window=window).sample()
    assert batch.actions.shape == (3, window, k)


def test_every_step_is_seen_where_an_episode_counts_once_per_phase(folder):
    files, chosen, k = open_episodes(folder), np.array([0, 4]), 3
    found = SelectedEpisodes(files, chosen, k, phases=k)
    starts = [(episode, phase) for episode in chosen for phase in range(k) if LENGTHS[episode] - phase > k]
    assert found.episodes == len(starts) == 6
    for (episode, phase), at in zip(starts, found.episode_starts, strict=True):
        count = (LENGTHS[episode] - 1 - phase) // k + 1
        rows = {name: array[0] for name, array in found.rows(np.array([at]), count).items()}
        steps = phase + k * np.arange(count)
        assert rows["observations/observation"][:, 1] == pytest.approx(0.1 * steps)
        assert rows["actions"][:-1] == pytest.approx(0.01 * (steps[:-1, None] + np.arange(k)))
        assert rows["is_first"].tolist() == [True] + [False] * (count - 1) and rows["is_last"][-1]
    short = SelectedEpisodes(files, np.array([2]), 5, phases=5)  # of 6 steps: one action of five
    assert (short.episodes, short.steps) == (1, 2)


def test_actions_of_several_steps_are_those_of_the_environment_one_after_another():
    spec = repeated(ActionSpec.from_space(spaces.Box(np.array([-2, 0]), np.array([2, 1]))), 2)
    assert np.allclose(spec.to_env(np.array([[0.5, 1, -1, 0]], np.float32)), [[[1, 1], [-2, 0.5]]])
    spec = repeated(ActionSpec.from_space(spaces.Discrete(3, start=1)), 2)
    assert spec.to_env(np.array([0, 2])).tolist() == [1, 3] and spec.width == 6
    with pytest.raises(ConfigurationError, match="actions are a Tuple or Dict, expected action_steps 1"):
        repeated(ActionSpec.from_space(spaces.Tuple([spaces.Discrete(2)])), 2)


def test_columns_are_of_layouts_that_have_them(folder):
    with pytest.raises(ConfigurationError, match=r"data_columns is place, which chooses .*, and .*a.npz is neither"):
        open_episodes(folder / "a.npz", ["place"])


def test_held_out_episodes_are_no_others():
    learned, held_out = held_out_split(10, 0.25, seed=3)
    assert sorted([*learned, *held_out]) == list(range(10)) and len(held_out) == 2
    assert len(held_out_split(10, 0.0, 0)[1]) == 0 and len(held_out_split(10, 0.01, 0)[1]) == 1
    assert not np.array_equal(held_out, held_out_split(10, 0.25, seed=4)[1])
    with pytest.raises(ConfigurationError, match=r"held_out is 0\.9 of 2 episodes, expected one at least"):
        held_out_split(2, 0.9, 0)


def changed(path, made, **arrays):
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(made, "w") as out:
        for name in archive.namelist():
            with archive.open(name) as file:
                array = np.lib.format.read_array(file)
            index, value = arrays.get(name.removesuffix(".npy"), (None, None))
            if index is not None:
                array[index] = value
            with out.open(name, "w") as file:
                np.lib.format.write_array(file, array)


def test_bad_data_is_told_with_file_episode_and_step(folder, tmp_path):
    for arrays, said in (
        ({"actions": ((9, 0), np.nan)}, r"episode 1, step 2: .*expected numbers in \[-1, 1\]"),
        ({"actions": ((9, 0), 1.5)}, r"episode 1, step 2: .*values from 1.5 to 1.5, expected numbers in \[-1, 1\]"),
        ({"rewards": (18, np.inf)}, r"episode 2, step 1: rewards holds NaN or infinity"),
        ({"is_last": (17, True)}, r"episode 2, step 0: is_first and is_last do not fit"),
    ):
        changed(folder / "a.npz", tmp_path / "bad.npz", **arrays)
        with pytest.raises(RunError, match=rf"bad\.npz: {said}"):
            open_episodes(tmp_path / "bad.npz")
    changed(folder / "a.npz", tmp_path / "bad.npz", **{"observations/observation": ((8, 1), np.nan)})
    found = SelectedEpisodes(open_episodes(tmp_path / "bad.npz"), None, 2, phases=2)
    with pytest.raises(RunError, match=r"bad\.npz: episode 1, step 1: .*NaN"):
        found.rows(np.arange(found.steps - 2), 3)
    with pytest.raises(RunError, match=r"a\.npz: episode 2, step 0: the episode has 6 steps, expected 7 at least"):
        SelectedEpisodes(open_episodes(folder), None, 6)
    other = ObservationSpec.from_space(spaces.Box(-9, 9, (3,)))
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "a.npz", [4])
    with EpisodeWriter(tmp_path / "mixed" / "b.npz", other, SPECS[1]) as writer:
        writer.step({"observation": np.zeros(3)}, is_first=True)
        writer.step({"observation": np.zeros(3)}, is_last=True)
    with pytest.raises(RunError, match=r"b\.npz has other spaces than .*a\.npz: .*shape"):
        open_episodes(tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty has no \.npz, expected recorded episodes"):
        open_episodes(tmp_path / "empty")


OPTIONS = [
    *("--latent", "embedding", "--memory", "none", "--model.perception.hidden", "8", "--model.memory.width", "8"),
    *("--model.prediction.hidden", "8", "--model.evaluation.hidden", "8", "--model.decision.hidden", "8"),
    *(
        "--model.perception.latent.size",
        "4",
        "--replay.batch-size",
        "2",
        "--replay.window",
        "4",
        "--replay.burn-in",
        "0",
    ),
    *("--action-steps", "2"),
    *("--held-out", "0.34", "--threads", "1", "--learner.objective.horizon", "1"),
]


def test_train_learns_from_data_evaluates_on_others_and_resumes(folder, tmp_path, capsys):
    def trained(name, *more):
        assert main(["train", "--data", str(folder), "--run", str(tmp_path / name), *OPTIONS, *more]) == 0
        return Run(tmp_path / name)

    whole = trained("whole", "--updates", "6")
    trained("cut", "--updates", "3")
    assert main(["train", "--resume", str(tmp_path / "cut"), "--updates", "6"]) == 0
    weights = [run.load_tensors("world_model") for run in (whole, Run(tmp_path / "cut"))]
    assert all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())
    last = whole.metrics[-1]
    assert last["updates"] == 6 and last["held_out/loss/dynamics"] > 0 and last["held_out/latent/rank"] >= 1
    assert json.loads(json.dumps(whole.config))["train"]["data"] == str(folder)
    capsys.readouterr()
    for arguments, said in (
        (["--data", str(folder)], "--minutes or --updates is missing"),
        (["--data", str(folder), "--updates", "1", "--image-size", "16"], "--image-size is of environments"),
        (["--data", str(folder), "--updates", "1", "--kinds", "observation=vector"], "--kinds is of environments"),
        (["--data", str(tmp_path / "none.npz"), "--updates", "1"], "none.npz cannot be read"),
        (["--data", str(folder), "--updates", "1", "--held-out", "1"], "held_out is 1 of 6 episodes"),
    ):
        assert main(["train", *arguments, "--run", str(tmp_path / "no")]) == 1
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "no").exists()
    assert main(["evaluate", str(tmp_path / "whole")]) == 1
    assert "learned from recorded episodes: --env names an environment" in capsys.readouterr().err
    start = ["--init-from", str(tmp_path / "whole"), "--env", "worldmodel_environments:Echo"]
    assert train_options(start)[0].data is None and train_options(start[:2])[0].data == folder


def test_a_run_of_recorded_episodes_evaluates_its_policy_where_it_is_told(tmp_path, capsys):
    echo, path = "worldmodel_environments:Echo", tmp_path / "echo.npz"
    record(echo, path, 200)

    def trained(name, *more):
        given = ["--data", str(path), "--updates", "3", "--run", str(tmp_path / name), *OPTIONS, *more]
        return main(["train", *given, "--eval-minutes", "1e-6", "--eval-episodes", "2"])

    assert trained("never", "--action-steps", "1") == 0
    assert trained("run", "--action-steps", "1", "--eval-env", echo) == 0
    evaluated = [0 <= row["eval/return"] <= 10 for row in Run(tmp_path / "run").metrics if "eval/return" in row]
    assert evaluated and all(evaluated) and (tmp_path / "run" / "best").exists()
    assert not any("eval/return" in row for row in Run(tmp_path / "never").metrics)
    assert main(["evaluate", str(tmp_path / "run"), "--best", "--env", echo, "--episodes", "2"]) == 0
    capsys.readouterr()
    assert trained("no", "--eval-env", echo) == 1
    assert f"eval_env {echo} is not what training sees: action" in capsys.readouterr().err
