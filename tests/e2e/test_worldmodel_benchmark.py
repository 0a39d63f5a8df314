import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("world_model")


def test_single_runs_of_the_benchmark_merge_into_one_table(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmarks/world_model.py", *common, *arguments])
        assert benchmark.main() == 0
        return capsys.readouterr().out

    target = tmp_path / "result.json"
    tiny = (
        "--prefill 200 --num-envs 4 --replay.batch-size 2 --replay.window 104 --model.memory.width 16 --log-seconds 1"
    )
    common = ["--tasks", "RepeatPreviousEasy", "--seeds", "0", "--json", str(target), "--runs", str(tmp_path / "runs")]
    common += ["--minutes", "0.08", "--episodes", "4", "--threads", "1", "--train", tiny]
    said = run("--variants", "GRU")
    assert re.search(r"RepeatPreviousEasy\s+GRU\s+-?\d\.\d+", said), said
    assert target.with_suffix(".png").exists()
    (entry,) = json.loads(target.read_text())["runs"].values()
    assert len(entry["evaluation"]["returns"]) == 4 and entry["steps"] > 200 and entry["updates"] > 0
    assert entry["settings"]["model"]["memory"]["blocks"][0]["kind"] == "gru"
    times = entry["milliseconds_per_update"]
    assert 0 < times["imagine"] < times["update"] and 0 < times["imagine_fraction"] < 1
    assert entry["curve"] and 0 < entry["cores_used"] < 8
    # Finished runs are reused.
    monkeypatch.setattr(benchmark, "execute", lambda plan, folder: {**entry, "variant": plan.variant})
    run("--variants", "GRU,unrotated")
    result = json.loads(target.read_text())
    assert list(result["runs"]) == ["RepeatPreviousEasy/GRU/0", "RepeatPreviousEasy/unrotated/0"]
    assert result["runs"]["RepeatPreviousEasy/GRU/0"] == entry
    listed = run("--list", "--variants", "scan,unrotated")
    assert [line.split()[0] for line in listed.splitlines()] == ["missing", "there"]
    for wrong, message in (("--variants", "there is no 'lstm'"), ("--tasks", "there is no 'lstm'")):
        with pytest.raises(SystemExit):
            run(wrong, "lstm")
        assert message in capsys.readouterr().err


def test_every_variant_changes_the_preset_of_its_task_by_its_name(benchmark: ModuleType) -> None:
    from world.runs import Plan, train_options
    from world.tasks import MEMORIES, TASKS
    from worldmodel.commands.options import preset_config, with_kinds
    from worldmodel.commands.options import train_options as read

    for task in TASKS.values():
        seen = []
        for variant, changed in task.variants.items():
            plan = Plan(task, variant, 0, minutes=1, steps=task.steps)
            config, _, _ = read(train_options(plan, Path("folder")))
            assert (config.env, config.preset, config.steps) == (task.name, task.preset, task.steps)
            start = preset_config(task.preset)
            assert (config.learner, config.replay) == (start.learner, start.replay)
            for name, value in changed.items():
                if name == "memory":
                    assert config.model == with_kinds(start.model, value, None) or len(changed) > 1
                    continue
                found: Any = config
                for part in name.split("."):
                    found = found[int(part)] if part.isdigit() else getattr(found, part)
                assert found == value
            seen.append(config.model)
        assert all(model not in seen[:index] for index, model in enumerate(seen))
        if task.variants is MEMORIES:
            assert seen[0] == preset_config(task.preset).model


def test_every_task_in_common_is_one_of_the_command_line(benchmark: ModuleType) -> None:
    from world.runs import Plan, train_options
    from world.tasks import COMMON
    from worldmodel.commands.options import train_options as read

    for task in COMMON.values():
        found = []
        for variant in task.variants:
            config, _, _ = read(train_options(Plan(task, variant, 3, task.minutes, task.steps), Path("folder")))
            assert (config.env, config.preset, config.steps, config.seed) == (
                task.env or task.name,
                task.preset,
                task.steps,
                3,
            )
            assert [f"{name}={value}" for name, value in config.env_args.items()] == list(task.env_args)
            found.append(config)
        assert all(config not in found[:index] for index, config in enumerate(found))


def test_the_share_of_right_answers_is_that_of_the_last_episodes(benchmark: ModuleType) -> None:
    from world.runs import share_right

    lines: list[dict[str, float]] = [
        {"episodes": 100, "episode/return": -1.0},
        {"episodes": 200, "episode/return": 0.0},
        {"episodes": 200},
        {"episodes": 260, "episode/return": 1.0},
        {"episodes": 300, "episode/return": 0.5},
    ]
    assert share_right(lines, 100) == {"episodes": 100, "share": (60 + 0.75 * 40) / 100}
    assert share_right(lines, 101) == {"episodes": 200, "share": (60 + 0.75 * 40 + 0.5 * 100) / 200}
    assert share_right(lines, 10**6)["episodes"] == 200, "all that is known"


def test_scores_of_tasks_in_common_stand_beside_published_ones(benchmark: ModuleType, tmp_path: Path) -> None:
    from world import chart, report

    entry = {"task": "Acrobot-v1", "variant": "reinforce", "seconds": 60.0, "steps": 20_000, "minutes": 15}
    entry |= {"evaluation": {"mean": -80.0}, "milliseconds_per_update": {}, "cores_used": 1.0}
    scores = [[30.0, 5_000, -200.0], [60.0, 9_000, -85.0]], [[30.0, 5_000, -95.0]]
    runs = {f"{seed}": {**entry, "seed": seed, "evaluations": points} for seed, points in enumerate(scores)}
    result = {"benchmark": "world_tasks", "runs": runs, "environment": {}}
    (row,) = report.score_cells(result)
    told = dict(zip(report.SCORE_HEADER, row, strict=True))
    assert (told["score"], told["each seed"], told["at least"]) == ("-80.0", "-80.0 -80.0", "-90")
    assert told["steps to it"] == "9,000 (1 of 2)" and "QR-DQN, RL-Zoo: -69.1 at 100,000" in told["published"]
    (line,) = report.target_lines(result)
    assert line.startswith("Acrobot-v1: -80.0 over 2 seeds, at least -90: reached")
    assert chart.draw(result, tmp_path / "chart.png") == "" and (tmp_path / "chart.png").stat().st_size > 10_000


def test_a_run_of_control_is_evaluated_on_the_way(benchmark: ModuleType, tmp_path: Path) -> None:
    from world.runs import Plan, execute
    from world.tasks import TASKS

    tiny = "--prefill 64 --num-envs 2 --train-ratio 2 --replay.batch-size 2 --replay.window 32 --log-seconds 0.5"
    plan = Plan(
        TASKS["CartPole-v1"], "reinforce", 0, minutes=9, steps=200, episodes=3, threads=1, extra=tuple(tiny.split())
    )
    entry = execute(plan, tmp_path / "run")
    assert entry["steps"] == 200 and entry["settings"]["model"]["decision"]["gradient"] == "reinforce"
    assert len(entry["evaluation"]["returns"]) == 3
    seconds, steps, mean = entry["evaluations"][-1]
    assert (seconds, steps) == (entry["seconds"], 200) and 8 <= mean <= 500


@pytest.mark.parametrize(("ema", "acting"), [(0, "world_model"), (9, "ema")])
def test_what_acts_is_kept_of_every_checkpoint_though_the_run_keeps_two(
    benchmark: ModuleType, tmp_path: Path, ema: int, acting: str
) -> None:
    from world.runs import keep_checkpoints
    from worldmodel.runs import storage
    from worldmodel.runs.run import Run

    run = Run.create(tmp_path / "run", {"train": {"learner": {"ema": ema}}})
    for steps in (10, 200, 3000, 40_000):
        weights = {"steps": torch.tensor(steps)}
        run.save(steps, {"world_model": weights, "ema": weights, "replay": {}})
        keep_checkpoints(run.folder)
    keep_checkpoints(run.folder)
    assert len(run.checkpoints) == 2
    kept = sorted((run.folder / "passed").iterdir())
    assert [int(path.name) for path in kept] == [10, 200, 3000, 40_000]
    for path in kept:
        (checkpoint,) = Run(path).checkpoints
        assert [file.stem for file in checkpoint.iterdir()] == [acting]
        assert storage.load(checkpoint / f"{acting}.safetensors")["steps"] == int(path.name)


def control_run(seed: int, at_end: float, *evaluations: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "task": "CartPole-v1",
        "variant": "reinforce",
        "seed": seed,
        "minutes": 8.0,
        "seconds": 480.0,
        "steps": 10_000,
        "evaluation": {"mean": at_end},
        "evaluations": [list(point) for point in evaluations],
        "milliseconds_per_update": {},
        "cores_used": 1.0,
    }


def test_the_table_says_when_a_threshold_was_first_passed(benchmark: ModuleType) -> None:
    from world import report

    runs = {
        "a": control_run(0, 500.0, (60, 1000, 300.0), (120, 2000, 475.0), (180, 3000, 20.0)),
        "b": control_run(1, 450.0, (240, 4000, 480.0)),
        "c": control_run(2, 474.9, (60, 1000, 474.9)),
    }
    result = {"runs": runs}
    (row,) = report.control_cells(result)
    cells = dict(zip(report.CONTROL_HEADER, row, strict=True))
    assert cells["mean return"] == "475.0" and cells["each seed"] == "500.0 450.0 474.9"
    assert cells["minutes to threshold"] == "3.00" and cells["steps to threshold"] == "3,000"
    assert cells["seeds"] == "2 of 3"
    (line,) = report.target_lines(result)
    assert line.startswith("CartPole-v1: 475.0 over 3 seeds, at least 475: missed")  # 474.97, rounded
    assert "2 of 3 reached it within 5 minutes" in line
    runs["c"]["evaluation"]["mean"] = 475.1
    assert ": reached" in report.target_lines(result)[0]
    assert not report.return_cells(result) and report.control_cells({"runs": {"c": runs["c"]}})[0][-3:-1] == ["–", "–"]


def test_runs_that_name_a_memory_are_still_read(benchmark: ModuleType) -> None:
    from world import report

    run = {"task": "RepeatPreviousEasy", "memory": "GRU", "seed": 0, "minutes": 5.0, "seconds": 300.0, "steps": 9}
    result = {"runs": {"a": {**run, "evaluation": {"mean": 0.5}}}}
    assert report.return_cells(result)[0][:3] == ["RepeatPreviousEasy", "GRU", "0.500"]
    assert not report.control_cells(result) and not report.target_lines(result)
