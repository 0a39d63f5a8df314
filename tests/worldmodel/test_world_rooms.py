"""The benchmark of worlds: runs, tables, chart."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_run_is_tested_and_merged_into_tables_and_a_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("world_rooms")
    target = tmp_path / "result.json"
    common = ["--rows", "place, motion given", "--seeds", "0", "--json", str(target)]
    common += ["--runs", str(tmp_path / "runs"), "--quick"]
    assert script.main(common) == 0
    said = capsys.readouterr().out
    result = json.loads(target.read_text())
    assert list(result["runs"]) == ["place, motion given/0.005 min/0"]
    entry = result["runs"]["place, motion given/0.005 min/0"]
    assert entry["curve"][0]["minutes"] > 0 and entry["commit"] and entry["cpu"]
    assert entry["parameters"] == 1817 and entry["updates"] > 0 and entry["cpu_seconds"] > 0
    assert {"room of 21", "own heading", "two agents"} < entry["tests"].keys()
    assert entry["tests"]["own heading"]["1-8"]["cells"] > 0
    assert "place, motion given, 0.005 min" in said and target.with_suffix(".png").exists()
    rows = {name: row for name, *row in script.targets.table(result)[1]}
    worst = min(x["accuracy"] for name, x in entry["tests"]["own heading"].items() if name in script.targets.BUCKETS)
    assert rows["own heading, same weights"][2:] == [f"{100 * worst:.3f}%", "missed"]
    assert rows["edited cells"][2:] == ["", "not measured"]
    few = {"33-128": {"cells": 3, "accuracy": 1.0}, "129-512": {"cells": 1, "accuracy": 0.0}, "1-8": {"cells": 9}}
    pooled = script.targets.TARGETS[-1]
    run = {"row": pooled.row, "minutes": 30, "tests": {pooled.test: few}}
    assert pooled.pooled and pooled.measured({"runs": {"one": run}}) == 75
    monkeypatch.setattr(script, "execute", None)  # finished runs are reused
    assert script.main([*common, "--list"]) == 0
    assert capsys.readouterr().out.count("there") == 1
    with pytest.raises(SystemExit):
        script.main(["--rows", "maze"])
    assert "there is no 'maze'" in capsys.readouterr().err


def test_an_imagined_world_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runs = importlib.import_module("worlds.runs")
    imagined = importlib.import_module("worlds.imagined")
    from worldmodel.acting.world import World

    row = runs.rows.ROWS["place, moves learned"]
    model = runs.TokenWorldModel(row.model)
    world = World(model, seed=0)
    monkeypatch.setattr(imagined.World, "create", lambda run, seed: world)
    monkeypatch.setattr(imagined, "_enter", lambda world, seed: True)
    monkeypatch.setattr(imagined, "walk", lambda world, steps, seed: world.step(0))
    found = imagined.measure(tmp_path, 0, 20, 5)
    assert found["returning"] > 0 and found["ms_per_step"] > 0 and not found["fork_changed_the_original"]
    assert found["edits"] == 5 and found["cells_changed_elsewhere"] >= 0


def test_the_generic_memories_have_equal_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = importlib.import_module("worlds.rows")
    sizes = {name: rows.parameters(row.model) for name, row in rows.ROWS.items() if row.tuned}
    assert len(sizes) == 8 and all(0.85 * rows.BUDGET < size <= rows.BUDGET for size in sizes.values())
    assert sys.modules["worlds.rows"].parameters(rows.ROWS["place, motion given"].model) < 2000
