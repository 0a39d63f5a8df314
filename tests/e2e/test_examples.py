import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MOVING_DIGITS = ROOT / "examples" / "moving_digits.py"
specification = importlib.util.spec_from_file_location("moving_digits", MOVING_DIGITS)
moving_digits = importlib.util.module_from_spec(specification)
sys.modules["moving_digits"] = moving_digits
specification.loader.exec_module(moving_digits)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MOVING_DIGITS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_moving_digits_trains_both_models_and_writes_the_picture(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "digits.png"
    small = ["--steps", "2", "--batch", "2", "--hidden", "3", "--kernel", "3", "--frames", "5", "--context", "3"]
    done = run(*small, "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("persistence", "wmkernels", "plain ConvLSTM"):
        assert re.search(rf"^{name} +0\.\d+ +0\.\d+", done.stdout, re.M), done.stdout


def test_help_says_what_it_does():
    done = run("--help")
    assert done.returncode == 0
    assert "Next-frame prediction" in done.stdout
    assert "--context" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--context", "12"], "some frames must follow"), (["--kernel", "4"], "odd"), (["--steps", "0"], "positive")],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        moving_digits.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_digits_keep_their_speed_and_stay_in_the_frame():
    images = torch.ones(1, moving_digits.DIGIT, moving_digits.DIGIT)
    frames = moving_digits.moving(images, 3, 30, torch.Generator().manual_seed(0))
    assert frames.shape == (30, 3, 1, moving_digits.SIZE, moving_digits.SIZE)
    area = frames.sum((2, 3, 4))
    one = moving_digits.DIGIT**2
    assert ((area >= one) & (area <= moving_digits.DIGITS * one)).all()
    assert (frames[1:] != frames[:-1]).any((2, 3, 4)).all()


def test_the_two_models_are_the_same_mathematics():
    """Equal outputs for equal weights."""
    torch.manual_seed(0)
    plain = moving_digits.PlainConvLSTM(1, 4, 3, 2)
    ours = moving_digits.wmkernels.nn.ConvLSTM(1, 4, 3, 2)
    with torch.no_grad():
        for layer, convolution in enumerate(plain.convolutions):
            inputs = convolution.in_channels - 4
            getattr(ours, f"weight_ih_l{layer}").copy_(convolution.weight[:, :inputs])
            getattr(ours, f"weight_hh_l{layer}").copy_(convolution.weight[:, inputs:])
            getattr(ours, f"bias_l{layer}").copy_(convolution.bias)
    frames = torch.rand(4, 2, 1, 6, 6)
    torch.testing.assert_close(ours(frames)[0], plain(frames)[0])
