"""``demo radar``, at a small size."""

import json

import pytest
import torch

from worldmodel.__main__ import main
from worldmodel.demo.radar import GAME, NAMES, WINDOW, range_doppler, spectrogram


def test_the_demonstration_leaves_figures_and_a_picture(tmp_path, capsys):
    folder = tmp_path / "demo"
    given = ["--folder", str(folder), "--seconds", "0.1", "--design-steps", "3"]
    assert main(["demo", "radar", *given]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(folder / "radar.png") and (folder / "radar.png").stat().st_size > 50_000
    summary = json.loads((folder / "radar.json").read_text())
    assert list(summary["hits"]) == [*NAMES, "random"] and summary["hits"]["random"] == pytest.approx(1 / 8, abs=0.02)
    assert summary["peak_sidelobe"]["before"] == pytest.approx(-13.5, abs=0.1)
    assert summary["peak_sidelobe"]["after"] < summary["peak_sidelobe"]["before"]
    assert all(f"{name}: hit in" in captured.err for name in NAMES)


def test_the_spectrogram_shows_each_side_in_its_channel():
    sent, jammed = torch.tensor([0, 3, 5]), torch.tensor([7, 3, 1])
    found = spectrogram(sent, jammed, seed=0)
    windows = GAME.radar.cells // WINDOW
    assert found.shape == (GAME.channels * WINDOW, 3 * windows)
    power = (10 ** (found / 10)).unflatten(0, (-1, WINDOW)).unflatten(-1, (-1, windows)).mean((1, 3))
    assert power[:, 0].topk(2).indices.tolist() == [0, 7] and power[:, 2].topk(2).indices.tolist() == [5, 1]
    assert power[:, 1].argmax() == 3 and power[[0, 1, 2, 4, 5, 6, 7], 1].max() < 2


def test_a_copy_hides_the_target_that_the_clear_map_shows():
    clear, hit = range_doppler(False, 0), range_doppler(True, 0)
    assert (clear.row, clear.cell) == (hit.row, hit.cell)
    assert clear.detected(GAME.cfar) and not hit.detected(GAME.cfar)
