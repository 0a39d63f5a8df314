"""``demo arm``, at a small size, and the page on imitation."""

import doctest
import json
import pathlib

from worldmodel.__main__ import main
from worldmodel.learning.imitation_run import load_policy, saved_imitation_config
from worldmodel.runs.run import Run


def test_the_demonstration_leaves_figures_a_picture_and_a_film(tmp_path, capsys):
    folder = tmp_path / "demo"
    given = {"folder": folder, "demonstrations": 8, "seconds": 0.01, "episodes": 1, "length": 3}
    assert main(["demo", "arm", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(folder / "arm.png") and (folder / "arm.png").stat().st_size > 30_000
    run = Run(folder / "run")
    assert str(run.folder) in captured.err and saved_imitation_config(run).env_args["joints"] is True
    assert load_policy(run).perception is not None
    summary = json.loads((folder / "arm.json").read_text())
    assert list(summary["success"]) == ["imitated", "mean command", "random"]
    assert all(list(shares) == ["pick", "push", "stack", "wipe"] for shares in summary["success"].values())
    assert "recorded 8 episodes" in captured.err and "imitated: pick" in captured.err
    assert any(folder.glob("arm.*4")) or any(folder.glob("arm.gif"))


def test_the_page_runs():
    path = pathlib.Path(__file__).parents[2] / "docs" / "imitation.md"
    assert doctest.testfile(str(path), module_relative=False, raise_on_error=True).attempted > 10
