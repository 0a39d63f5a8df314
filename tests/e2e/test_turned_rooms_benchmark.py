import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("turned_rooms")
    monkeypatch.setattr(module, "RECORDED", 64)
    monkeypatch.setattr(module, "HELD_OUT", 8)
    monkeypatch.setattr(module, "STEPS", 8)
    return module


def test_episodes_are_those_of_the_environment(benchmark: ModuleType) -> None:
    from worldmodel.environments.registry import make

    episodes = benchmark.recorded(0, turns=True)
    resting = (episodes.commands == 0).all(-1)
    assert not resting[:, 0].any() and 0.4 < float(resting.float().mean()) < 0.8
    assert torch.equal(episodes.positions[:, 1:][resting], episodes.positions[:, :-1][resting])
    environment = make("worldmodel/TurnedRooms-v0", observes="place", ends=False, length=1000).unwrapped
    environment.reset(seed=0)
    batch = episodes.batch()
    _, action_spec = benchmark.specs()
    for row in range(3):
        environment.position, environment.angle = episodes.positions[row, 0].clone(), episodes.angles[row]
        for action in range(12):
            for command in action_spec.to_env(batch.actions[row, action].numpy()):
                observation = environment.step(command)[0]
            assert np.allclose(observation, batch.observations["observation"][row, action + 1], atol=1e-4)
    rested = benchmark.held_out(0, True, 20)
    assert torch.equal(rested.positions[:, benchmark.WANDER], rested.positions[:, benchmark.WANDER + 20])
    assert not benchmark.recorded(0, turns=False).angles.any()


def test_models_have_about_as_many_weights(benchmark: ModuleType) -> None:
    from worldmodel.model.world_model import WorldModel

    def weights(method: str) -> int:
        model = WorldModel(*benchmark.specs(), benchmark.world_model_config(method))
        return sum(p.numel() for part in (model.entry, model.memory, model.prediction) for p in part.parameters())

    assert weights("memoryless") == pytest.approx(weights("scan"), rel=0.05)


def test_rows_are_measured_once_and_reported(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    common = ["turned_rooms.py", "--json", str(path), "--seeds", "0", "--episodes", "2", "--minutes", "0.003"]
    monkeypatch.setattr(sys, "argv", [*common, "--methods", "scan,random"])
    benchmark.main()
    said = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["scan", "random"]
    assert rows[0]["updates"] == rows[0]["curve"][-1]["updates"] >= 1 and rows[0]["after_rest"] > 0
    assert "| scan, 0.003 min | 0 |" in said and "| random | 0 |" in said
    benchmark.main()
    assert json.loads(path.read_text())["rows"] == rows
    monkeypatch.setattr(sys, "argv", [*common, "--methods", "scan,oracle"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "there is no ['oracle']" in capsys.readouterr().err
