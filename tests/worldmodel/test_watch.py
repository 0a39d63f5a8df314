"""Open-loop prediction does not affect training."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from worldmodel_environments import Numbered
from worldmodel_examples import set_reward_scale, small_model, whole_episodes

from worldmodel.__main__ import main
from worldmodel.commands import train as training
from worldmodel.commands.options import train_options
from worldmodel.commands.train import train
from worldmodel.learning.callback import AHEAD, ALLOWANCE, CONTEXT, SHARE, OpenLoopCallback, errors_ahead
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import Trainer
from worldmodel.model.open_loop import open_loop
from worldmodel.runs.run import Run

ECHO = "worldmodel_environments:wmtest/Echo-v0"
CATCH = "worldmodel_environments:wmtest/Catch-v0"
SMALL = ("--replay.window", "24", "--replay.batch-size", "2", "--replay.burn-in", "4", "--model.perception.hidden", "8")
FEW = ("--num-envs", "2", "--prefill", "60", "--train-ratio", "8", "--threads", "1", "--log-seconds", "0.01")
pytestmark = pytest.mark.usefixtures("same_threads")


def test_a_run_is_the_same_however_often_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "OpenLoopCallback", Often)
    settings, _, _ = train_options(["--env", ECHO, "--steps", "120", *FEW, *SMALL])
    looks = []
    monkeypatch.setattr(Run, "log_picture", lambda run, name, picture, steps: looks.append(picture.shape))
    runs = {}
    for minutes in (0.0, 1e-9):
        runs[minutes] = train(
            dataclasses.replace(settings, open_loop_minutes=minutes), tmp_path / str(minutes), quiet=True
        )
    assert looks and len({shape[1] for shape in looks}) == 1
    never, often = runs.values()
    names = [name for line in often.metrics for name in line if name.startswith("open_loop/")]
    assert {"open_loop/observation@1", "open_loop/reward@4"} <= set(names)
    assert not any(name.startswith("open_loop/") for line in never.metrics for name in line)
    for part in ("world_model", "learner", "replay", "collector"):
        assert same(never.load(part), often.load(part)), part
    assert same(never.load("trainer")["random"], often.load("trainer")["random"])


class Often(OpenLoopCallback):
    opportunities = 0

    def is_time(self, seconds: float) -> bool:
        self.opportunities += 1
        return self._minutes > 0 and self.opportunities % 10 == 5


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "shape") else a == b


@pytest.mark.parametrize("cost", [0.1, 3.0, 40.0])
def test_looking_takes_no_more_than_its_share_of_the_time(cost: float) -> None:
    began, callback, spent, looks = 1000.0, OpenLoopCallback(2, 1000.0), 0.0, 0
    seconds = began
    while seconds < began + 200_000:
        seconds += 7
        if callback.is_time(seconds):
            callback.took(cost, seconds)
            spent, looks = spent + cost, looks + 1
            assert looks == 1 or spent <= SHARE * (seconds - began) + ALLOWANCE
    assert spent <= SHARE * (seconds - began) + ALLOWANCE + cost
    assert looks >= 0.9 * min(200_000 / 120, SHARE * 200_000 / cost) and not OpenLoopCallback(0, 0.0).is_time(1e9)


def test_the_figures_are_the_mean_errors_of_the_rows_that_are_long_enough() -> None:
    model = small_model()
    batch = whole_episodes(model, rows=3, time=CONTEXT + 4)
    batch.valid[1, CONTEXT + 1 :] = False
    batch.is_first[2, CONTEXT + 3] = True
    set_reward_scale(model, 2.0)
    loop = open_loop(model, batch, CONTEXT)
    metrics = errors_ahead(loop, model)
    assert set(metrics) == {f"open_loop/{name}@{k}" for name in ("card", "place", "reward") for k in (1, 2, 4)}
    errors = loop.errors(model.observation_spec.modalities)
    assert metrics["open_loop/card@1"] == pytest.approx(float(errors["card"][:, 0].mean()))
    assert metrics["open_loop/place@2"] == pytest.approx(float(errors["place"][[0, 2], 1].mean()))
    assert metrics["open_loop/place@4"] == pytest.approx(float(errors["place"][0, 3]))
    # Reward of the last observed frame's action.
    expected = (loop.predicted_rewards[:, CONTEXT - 1] - batch.rewards[:, CONTEXT - 1]).abs().mean()
    assert metrics["open_loop/reward@1"] == pytest.approx(float(expected))


def test_rows_that_are_too_short_say_nothing() -> None:
    model = small_model()
    assert OpenLoopCallback(1, 0.0).look(model, whole_episodes(model, time=1), 0.0) == ({}, None)
    batch = whole_episodes(model)
    batch.is_first[:, 1] = True
    assert OpenLoopCallback(1, 0.0).look(model, batch, 0.0) == ({}, None)
    metrics, picture = OpenLoopCallback(1, 0.0).look(model, whole_episodes(model, time=CONTEXT + AHEAD[-1]), 0.0)
    assert metrics and picture is not None and picture.shape[1] == 750


def test_short_episodes_lower_the_context() -> None:
    model = small_model()
    for batch in (whole_episodes(model, time=CONTEXT), whole_episodes(model)):
        batch.is_first[:, 4:] = True
        metrics, picture = OpenLoopCallback(1, 0.0).look(model, batch, 0.0)
        assert {f"open_loop/place@{k}" for k in (1, 2)} <= set(metrics) and "open_loop/place@4" not in metrics
        assert picture is not None


def test_unknown_rewards_do_not_count() -> None:
    model = small_model()
    batch = whole_episodes(model, time=CONTEXT + 4)
    batch.rewards[0, CONTEXT - 1] = 1e6
    batch.reward_mask[0, CONTEXT - 1] = False
    batch.reward_mask[:, CONTEXT] = False
    loop = open_loop(model, batch, CONTEXT)
    expected = (loop.predicted_rewards[1:, CONTEXT - 1] - batch.rewards[1:, CONTEXT - 1]).abs().mean()
    metrics = errors_ahead(loop, model)
    assert metrics["open_loop/reward@1"] == pytest.approx(float(expected)) and "open_loop/reward@2" not in metrics


def test_pictures_come_in_the_first_minutes_too() -> None:
    callback, looks = OpenLoopCallback(2, 0.0), []
    for seconds in range(0, 600, 5):
        if callback.is_time(seconds):
            callback.took(0.5, seconds)
            looks.append(seconds)
    assert looks == [15, 30, 60, 120, 240, 360, 480]


def test_a_picture_arrives_in_tensorboard_and_the_option_turns_it_off(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = {}
    for minutes in ("0.00001", "0"):
        folder = tmp_path / minutes
        arguments = ["--env", CATCH, "--steps", "200", "--open-loop-minutes", minutes, "--run", str(folder)]
        assert main(["train", *arguments, *FEW, *SMALL, "--replay.window", "48"]) == 0
        events = loader.EventAccumulator(str(folder / "tensorboard")).Reload()
        shown[minutes] = events.Tags()["images"]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        told = [name for line in lines for name in json.loads(line) if name.startswith("open_loop/observation@")]
        assert bool(told) == (minutes != "0")
    assert shown == {"0.00001": ["open_loop"], "0": []}


def test_a_resumed_run_waits_before_it_looks_again() -> None:
    settings, _, _ = train_options(["--env", ECHO, *FEW, *SMALL])
    assert settings.open_loop_minutes == 2 and Trainer(settings).batch is None
    callback = OpenLoopCallback(2, 5000.0)
    assert not callback.is_time(5100.0) and callback.is_time(5121.0)


class Waiting(Numbered):
    """Waits at every step, which takes no processor time."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(0.01)
        return super().step(action)


def test_processor_time_does_not_count_what_waits(tmp_path: Path) -> None:
    seconds, spent = {}, {}
    for clock in ("wall", "cpu"):
        began = time.perf_counter()
        few = dict(
            num_envs=1, prefill=1000, threads=1, steps=100, eval_minutes=0, open_loop_minutes=0, log_seconds=1e-3
        )
        run = train(TrainConfig(env=Waiting, clock=clock, **few), tmp_path / clock, quiet=True)
        spent[clock], seconds[clock] = time.perf_counter() - began, run.metrics[-1]["seconds"]
    assert 1 < seconds["wall"] < spent["wall"] and 0 < seconds["cpu"] < spent["cpu"] - 1
