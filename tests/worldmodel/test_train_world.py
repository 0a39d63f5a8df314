"""``train-world``: runs that begin, resume, and learn from recorded episodes."""

import contextlib
import dataclasses
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from worldmodel.__main__ import main
from worldmodel.acting.recording import record
from worldmodel.commands.train_world import with_memory
from worldmodel.learning.world_run import (
    describe,
    described_run,
    load_world_model,
    saved_world_config,
    world_arguments,
)
from worldmodel.model.tokens import TokenConfig
from worldmodel.runs.run import Run

SMALL = ["--train.batch-size", "4", "--train.steps", "12", "--train.updates", "3", "--evaluate-steps", "0"]
ROOMS = ["--env-args", "size=5", "view=3", "bumps=true", "pixels=0"]


class Corridor(gymnasium.Env):
    """A user's environment, without batched worlds: stripes, of which three are in view."""

    observation_space = gymnasium.spaces.Box(0, 3, (3, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)
    cells = np.array([3, 0, 1, 2, 0, 2, 1, 3], np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = 3, 0
        return self.view(), {}

    def view(self):
        return np.tile(self.cells[self.at - 1 : self.at + 2], (3, 1))

    def step(self, action):
        self.at = min(6, max(1, self.at + 2 * int(action) - 1))
        self.steps += 1
        return self.view(), float(self.at == 6), False, self.steps == 20, {}


gymnasium.register("test/Corridor-v0", Corridor)


def test_a_run_resumes_and_refuses_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train-world", *ROOMS, *SMALL, "--run", str(run)]) == 0
    assert Run(run).metrics[-1]["steps"] == 3
    assert main(["train-world", "--resume", str(run), "--train.updates", "5", "--evaluate-steps", "16"]) == 0
    assert json.loads((run / "returning.json").read_text())["steps"] == 16
    assert int(Run(run).load("trainer")["updates"]) == 5
    weights = load_world_model(Run(run), period=21).state_dict()
    assert all(bool(x.isfinite().all()) for x in weights.values())
    capsys.readouterr()
    for options, said in (
        (["--train.batch-size", "8"], "world.train.batch_size is 4 there and 8 here".removeprefix("world.")),
        (["--run", "elsewhere"], "give one of them"),
        (["--record-steps", "80"], "--record-steps records episodes first, and a resumed run has its own"),
        (["--memory", "gru"], "--memory is of a new run, and a resumed one keeps its own"),
        (["--train.lr", "0"], "expected a number, more than 0"),
    ):
        try:
            status = main(["train-world", "--resume", str(run), *options])
        except SystemExit as ended:
            status = int(ended.code)
        error = capsys.readouterr().err
        assert status and said in error and len(error.splitlines()) == 1, error


def test_recorded_episodes_and_any_environment_train_a_world(tmp_path: Path) -> None:
    data = tmp_path / "rooms.npz"
    arguments = {"size": 5, "view": 3, "own_heading": True, "length": 64}
    record("worldmodel/Rooms-v0", data, 200, env_args=arguments)
    named = ["--env-args", "size=5", "view=3", "own_heading=true", "--data", str(data)]
    for motion in ("given", "learned"):
        run = tmp_path / motion
        assert main(["train-world", *named, *SMALL, "--model.place.motion", motion, "--run", str(run)]) == 0
        assert saved_world_config(Run(run)).model.place.turns
    run = tmp_path / "corridor"
    assert main(["train-world", "--env", "test/Corridor-v0", "--record-steps", "80", *SMALL, "--run", str(run)]) == 0
    assert (run / "episodes.npz").is_file()
    assert main(["train-world", "--resume", str(run), "--train.updates", "4"]) == 0
    config = saved_world_config(Run(run)).model
    assert (config.grid, config.classes, config.actions, config.place.motion) == ((3, 3), 4, 2, "learned")


def test_rooms_to_learn_from_are_ones_to_walk_in_unless_said_otherwise(tmp_path: Path) -> None:
    env = "worldmodel/Rooms-v0"
    assert world_arguments(env, {}) == {"bumps": True, "border": False, "size": 15}
    given = {"bumps": False, "border": True, "size": 5, "view": 3}
    assert world_arguments(env, given) == given and world_arguments("test/Corridor-v0", {}) == {}
    pairs = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    assert main(["train-world", "--env-args", *pairs, *SMALL, "--run", str(tmp_path / "given")]) == 0
    assert saved_world_config(Run(tmp_path / "given")).env_args == given
    run = tmp_path / "run"
    assert main(["train-world", *SMALL, "--run", str(run)]) == 0
    config = saved_world_config(Run(run))
    assert config.env_args == world_arguments(env, {}) and config.model.place.period == 15
    assert config.model.place.motion == "learned"
    with contextlib.closing(Run.open_to_write(run)) as older:  # a resumed run keeps its rooms
        older.configure({**older.config, **described_run(dataclasses.replace(config, env_args={}))})
    assert main(["train-world", "--resume", str(run), "--train.updates", "4", "--evaluate-steps", "0"]) == 0
    assert saved_world_config(Run(run)).env_args == {}


def test_recorded_headings_become_moves_in_the_agent_s_own_frame(tmp_path: Path) -> None:
    from worldmodel.data.datasets import EpisodeFile
    from worldmodel.learning.token_trainer import predict
    from worldmodel.learning.view_sources import EpisodeSource
    from worldmodel.model.tokens import TokenWorldModel

    path = tmp_path / "rooms.npz"
    record("worldmodel/Rooms-v0", path, 300, env_args={"own_heading": True, "bumps": True, "length": 100})
    batch = EpisodeSource(EpisodeFile(path), 3, 90, 0).sample(3, 90)
    model = TokenWorldModel(describe("worldmodel/Rooms-v0", {"own_heading": True}).model)
    prediction, _ = predict(model, batch, hindsight=True)
    chosen = prediction.path.posterior.argmax(-1)[:, 1:]
    inside = ~batch.is_first[:, 1:]
    assert bool(inside.any()) and bool(batch.turn.any())
    assert torch.equal(model.motion.candidates[chosen][inside], batch.displacement[inside])
    assert torch.equal(model.motion.turns[chosen][inside], batch.turn[inside])


def test_what_no_world_can_be_made_of_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--env", "CartPole-v1"], "expected one grid of classes or one picture"),
        (["--env", "Pendulum-v1"], "expected one index"),
        (["--memory", "placebo"], "--memory has 'placebo'"),
        (["--memory", ""], "--memory has '', expected"),
        (["--data", str(tmp_path / "none.npz"), "--run", str(tmp_path / "run")], "cannot be read"),
        (["--env-args", "pixels=3", "--model.patch", "4"], "expected multiples of the patch, 4"),
        (["--model.grid", "3", "3"], "--model.grid is (3, 3), expected (5, 5), as worldmodel/Rooms-v0 has"),
        (["--model.actions", "2"], "--model.actions is 2, expected 4"),
        (["--model.classes", "4"], "--model.classes is 4, expected 9"),
        (["--model.patch", "4"], "--model.patch is 4, expected 0"),
        (["--record-steps", "80"], "and worldmodel/Rooms-v0 has batched worlds"),
        (["--record-steps", "80", "--data", str(tmp_path / "none.npz")], "and --data names some that are there"),
        (["--env-args", "size=520"], "--model.place.period is 520, expected at most 512, as no world is larger"),
    ):
        named = [] if "--run" in arguments else ["--run", str(tmp_path / "run")]
        assert main(["train-world", *arguments, *SMALL, *named]) == 1
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1, error
        assert not (tmp_path / "run").exists(), "nothing is left of what was refused"
    record("worldmodel/Rooms-v0", data := tmp_path / "rooms.npz", 20)
    for name, value, said in (
        ("displacement", np.zeros((21, 3), np.float32), "has displacement (21, 3), expected (steps, 2)"),
        ("elapsed", np.full(21, -5, np.float32), "expected times of at least 0"),
    ):
        np.savez(tmp_path / "other.npz", **{**np.load(data), name: value})
        assert main(["train-world", "--data", str(tmp_path / "other.npz"), *SMALL, "--run", str(tmp_path / "run")]) == 1
        assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
    pictures = ["--env-args", "pixels=2", "view=3", "size=4", "--model.classes", "16", "--run", str(tmp_path / "run")]
    assert main(["train-world", *pictures, *SMALL]) == 0, "kinds of patches are the user's choice"
    assert with_memory(TokenConfig(), "place,gru").blocks[0].kind == "gru"
    assert with_memory(TokenConfig(), "gru*2").place is None
