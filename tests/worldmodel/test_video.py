"""Filming does not change an evaluation."""

import importlib.util
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3 as iio
import numpy as np
import pytest
import worldmodel_environments

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.acting.rollout import evaluate, evaluate_filmed
from worldmodel.acting.video import NoVideo, make_rendered, video_file

CATCH = "worldmodel_environments:wmtest/Catch-v0"
FEW = ("--num-envs", "2", "--prefill", "30", "--train-ratio", "4", "--threads", "1", "--replay.window", "48")
SMALL = ("--replay.batch-size", "2", "--replay.burn-in", "4", "--model.perception.hidden", "8")
pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "catch"
    assert main(["train", "--env", CATCH, "--run", str(folder), "--steps", "60", *FEW, *SMALL]) == 0
    return folder


def test_filming_changes_no_return_and_shows_every_observation(run: Path, tmp_path: Path) -> None:
    agent, file = Agent.load(run), tmp_path / "folder" / "a.gif"
    found = evaluate_filmed(agent, CATCH, file, filmed=2, episodes=5, seed=3, num_envs=2)
    assert found == evaluate(agent, CATCH, 5, seed=3, num_envs=3)
    film = iio.imread(file, index=None)
    assert len(film) == sum(length + 1 for length in found.lengths[:2])
    # Left: the rendering, enlarged; right: the agent's observation.
    environment = make_rendered(CATCH)
    environment.reset(seed=3)
    expected = environment.render()
    assert isinstance(expected, np.ndarray)
    for left in (8, 8 + 256 + 8):
        middles = (np.arange(24) + 0.5) * 256 / 24
        shown = film[0][48 + middles.astype(int)][:, left + middles.astype(int)][..., :3].astype(int)
        assert np.abs(shown - expected).max() <= 2  # GIF palette
    assert (film[0] != film[1]).any() and (film[0] != film[found.lengths[0] + 1]).any()


def test_the_option_names_a_file_or_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--episodes", "1", "--threads", "1"]
    assert main(["evaluate", str(run), *few, "--video", str(tmp_path / "a.gif")]) == 0
    assert str(tmp_path / "a.gif") in capsys.readouterr().out and len(iio.imread(tmp_path / "a.gif", index=None)) > 20
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments in ([*few, "--video"], ["--video", *few]):
        assert main(["evaluate", str(run), *arguments]) == 0
        said = capsys.readouterr()
        assert "imageio-ffmpeg is not installed, so the video is a GIF" in said.err
        assert str(run / "evaluated.gif") in said.out
        (run / "evaluated.gif").unlink()
    monkeypatch.undo()
    assert main(["evaluate", str(run), *few]) == 0
    assert not list(run.glob("evaluated.*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio leaves pipes open
def test_an_mp4_is_written_where_ffmpeg_is_there(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    assert video_file(tmp_path / "a.mp4") == (tmp_path / "a.mp4", "")
    found = evaluate_filmed(Agent.load(run), CATCH, tmp_path / "a.mp4", filmed=1, episodes=1)
    film = iio.imread(tmp_path / "a.mp4")
    assert len(film) == found.lengths[0] + 1 and iio.immeta(tmp_path / "a.mp4")["fps"] == 10


class Unseen(worldmodel_environments.Catch):
    """Declares rendering but fails."""

    problem: Any = RuntimeError("no display")

    def step(self, action: Any) -> Any:
        raise AssertionError("an episode was run")

    def render(self) -> np.ndarray:
        if self.render_mode is None:
            return super().render()
        if isinstance(self.problem, Exception):
            raise self.problem
        return self.problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": {"render_modes": ["human"]}}, "its render modes are human"),
        ({"metadata": {"render_modes": []}}, "it has no render modes"),
        ({}, "no display"),
        ({"problem": np.zeros((4, 4))}, r"renders shape \(4, 4\) as rgb_array"),
        ({"problem": None}, "renders a NoneType as rgb_array"),
        ({"__init__": lambda self: worldmodel_environments.Catch.__init__(self)}, "cannot be made"),
    ],
)
def test_an_environment_without_rendering_is_refused_before_an_episode_runs(
    run: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    gymnasium.register("wmtest/Unseen-v0", type("Changed", (Unseen,), changes))
    try:
        with pytest.raises(NoVideo, match=words):
            evaluate_filmed(Agent.load(run), "wmtest/Unseen-v0", tmp_path / "a.gif", filmed=1)
    finally:
        del gymnasium.registry["wmtest/Unseen-v0"]
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line_that_says_what_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    echo = "worldmodel_environments:wmtest/Echo-v0"
    cases = {("--video", "a.avi"): "expected a name that ends in .mp4 or .gif", ("--video", "--env", echo): "rgb_array"}
    for arguments, words in cases.items():
        assert main(["evaluate", str(run), *arguments]) == 1
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said
    for option in ("--episodes", "--num-envs", "--video-episodes"):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), option, "0"])
        assert "expected a whole number, at least 1" in " ".join(capsys.readouterr().err.split())
