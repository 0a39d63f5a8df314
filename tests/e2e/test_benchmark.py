import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_quick_run_measures_every_group(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    done = run(str(BENCHMARKS / "scan_speed.py"), "--quick", "--lengths", "32", "--json", str(target))
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text())
    ours = [row for row in result["rows"] if row["backend"] is not None]
    assert [row["error"] for row in ours if "error" in row] == []
    assert {row["measure"] for row in ours} == {"forward", "training", "step"}
    assert {row["op"] for row in ours} == {
        "selective_scan",
        "selective_step",
        "linear_scan",
        "gated_delta_rule",
        "ssd_scan",
        "causal_conv1d",
        "causal_conv1d_step",
    }
    for row in result["rows"]:
        if "error" not in row:
            assert row["milliseconds"] > 0
            assert row["error_against_float64"] <= row["tolerance"]
    assert "error" not in result["training_memory"] | result["ssd_training_memory"]
    assert result["environment"]["cpu"]["cores"] >= 1
    assert {"before", "after"} <= result["limits"].keys()


def test_quick_run_of_the_place_memory_is_faster_than_its_loop(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    done = run(str(BENCHMARKS / "place_memory_speed.py"), "--quick", "--json", str(target))
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    assert {(row["measure"], row["backend"]) for row in rows} == {
        (measure, backend) for measure in ("forward", "training") for backend in ("reference", "chunked", "cpu")
    }
    for row in rows:
        assert row["milliseconds"] > 0
        assert 0 < row["limit_fraction"] < 1
        assert row["backend"] != "cpu" or row["speedup"] > 2


def test_quick_run_of_models_computes_what_the_library_does_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import models
    from harness import environment

    target = tmp_path / "result.json"
    published = json.loads((BENCHMARKS / "results" / "models_cpu.json").read_text())
    earlier = [row | {"sizes": list(models.QUICK)} for row in published["rows"] if row["model"] == "mamba2"]
    packages = environment.describe(torch.device("cpu"))["packages"]
    target.write_text(json.dumps({"environment": {"packages": packages}, "rows": earlier}))
    done = run(str(BENCHMARKS / "models.py"), "--quick", "--models", "mamba2", "mamba", "--json", str(target))
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    assert rows[: len(earlier)] == earlier
    measured = rows[len(earlier) :]
    assert [(row["model"], row["measure"]) for row in measured] == [("mamba", measure) for measure in models.TARGETS]
    for row in measured:
        assert row["milliseconds"].keys() == {"before", "after", "possible"}
        assert row["error"] < 1e-5 and row["calls"] and "original" not in row["calls"]


def test_quick_run_of_local_attention_stands_beside_its_limit(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    done = run(str(BENCHMARKS / "local_attention_speed.py"), "--quick", "--json", str(target))
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    assert [row["measure"] for row in rows] == ["forward", "training"]
    for row in rows:
        assert row["milliseconds"].keys() == {"plain", "module", "attention alone", "projections"}
        assert row["milliseconds"]["attention alone"] > 0


def test_quick_run_of_the_conv_lstm_measures_every_contender(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    done = run(str(BENCHMARKS / "conv_lstm_speed.py"), "--quick", "--json", str(target))
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text())
    assert [row["error"] for row in result["rows"] if "error" in row] == []
    assert {row["measure"] for row in result["rows"]} == {"step", "forward", "training"}
    assert {"loop", "loop, channels last"} <= {row["implementation"] for row in result["rows"]}
    for row in result["rows"]:
        assert row["milliseconds"] > 0
        assert 0 < row["roofline_fraction"] < 1
        assert row["error_against_float64"] <= row["tolerance"]
    saved = {
        r["implementation"]: r["saved_bytes"] for r in result["rows"] if r["measure"] == "training" and r["backend"]
    }
    kept, recomputed = sorted(saved, key=len)
    assert saved[recomputed] < saved[kept]
    assert target.with_suffix(".png").stat().st_size > 0


def test_a_fast_call_is_timed_many_times_per_sample_however_long_measuring_its_memory_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from harness import timer

    def slow_peak(work: Callable[[], object], device: torch.device) -> int:
        time.sleep(1.5 * timer.SLOW_SECONDS)
        work()
        return 0

    monkeypatch.setattr(timer, "peak_bytes", slow_peak)
    entry, measured = timer.Entry(lambda: None), timer.Timer(torch.device("cpu"))
    measured.warm_up(entry)
    measured.interleave([entry], budget=0.1)
    assert entry.calls > 100
    assert entry.seconds < timer.SINGLE_CALL_SECONDS


def test_tables_and_charts_are_current() -> None:
    done = run(str(BENCHMARKS / "readme.py"), "--check")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run: python benchmarks/readme.py"


def test_a_result_is_named_after_the_processor_that_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from scans.report import machine_slug

    names = {}
    for path in (BENCHMARKS / "results").glob("*_speed_*.json"):
        result = json.loads(path.read_text())
        if result["benchmark"] in ("scan_speed", "conv_lstm_speed"):
            names[path.stem] = f"{result['benchmark']}_{machine_slug(result)}"
    assert len(names) > 2 and all(stem == name for stem, name in names.items()), names


def test_readme_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    expected = {"out": (1, 64, 100), "state": (1, 64, 16), "more": (1, 64, 100), "y": (1, 64), "packed": (1, 64, 100)}
    assert {name: tuple(names[name].shape) for name in expected} == expected


def test_bad_options_are_refused_with_the_reason() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from scan_speed import parse_arguments
from conv_lstm_speed import parse_arguments as conv_lstm_arguments
for parse, options in (
    (parse_arguments, ["--backends", "fast"]),
    (parse_arguments, ["--device", "tpu"]),
    (parse_arguments, ["--lengths", "0"]),
    (conv_lstm_arguments, ["--backends", "cuda"]),
    (conv_lstm_arguments, ["--device", "mps"]),
    (parse_arguments, ["--quick", "--publish"]),
    (conv_lstm_arguments, ["--json", "result.json", "--publish"]),
):
    try:
        parse(options)
    except SystemExit as stop:
        print(stop.code)
"""
    done = run("-c", program)
    assert done.stdout.split() == ["2"] * 7, done.stderr
    for words in ("there is no 'fast'", "device is tpu", "must be positive", "cuda cannot run on cpu", "device is mps"):
        assert words in done.stderr
    assert "no result to publish" in done.stderr and "not allowed with argument --json" in done.stderr
