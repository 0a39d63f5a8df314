"""The benchmark of byte-level language models, small."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("byte_model")


def test_answers_are_the_newest_values(benchmark):
    recall = importlib.import_module("text.recall")
    tokens, answers, ages = recall.batch(3, torch.Generator().manual_seed(0))
    for row in range(3):
        stored = {}
        for t, token in enumerate(tokens[row].tolist()):
            if token < recall.KEYS * recall.VALUES:
                stored[token // recall.VALUES] = token % recall.VALUES, t
                assert answers[row, t] == -1
            else:
                value, when = stored[token - recall.KEYS * recall.VALUES]
                assert (answers[row, t], ages[row, t]) == (value, t - when)
    asked = ages[answers >= 0]
    assert 0.35 < (asked < recall.NEAR).float().mean() < 0.65


def test_a_file_is_in_one_part_and_the_hash_is_of_all(benchmark, tmp_path):
    corpus = importlib.import_module("text.corpus")
    for name in ("os", "re", "ast", "abc", "io", "json", "bisect", "heapq", "queue", "not_of_python"):
        (tmp_path / f"{name}.py").write_bytes(name.encode() * 50)
    found = corpus.load(tmp_path)
    assert found.description["files"] == 9
    parts = [bytes(part.tolist()) for part in (found.train, *found.validation, *found.tuning)]
    assert (
        sum(map(len, parts)) == sum(path.stat().st_size for path in tmp_path.glob("*.py")) - len("not_of_python") * 50
    )
    (tmp_path / "abc.py").write_bytes(b"changed")
    assert corpus.load(tmp_path).description["sha256"] != found.description["sha256"]
    windows = corpus.windows([torch.arange(10), torch.arange(3), torch.arange(9)], 4, 3)
    assert windows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]


def test_models_have_equal_parameters(benchmark):
    models = importlib.import_module("text.models")
    for memory in models.MEMORIES:
        size = sum(p.numel() for p in models.build(memory, models.Settings(), 256, 2, 100_000).parameters())
        assert 0.98 < size / 100_000 <= 1, memory


def test_rotary_attention_is_windowed_attention_with_a_window_over_all(benchmark):
    models = importlib.import_module("text.models")
    rotary, windowed = models.RotaryAttention(8, 1), models.WindowedAttention(8, 3, 1)
    windowed.attention.load_state_dict(rotary.state_dict())
    inputs = torch.randn(2, 2, 8)
    assert rotary(inputs)[0].shape == windowed(inputs)[0].shape
    torch.testing.assert_close(rotary(inputs)[0][:, 0], windowed(inputs)[0][:, 0])
    moved = torch.cat([torch.randn(2, 5, 8), inputs], 1)
    torch.testing.assert_close(windowed(moved)[0][:, 5:].shape, inputs.shape)


def test_tuned_settings_runs_and_the_report(benchmark, tmp_path, monkeypatch, capsys):
    runs = importlib.import_module("text.runs")
    text = runs.TASKS["text"]
    monkeypatch.setitem(runs.TASKS, "text", runs.dataclasses.replace(text, sizes=(256, 1, 30_000)))
    recall = {"scan": {"lr": (1e-3, 2e-3)}, "hybrid": {"lr": (2e-3,)}}
    monkeypatch.setitem(runs.TASKS, "recall", runs.dataclasses.replace(runs.TASKS["recall"], grid=recall))
    monkeypatch.setattr(runs, "LENGTH", 16)
    monkeypatch.setattr(runs, "WINDOWS", 4)
    target = tmp_path / "result.json"

    def run(*arguments):
        common = ["--json", str(target), "--minutes", "0.002", "--seeds", "0"]
        monkeypatch.setattr(sys, "argv", ["benchmarks/byte_model.py", *common, *arguments])
        assert benchmark.main() == 0
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    try:
        run("--tune", "--tasks", "recall", "--memories", "scan")
        log = json.loads(target.read_text())["tuning"]
        best = min(log.values(), key=lambda entry: entry["loss"])
        rates = sorted(entry["settings"]["lr"] for entry in log.values())
        assert {1e-3, 2e-3} <= set(rates) and len(rates) == len(log)
        equal = {entry["settings"]["lr"] for entry in log.values() if entry["loss"] == best["loss"]}
        assert equal not in ({rates[0]}, {rates[-1]}), "the best is an end of what was tried"
        said = run("--memories", "scan")
    finally:
        torch.set_num_threads(threads)
    result = json.loads(target.read_text())
    assert list(result["runs"]) == ["recall/scan/0", "text/scan/0"]
    assert result["runs"]["recall/scan/0"]["settings"] == best["settings"]
    measured = result["runs"]["text/scan/0"]["measured"]
    assert len(measured["last"]) == len(measured["whole"]) == 5 and measured["last"][0] == measured["whole"][0]
    assert "scan, 16 × the training length" in said and target.with_suffix(".png").exists()
    assert [line.split()[0] for line in run("--list", "--memories", "scan,hybrid").splitlines()].count("there") == 2
    with pytest.raises(SystemExit):
        run("--memories", "lstm")


@pytest.mark.parametrize(
    "best, tried", [(1.5e-3, [1e-3, 2e-3, 4e-3]), (7e-3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]), (2e-4, [])]
)
def test_rates_are_tried_on_both_sides_of_the_best(benchmark, monkeypatch, best, tried):
    runs = importlib.import_module("text.runs")
    recall = runs.dataclasses.replace(runs.TASKS["recall"], grid={"scan": {"lr": (1e-3, 2e-3)}})
    monkeypatch.setitem(runs.TASKS, "recall", recall)
    log = {}
    while new := [settings for settings in runs.grid("recall", "scan", log) if settings.lr not in log]:
        for settings in new:
            loss = abs(math.log(settings.lr / best))
            log[settings.lr] = {"task": "recall", "memory": "scan", "loss": loss, "settings": {"lr": settings.lr}}
    rates = sorted(log)
    assert rates == tried or (not tried and rates[0] < best < rates[1] and rates[-1] == 2e-3)
    equal = {lr: {**entry, "loss": 1.0} for lr, entry in log.items()}
    assert len(runs.grid("recall", "scan", equal)) == len(log), "nothing is better than the rest"
    diverged = {lr: {**entry, "loss": None} for lr, entry in log.items()}
    assert len(runs.grid("recall", "scan", diverged)) == len(log)
