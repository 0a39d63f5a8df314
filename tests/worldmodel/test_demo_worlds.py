"""``demo worlds``, at a small size."""

import json
from pathlib import Path

import pytest

from worldmodel.__main__ import main


def test_the_demonstration_leaves_worlds_numbers_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", "worlds", "--folder", str(folder), "--seconds", "0.1", "--steps", "16"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(folder / "worlds.png") and (folder / "worlds.png").stat().st_size > 10_000
    summary = json.loads((folder / "worlds.json").read_text())
    assert summary["entered_bit_equal"] and summary["by_gap"]["map of places"]["1-8"] >= 0
    assert {path.name for path in folder.glob("*.world")} == {"first.world", "edited.world", "other.world"}
    assert "bit-equal" in captured.err
    assert main(["demo", "worlds", "--folder", str(folder)]) == 1
    said = capsys.readouterr().err
    assert said == f"error: --folder {folder} has a demonstration already: remove it, or name another folder\n"
