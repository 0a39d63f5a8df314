"""The two partially observed environments and their measures."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from minigrid.wrappers import ImgObsWrapper, ViewSizeWrapper

from worldmodel.commands.options import train_options
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments import hidden_ball, minigrid, registry
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import Trainer
from worldmodel.model.world_model import WorldModel, WorldModelConfig
from worldmodel.runs.configuration import ConfigurationError

CUE = "worldmodel/MemoryS9-v0"
BALL = "worldmodel/HiddenBall-v0"
PIXELS = "worldmodel/HiddenBallPixels-v0"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("cue", "inputs", "moving", "memory_runs", "memory_report", "memory_chart")
    return {name: importlib.import_module(f"world.{name}") for name in names}


def play(env: Any, actions: np.ndarray, seed: int) -> list[Any]:
    played = [env.reset(seed=seed)[0]]
    for action in actions:
        view, reward, terminated, truncated, _ = env.step(int(action))
        played.append((view, reward, terminated, truncated))
        if terminated or truncated:
            break
    return played


def assert_played_alike(one: list[Any], two: list[Any]) -> None:
    assert len(one) == len(two)
    np.testing.assert_array_equal(one[0], two[0])
    for (view, *rest), (other, *other_rest) in zip(one[1:], two[1:], strict=True):
        np.testing.assert_array_equal(view, other)
        assert rest == other_rest


def random_model(name: str) -> WorldModel:
    env = registry.make(name)
    torch.manual_seed(0)
    seen, done = ObservationSpec.from_space(env.observation_space), ActionSpec.from_space(env.action_space)
    return WorldModel(seen, done, WorldModelConfig())


def test_the_small_view_is_the_one_that_minigrids_own_wrappers_give() -> None:
    import gymnasium

    walking = registry.make(CUE)
    wrapped = ImgObsWrapper(ViewSizeWrapper(gymnasium.make("MiniGrid-MemoryS9-v0"), agent_view_size=3))
    assert walking.observation_space == wrapped.observation_space
    actions = np.random.default_rng(0).integers(3, size=60)
    for seed in range(5):
        assert_played_alike(play(walking, actions, seed), play(wrapped, actions, seed))


@pytest.mark.parametrize("size", (7, 9, 11, 13, 17))
def test_every_size_of_the_memory_task_goes_by_its_name(size: int) -> None:
    env = registry.make(f"worldmodel.environments.minigrid:MemoryS{size}-v0")
    assert env.unwrapped.width == size
    assert env.observation_space.shape == (3, 3, 3) and env.action_space.n == len(minigrid.ACTIONS)


def test_without_minigrid_the_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "worldmodel.environments.minigrid")
    monkeypatch.setitem(sys.modules, "minigrid", None)
    monkeypatch.delitem(sys.modules, "minigrid.envs")
    with pytest.raises(registry.UnknownEnvironment, match=r"'minigrid' is needed to .* pip install minigrid"):
        registry.resolve(CUE)


def test_where_the_cue_is_shown_the_view_holds_it(measures: dict[str, ModuleType]) -> None:
    """A key and a ball in the far rooms are distinguished from the cue by position."""
    trajectories = measures["cue"].random_trajectories(CUE, 20, seed=0)
    assert {trajectory.kind for trajectory in trajectories} == {minigrid.KEY, minigrid.BALL}
    shown = 0
    for trajectory in trajectories:
        assert len(trajectory.views) == len(trajectory.actions) + 1 == len(trajectory.cells)
        for view, cell in zip(trajectory.views, trajectory.cells, strict=True):
            assert cell is None or view[(*cell, 0)] == trajectory.kind
            shown += cell is not None
    assert shown > 500


def test_the_cue_reappears_only_after_it_was_out_of_view(measures: dict[str, ModuleType]) -> None:
    trajectory = measures["cue"].Trajectory(
        np.zeros((9, 3, 3, 3)), np.zeros(8), np.zeros(8), True, minigrid.KEY, [None, *[(0, 0)] * 2, *[None] * 3]
    )
    trajectory.cells += [(1, 1), None, (2, 2)]
    assert trajectory.reappearances() == [(6, 4), (8, 2)]


def knowing(trajectory: Any) -> np.ndarray:
    return np.moveaxis(np.eye(16)[trajectory.views[1:, ..., 0]], -1, 1)


def mistaken(trajectory: Any) -> np.ndarray:
    """Key and ball swapped."""
    swapped = list(range(16))
    swapped[minigrid.KEY], swapped[minigrid.BALL] = minigrid.BALL, minigrid.KEY
    return knowing(trajectory)[:, swapped]


def guessing(trajectory: Any) -> np.ndarray:
    return np.random.default_rng(len(trajectory.actions)).random((len(trajectory.actions), 16, 3, 3))


def test_who_knows_the_cue_is_always_right_and_who_guesses_half_of_the_time(measures: dict[str, ModuleType]) -> None:
    cue = measures["cue"]
    trajectories = cue.random_trajectories(CUE, 40, seed=0)
    known, swapped, guessed = (cue.accuracy_by_gap(trajectories, judge) for judge in (knowing, mistaken, guessing))
    for name in cue.GAPS:
        assert known[name]["count"] == guessed[name]["count"] > 30
        assert known[name]["key_or_ball"] == known[name]["cell"] == 1
        assert swapped[name]["key_or_ball"] == swapped[name]["cell"] == 0
        spread = 0.5 / known[name]["count"] ** 0.5
        assert abs(guessed[name]["key_or_ball"] - 0.5) < 4 * spread
        assert guessed[name]["cell"] < 0.25
    again = np.array([gap for trajectory in trajectories for _, gap in trajectory.reappearances()])
    assert np.median(again) == 3 and (again > 1).all()
    assert sum(known[name]["count"] for name in cue.GAPS) == len(again)


def test_a_model_is_asked_about_a_view_before_it_sees_it(measures: dict[str, ModuleType]) -> None:
    """Predictions depend on earlier actions, not on later views."""
    cue = measures["cue"]
    predict = cue.of_model(random_model(CUE))
    trajectory = max(cue.random_trajectories(CUE, 3, seed=0), key=lambda trajectory: len(trajectory.actions))
    before = predict(trajectory)
    assert before.shape == (len(trajectory.actions), 16, 3, 3)
    views, actions = trajectory.views.copy(), trajectory.actions.copy()
    views[10:, 1, 1, 0] = 9
    after = predict(dataclasses.replace(trajectory, views=views))
    np.testing.assert_array_equal(before[:10], after[:10])
    assert (before[10:] != after[10:]).any()
    actions[9] = (actions[9] + 1) % 3
    after = predict(dataclasses.replace(trajectory, actions=actions))
    np.testing.assert_array_equal(before[:9], after[:9])
    assert (before[9] != after[9]).any()


def test_the_ball_goes_on_behind_the_curtain() -> None:
    env = hidden_ball.HiddenBall()
    hidden = bounced = 0
    for seed in range(20):
        env.reset(seed=seed)
        for action in np.random.default_rng(seed).integers(3, size=hidden_ball.LENGTH):
            ball, flight, curtain = env.ball.copy(), env.flight.copy(), env.curtain
            picture, reward, _, _, _ = env.step(int(action))
            assert (np.abs(env.ball - ball) == 1).all()
            turned = env.flight != flight
            assert (np.isin(ball, [0, hidden_ball.SIDE - hidden_ball.BALL]) | ~turned).all()
            assert abs(env.curtain - curtain) <= 1 and (env.curtain - curtain) * (action - hidden_ball.STAY) >= 0
            columns = np.arange(env.ball[1], env.ball[1] + hidden_ball.BALL)
            behind = (columns >= env.curtain) & (columns < env.curtain + hidden_ball.CURTAIN)
            assert (picture == hidden_ball.LEATHER).sum() == hidden_ball.BALL * (~behind).sum()
            assert reward == pytest.approx((~behind).mean())
            hidden, bounced = hidden + behind.all(), bounced + turned.any()
    assert hidden > 50 and bounced > 50


def test_an_episode_of_the_ball_is_its_seed_and_its_actions() -> None:
    actions = np.random.default_rng(0).integers(3, size=hidden_ball.LENGTH)
    one, two, other = (play(registry.make(BALL), actions, seed) for seed in (1, 1, 2))
    assert_played_alike(one, two)
    assert (one[0] != other[0]).any()
    assert len(one) == hidden_ball.LENGTH + 1 and one[-1][2:] == (False, True)


def test_a_ball_that_is_pickled_flies_on() -> None:
    import pickle

    env = hidden_ball.HiddenBall("rgb_array")
    play(env, np.array([0, 2, 1]), seed=4)
    copy = pickle.loads(pickle.dumps(env))
    for action in (0, 0, 2, 1):
        np.testing.assert_array_equal(env.step(action)[0], copy.step(action)[0])
    assert env.render().shape == (7, 7, 3) and (env.render() == copy.render()).all()


def test_pixels_are_the_shades_of_the_cells() -> None:
    actions = np.random.default_rng(0).integers(3, size=20)
    cells, images = (play(registry.make(name), actions, seed=3) for name in (BALL, PIXELS))
    pixels = 4
    assert [after for _, *after in cells[1:]] == [after for _, *after in images[1:]]
    for cell, image in [(cells[0], images[0]), *((a[0], b[0]) for a, b in zip(cells[1:], images[1:], strict=True))]:
        assert image.shape == (7 * pixels, 7 * pixels, 1)
        for row, column in np.ndindex(pixels, pixels):
            np.testing.assert_array_equal(image[row::pixels, column::pixels], hidden_ball.SHADES[cell])
    modality = ObservationSpec.from_space(registry.make(PIXELS).observation_space).modalities["observation"]
    assert modality.kind == "image"


def test_wrong_cells_are_those_of_the_ball_alone(measures: dict[str, ModuleType]) -> None:
    moving = measures["moving"]
    frames, actions = moving.random_episodes(BALL, 3, seed=0)
    assert frames.shape == (3, moving.OBSERVED + moving.AHEAD, 7, 7, 1) and len(actions[0]) == len(frames[0]) - 1
    assert moving.wrong_cells(frames, frames).tolist() == [0] * frames.shape[1]
    without = np.where(frames == hidden_ball.LEATHER, 0, frames)
    in_sight = (frames == hidden_ball.LEATHER).sum((2, 3, 4)).mean(0)
    np.testing.assert_array_equal(moving.wrong_cells(without, frames), in_sight)
    np.testing.assert_array_equal(
        moving.wrong_cells(np.where(frames == hidden_ball.CLOTH, 0, frames), frames), 0 * in_sight
    )


def test_what_is_imagined_depends_on_the_frames_observed_and_the_actions_taken_alone(
    measures: dict[str, ModuleType],
) -> None:
    moving = measures["moving"]
    frames, actions = moving.random_episodes(BALL, 4, seed=0)
    model = random_model(BALL)
    before = moving.imagined(model, frames, actions)
    assert before.shape == (4, moving.AHEAD, 7, 7, 1)
    later = frames.copy()
    later[:, moving.OBSERVED :] = 0
    np.testing.assert_array_equal(before, moving.imagined(model, later, actions))
    later[:, moving.OBSERVED - 1] = 0
    assert (before != moving.imagined(model, later, actions)).any()
    # The action at a frame affects the next frame.
    for step in (0, 5):
        others = actions.copy()
        others[:, moving.OBSERVED - 1 + step] = 2 - others[:, moving.OBSERVED - 1 + step]
        after = moving.imagined(model, frames, others)
        np.testing.assert_array_equal(before[:, :step], after[:, :step])
        assert (before[:, step:] != after[:, step:]).any()


def test_losses_are_of_what_memory_is_given(measures: dict[str, ModuleType]) -> None:
    """They agree where latents are their own means, and only there."""
    trajectories = measures["cue"].random_trajectories(CUE, 3, seed=0)
    model = random_model(CUE)
    batch = measures["inputs"].batch_of(model, trajectories)
    assert batch.valid.sum() == sum(len(one.views) for one in trajectories)
    assert float(batch.rewards.sum()) == pytest.approx(sum(one.rewards.sum() for one in trajectories))
    found = measures["inputs"].losses(model, batch)
    assert found.keys() == {"means", "samples", "modes"}
    assert len({entry["dynamics"] for entry in found.values()}) == 3
    with torch.no_grad():
        model.perception.encoder[-1].weight.mul_(1e4)  # certain: samples, modes and means are one
    alike = measures["inputs"].losses(model, batch)
    for entry in alike.values():
        assert entry["dynamics"] == pytest.approx(alike["means"]["dynamics"], rel=1e-2)


def test_runs_of_both_tasks_merge_into_tables_and_a_chart(
    measures: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("world_memory")
    target = tmp_path / "result.json"
    tiny = "--prefill 300 --train-ratio 1 --model.memory.width 16 --replay.batch-size 1 --replay.window 98"
    common = ["--seeds", "0", "--json", str(target), "--runs", str(tmp_path / "runs"), "--steps", "1000"]
    common += ["--episodes", "3", "--train", tiny]

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmarks/world_memory.py", *common, *arguments])
        assert script.main() == 0
        return capsys.readouterr().out

    said = run("--memories", "scan")
    result = json.loads(target.read_text())
    assert list(result["runs"]) == ["ball/scan/0", "cue/scan/0"]
    for entry in result["runs"].values():
        assert entry["steps"] >= 1000 and entry["updates"] > 0 and entry["cpu_seconds"] > 0
        blocks = entry["settings"]["model"]["memory"]["blocks"]
        assert [block["kind"] for block in blocks] in (["scan"], ["rotary_scan"]) and entry["settings"][
            "random_envs"
        ] == 16
        assert str(tmp_path) not in json.dumps(entry)
    assert "by what memory is given" in said and "reward loss, samples" in said
    assert "accuracy of key or ball" in said and "persistence baseline" in said and "at least 95%, aim 99%" in said
    assert target.with_suffix(".png").exists()
    monkeypatch.setattr(script, "execute", None)  # finished runs are reused
    listed = dict(reversed(line.split(maxsplit=1)) for line in run("--list").splitlines())
    assert {key for key, there in listed.items() if there == "there"} == {"ball/scan/0", "cue/scan/0"}
    assert {"ball/ConvLSTM/0", "cue/none/0", "cue/scan (latent sampled)/0"} <= listed.keys()
    with pytest.raises(SystemExit):
        run("--tasks", "maze")
    assert "there is no 'maze'" in capsys.readouterr().err


def test_the_tables_are_means_over_seeds_beside_each_of_them(measures: dict[str, ModuleType]) -> None:
    report = measures["memory_report"]

    def cue(seed: int, right: float) -> dict[str, Any]:
        gaps = {name: {"count": 10 * (place + 1), "key_or_ball": right} for place, name in enumerate(report.GAPS)}
        gaps["9-16"]["key_or_ball"] = 1.0
        common = {"cpu_seconds": 60, "seconds": 120, "steps": 1000, "updates": 10, "parameters": 99}
        return {"task": "cue", "memory": "scan", "seed": seed, "measured": {"gaps": gaps}, **common}

    result = {"runs": {"b": cue(1, 0.8), "a": cue(0, 1.0)}}
    (table,) = report.tables(result)
    assert table.rows[0][:6] == ["scan", "90.0%", "90.0%", "100.0%", "90.0%", "100.0% 88.6%"]
    reached, counts = report.target_lines(result)
    assert reached == "accuracy beyond 8 steps: 94.3% over 2 seeds, at least 95%, aim 99%: missed"
    assert counts == "cues per run: 1-3 steps 10, 4-8 steps 20, 9-16 steps 30, over 16 steps 40"


def test_some_environments_go_on_acting_at_random_and_the_others_follow_the_policy() -> None:
    trainer = Trainer(TrainConfig(env=BALL, num_envs=5, random_envs=2, prefill=50, train_ratio=1e-9, threads=1))
    bias = list(trainer.world_model.decision.parameters())[-1]
    with torch.no_grad():
        bias.copy_(torch.tensor([0.0, 0.0, 1000.0]))
    done = []
    step = trainer.episodes.step
    trainer.episodes.step = lambda actions: done.append(actions.copy()) or step(actions)  # type: ignore[method-assign]
    for _ in range(hidden_ball.LENGTH + 60):
        trainer.iterate()
        encoded = trainer.collector.state["action"].argmax(-1).numpy()
        np.testing.assert_array_equal(encoded, done[-1])  # memory reads the executed action
    # Until an episode ends, all environments prefill.
    before, after = (np.array(part) for part in (done[: hidden_ball.LENGTH], done[hidden_ball.LENGTH :]))
    assert all(set(column) == {0, 1, 2} for column in (*after[:, :2].T, before.ravel()))
    assert (after[:, 2:] == hidden_ball.RIGHT).mean() > 0.9  # the policy's unimix


@pytest.mark.parametrize("count", [-1, 6])
def test_more_environments_than_there_are_cannot_act_at_random(count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"random_envs is {count}, expected .*at (least 0|most num_envs = 5)"):
        TrainConfig(env=BALL, num_envs=5, random_envs=count)


def test_a_grid_has_the_classes_that_its_space_has() -> None:
    def sizes(name: str) -> tuple[int, ...]:
        return ObservationSpec.from_space(registry.make(name).observation_space).modalities["observation"].sizes

    assert sizes(BALL) == (3,)
    assert sizes(CUE) == (16, 16, 16)  # MiniGrid declares 255


def test_presets_are_what_the_command_line_starts_from() -> None:
    for name, env in (("wander", CUE), ("moving", BALL)):
        config, _, _ = train_options(["--env", env, "--preset", name])
        assert config.random_envs == config.num_envs
        episode = 5 * 9**2 if env == CUE else hidden_ball.LENGTH
        assert config.replay.window > episode  # an episode with its last view
