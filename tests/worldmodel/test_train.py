import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import worldmodel_environments
from test_watch import same
from worldmodel_examples import tiny_options

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.acting.rollout import evaluate
from worldmodel.commands.train import train
from worldmodel.data.replay import Replay, ReplayConfig
from worldmodel.environments.making import make_environments
from worldmodel.environments.registry import EnvironmentFailed, UnknownEnvironment, resolve
from worldmodel.learning.collector import Collector
from worldmodel.learning.learner import Learner
from worldmodel.learning.settings import TrainConfig, saved_config
from worldmodel.learning.trainer import Trainer, TrainingFailed
from worldmodel.model.deciders import policy_sample
from worldmodel.model.world_model import WorldModel
from worldmodel.runs import storage
from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.run import Run, RunError

ECHO = "worldmodel_environments:wmtest/Echo-v0"
NUMBERED = "worldmodel_environments:wmtest/Numbered-v0"
FEW = ("--num-envs", "2", "--prefill", "30", "--train-ratio", "8", "--log-seconds", "0.05", "--threads", "1")
pytestmark = pytest.mark.usefixtures("same_threads")


def options(**more: Any) -> list[str]:
    return [*FEW, *tiny_options(**more)]


def config(env: str = ECHO, **changes: Any) -> TrainConfig:
    from worldmodel.commands.options import train_options

    found, _, _ = train_options(["--env", env, *options()])
    return dataclasses.replace(found, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "echo"
    assert main(["train", "--env", ECHO, "--run", str(folder), "--steps", "120", *options()]) == 0
    return folder


def test_a_run_folder_is_complete_in_itself(trained: Path) -> None:
    run = Run(trained)
    assert saved_config(run).env == ECHO and saved_config(run).model.memory.width == 8
    assert {"observation", "action"} <= run.config["spaces"].keys()
    last = run.metrics[-1]
    assert last["steps"] == 120 and last["updates"] == 90 * 8 // 48 and last["episodes"] == 12
    measured = {name for line in run.metrics for name in line}
    assert measured >= {"loss/model", "milliseconds/collect", "seconds/observe", "seconds/imagine", "replay/filled"}
    assert list((trained / "tensorboard").iterdir())
    assert {path.suffix for path in run.checkpoints[-1].iterdir()} == {".safetensors"}


def test_evaluation_depends_on_the_seeds_alone(trained: Path, tmp_path: Path) -> None:
    agent = Agent.load(trained)
    one, four = (evaluate(agent, ECHO, 10, seed=3, num_envs=n) for n in (1, 4))
    assert one.returns == four.returns and one.lengths == (10,) * 10
    target = tmp_path / "found.json"
    assert main(["evaluate", str(trained), "--episodes", "10", "--seed", "3", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["returns"] == list(one.returns) and found["mean"] == one.mean
    assert evaluate(agent, ECHO, 10, seed=4).returns != one.returns


def test_greedy_of_the_release_before_chooses_a_decider_and_warns(trained: Path) -> None:
    agent = Agent.load(trained)
    with pytest.warns(FutureWarning, match="greedy= is decider= now"):
        found = evaluate(agent, ECHO, 10, seed=3, greedy=True)
    assert found.returns == evaluate(agent, ECHO, 10, seed=3).returns
    with pytest.warns(FutureWarning, match="greedy= is decider= now"):
        found = evaluate(agent, ECHO, 10, seed=3, greedy=False)
    assert found.returns == evaluate(agent, ECHO, 10, seed=3, decider=policy_sample).returns
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="greedy= is decider= now"):
        actions = [agent.act(1, greedy=False)[0] for _ in range(20)]
    torch.manual_seed(0)
    assert actions == [agent.act(1, decider=policy_sample)[0] for _ in range(20)]
    with pytest.raises(TypeError, match="both given"):
        agent.act(1, decider=policy_sample, greedy=True)


def test_an_agent_remembers_in_the_state_that_it_returns(trained: Path, tmp_path: Path) -> None:
    agent, seen = Agent.load(trained), [0, 1, 1, 0, 1, 0, 0, 1]
    whole, state = [], None
    for index, observation in enumerate(seen):
        action, state = agent.act(observation, state)
        whole.append((action, {name: value.clone() for name, value in state.items()}))
        assert action in (0, 1) and np.shape(action) == ()
        if index == 3:
            storage.save(tmp_path / "state.safetensors", state)
    # Another agent continues.
    other, state = Agent.load(trained), storage.load(tmp_path / "state.safetensors")
    for observation, (expected, after) in zip(seen[4:], whole[4:], strict=True):
        action, state = other.act(observation, state)
        assert action == expected
        assert all(torch.equal(state[name], value) for name, value in after.items())
    fresh, reset = agent.act(1)[1], agent.act(1, state, reset=True)[1]
    assert all(torch.equal(fresh[name], value) for name, value in reset.items())
    kept = agent.act(1, state)[1]
    assert not all(torch.equal(fresh[name], value) for name, value in kept.items())
    with pytest.raises(ValueError, match="expected classes below"):
        agent.act(7)


def test_the_trainer_collects_with_its_decider_and_measures_with_its_evaluator() -> None:
    asked: list[int] = []

    def always_one(world_model: WorldModel, state: dict[str, torch.Tensor]) -> torch.Tensor:
        asked.append(len(state["features"]))
        return torch.tensor([0.0, 1.0]).expand(len(state["features"]), 2)

    def steps(trainer: Trainer) -> tuple[dict[str, float], None]:
        return {"measured": float(trainer.steps)}, None

    trainer = Trainer(config(prefill=0), always_one, steps)
    for _ in range(30):
        trainer.iterate()
    num_envs = trainer.config.num_envs
    assert asked == [num_envs] * 20  # the first episode of 10 steps is random: there is nothing to learn from yet
    assert trainer.evaluate() == ({"measured": 30.0 * num_envs}, None)
    assert trainer.collector.state["action"].tolist() == [[0.0, 1.0]] * num_envs
    assert Trainer(config()).evaluate() == ({}, None)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.world_model.state_dict().items()}


class Both:
    def __init__(self, *replays: Replay) -> None:
        self.replays = replays

    def begin(self, *arguments: Any) -> None:
        for replay in self.replays:
            replay.begin(*arguments)

    def add(self, *arguments: Any, **named: Any) -> None:
        for replay in self.replays:
            replay.add(*arguments, **named)


def test_windows_of_long_episodes_continue_the_episode_from_their_stored_state() -> None:
    settings = config(NUMBERED)
    episodes = make_environments(NUMBERED, 2, seed=3)
    model = WorldModel(episodes.observation_spec, episodes.action_spec, settings.model)
    empty = {name: value[0].numpy() for name, value in model.init_state(1).items()}
    specs = episodes.observation_spec, episodes.action_spec
    whole, cut = (Replay(*specs, 2, ReplayConfig(4, window, burn_in), empty) for window, burn_in in ((32, 4), (6, 2)))
    collector = Collector(episodes, Both(whole, cut), model, seed=0)  # type: ignore[arg-type]
    for step in range(90):
        collector.collect(random_rows=2 if step < 30 else 0)

    with torch.no_grad():
        expected, got = features(model, whole, inside=False), features(model, cut, inside=True)
    both = got.keys() & expected.keys()  # unfinished episodes occur in one only
    assert len(both) > 10
    for key in both:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)


def features(model: WorldModel, replay: Replay, inside: bool) -> dict[tuple[float, float], torch.Tensor]:
    """s_t by episode and step, of two epochs."""
    found, start = {}, replay.epochs
    while replay.epochs < start + 2:
        batch, _ = replay.sample()
        seen = model.observe(batch).features
        from_state = batch.is_first.cumsum(1) == 0  # the row has no reset yet
        learned = batch.losses_at & ~batch.is_last & (from_state == inside)
        for row, time in learned.nonzero().tolist():
            episode, step = batch.observations["observation"][row, time, :2].tolist()
            found[episode, step] = seen[row, time]
    return found


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_stored_states_become_those_of_the_newest_weights(tmp_path: Path, burn_in: int) -> None:
    settings = config(NUMBERED)
    episodes = make_environments(NUMBERED, 2, seed=3)
    model = WorldModel(episodes.observation_spec, episodes.action_spec, settings.model)
    empty = {name: value[0].numpy() for name, value in model.init_state(1).items()}
    specs = episodes.observation_spec, episodes.action_spec

    def replay_of(window: int, burn_in: int) -> Replay:
        return Replay(*specs, 2, ReplayConfig(4, window, burn_in), empty)

    whole, cut = replay_of(32, 4), replay_of(6, burn_in)
    collector = Collector(episodes, Both(whole, cut), model, seed=0)  # type: ignore[arg-type]
    for _ in range(90):
        collector.collect()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        expected, stale = features(model, whole, inside=False), features(model, cut, inside=True)
    both = stale.keys() & expected.keys()
    assert max((stale[key] - expected[key]).abs().max() for key in both) > 1e-2
    before, updates = cut.epochs, 0
    while cut.epochs < before + 12:  # a state a chunk later is right after each epoch
        batch, _ = cut.sample(100 + updates)
        if batch.carry:
            with torch.no_grad():
                cut.refresh(model.observe(batch, states_after=[batch.carry]).states_after, 100 + updates)
        updates += 1
    path = tmp_path / "replay.safetensors"
    storage.save(path, cut.state_dict())
    again = replay_of(6, burn_in)
    again.load_state_dict(storage.load(path))
    for replay in (cut, again):
        with torch.no_grad():
            fresh = features(model, replay, inside=True)
        for key in both:
            torch.testing.assert_close(fresh[key], expected[key], rtol=1e-4, atol=1e-5)
    (one, metrics), (other, _) = (replay.sample(100 + updates) for replay in (cut, again))
    assert same(dataclasses.asdict(one), dataclasses.asdict(other)) and metrics["state_age_max"] < updates


def test_an_update_gives_the_states_that_replay_asks_for() -> None:
    trainer = Trainer(config(NUMBERED, replay=ReplayConfig(4, 6, burn_in=2), train_ratio=0.1))
    while not trainer.replay.transitions > 60:
        trainer.iterate()
    batch, _ = trainer.replay.sample()
    assert batch.carry == 3
    with torch.no_grad():
        expected = trainer.world_model.observe(batch, states_after=[3]).states_after
    learner = Learner(trainer.world_model, trainer.config.learner)
    learner.update(batch)
    assert learner.carried is not None and same(learner.carried, expected)
    asked: list[int] = []
    trainer.replay.refresh = lambda states, version: asked.append(version)  # type: ignore[method-assign]
    trainer.update()
    assert asked == [trainer.updates - 1]


@pytest.mark.parametrize(("env", "window"), [(ECHO, 24), (NUMBERED, 6)])
def test_a_run_killed_anywhere_and_resumed_equals_the_uninterrupted_one(tmp_path: Path, env: str, window: int) -> None:
    settings = config(env, seed=5)
    settings = dataclasses.replace(settings, replay=ReplayConfig(4, window, burn_in=2, max_steps=60), train_ratio=16)
    iterations, random = 40, np.random.default_rng(0)
    straight = Trainer(settings)
    for _ in range(iterations):
        straight.iterate()
    run = Run.create(tmp_path / "run", {"train": {}})
    killed, done, saved = Trainer(settings), 0, 0
    for stop in sorted(random.integers(5, iterations, 5).tolist()):
        while done < stop:
            killed.iterate()
            done += 1
            if done % 7 == 0:
                run.save(killed.steps, killed.state_dict())
                saved = done
        torch.manual_seed(99)  # another process has another generator state
        killed, done = Trainer(settings), saved
        if saved:
            killed.load(run)
    while done < iterations:
        killed.iterate()
        done += 1
    assert killed.updates == straight.updates > 5
    assert straight.steps == killed.steps
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(killed).items())
    assert killed.replay.sample()[1] == straight.replay.sample()[1]


def test_an_interrupt_saves_and_resume_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    real = Trainer.iterate

    def interrupted(self: Trainer) -> None:
        real(self)
        if self.steps == 40:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", interrupted)
        before = signal.getsignal(signal.SIGINT)
        run = train(config(steps=100), folder, quiet=True)
        assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in run.checkpoints] == ["000000000040"]
    assert main(["train", "--resume", str(folder)]) == 0
    assert Run(folder).metrics[-1]["steps"] == 100
    assert [line["steps"] for line in Run(folder).metrics] == sorted({line["steps"] for line in Run(folder).metrics})
    assert main(["train", "--resume", str(folder), "--steps", "110"]) == 0
    assert Run(folder).metrics[-1]["steps"] == 110 and saved_config(Run(folder)).steps == 110


def checkpoint(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Run(folder).checkpoints[-1].iterdir())}


def test_nan_in_a_loss_or_an_observation_stops_and_leaves_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train(config(steps=60), folder, quiet=True)
    saved = checkpoint(folder)
    real = Trainer.update

    def poisoned(self: Trainer) -> None:
        with torch.no_grad():
            next(self.world_model.parameters()).fill_(float("nan"))
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", poisoned)
        with pytest.raises(TrainingFailed, match=r"update \d+, after \d+ steps: .*; the newest checkpoint is .*0060"):
            train(config(steps=200), folder, resume=True, quiet=True)
    assert checkpoint(folder) == saved
    monkeypatch.setattr(worldmodel_environments.Echo, "step", lambda self, action: (0, float("nan"), False, False, {}))
    with pytest.raises(EnvironmentFailed, match="a reward is NaN or infinite"):
        train(config(steps=200), tmp_path / "other", quiet=True)
    assert int(Run(tmp_path / "other").checkpoints[-1].name) == 0


def test_mistakes_are_one_line_that_says_what_is_wrong(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(trained), str(damaged)], check=True)
    file = Run(damaged).checkpoints[-1] / "world_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    run = ["--run", str(tmp_path / "new")]
    cases = {
        ("train", *run): "--env is missing",
        ("train", "--env", "CartPol-v1", *run): "no environment 'CartPol-v1'; did you mean CartPole-v1",
        ("train", "--env", "nowhere:Env-v0", *run): "the module 'nowhere' cannot be imported",
        ("train", "--env", ECHO, "--preset", "huge", *run): "no preset 'huge', expected one of",
        ("train", "--env", ECHO, "--device", "abacus", *run): "device is 'abacus'",
        ("train", "--env", ECHO, "--run", str(trained)): "exists and is not empty",
        ("train", "--resume", str(tmp_path)): "is not the folder of a run",
        ("train", "--resume", str(trained), "--run", str(tmp_path / "new")): "give one of them",
        ("train", "--resume", str(trained), "--model.memory.width", "16"): "model.memory.width is 8 there and 16 here",
        ("train", "--resume", str(damaged)): "is damaged",
        ("evaluate", str(damaged)): "is damaged",
        ("evaluate", str(trained), "--env", "Nothing-v3"): "no environment 'Nothing-v3'",
        ("demo", "nothing"): "no demonstration 'nothing'",
        ("paint",): "there is no command 'paint'",
    }
    for arguments, words in cases.items():
        assert main(list(arguments)) != 0, arguments
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, (arguments, said)
        assert len(said.strip().splitlines()) == 1, said
    for arguments, words in {
        ("--num-envs", "0"): "--num-envs is 0, expected a whole number, at least 1",
        ("--replay.burn-in", "400"): "expected at least 0 and below window - 1",
        ("--speed", "1"): "--speed",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["train", "--env", ECHO, *run, *arguments])
        assert stop.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_spaces_that_are_not_supported_are_refused(tmp_path: Path) -> None:
    class Endless(worldmodel_environments.Echo):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(2))

    gymnasium.register("wmtest/Endless-v0", Endless)
    try:
        with pytest.raises(ConfigurationError, match=r"Sequence.*is not supported"):
            train(config("wmtest/Endless-v0", steps=10), tmp_path / "run", quiet=True)
    finally:
        del gymnasium.registry["wmtest/Endless-v0"]
    assert not (tmp_path / "run").exists()


def test_an_environment_that_changed_its_spaces_does_not_go_on(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(folder)], check=True)
    described = json.loads((folder / "config.json").read_text())
    described["spaces"]["action"]["sizes"] = [3]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigurationError, match="is not what it was"):
        train(saved_config(Run(folder)), folder, resume=True, quiet=True)


def test_a_checkpoint_of_another_configuration_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(folder)], check=True)
    described = json.loads((folder / "config.json").read_text())
    described["train"]["model"]["memory"]["width"] = 16
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(RunError, match="weights of another configuration"):
        Agent.load(folder)
    described["train"]["model"]["memory"]["hight"] = 16
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigurationError, match=r"train\.model\.memory has hight, which MemoryConfig does not know"):
        Agent.load(folder)


def test_popgym_goes_by_its_own_names() -> None:
    assert resolve("RepeatPreviousEasy") == "popgym-RepeatPreviousEasy-v0"
    assert resolve("popgym-RepeatFirstHard-v0") == "popgym-RepeatFirstHard-v0"
    with pytest.raises(UnknownEnvironment, match="did you mean RepeatPreviousEasy"):
        resolve("RepeatPreviousEasi")


def test_a_missing_package_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = "is needed to .* and is not installed: pip install 'wmkernels.worldmodel.'"
    for package in ("tyro", "gymnasium", "safetensors"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.setitem(sys.modules, f"{package}.torch", None)
            arguments = ["--env", ECHO, "--steps", "30", "--run", str(tmp_path / package), *options()]
            assert main(["train", *arguments]) == 1
        assert re.search(f"the package '{package}' {words}", capsys.readouterr().err)
        assert not (tmp_path / package).exists()  # refused before any work
    # TensorBoard is optional.
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert main(["train", "--env", ECHO, "--steps", "30", "--run", str(tmp_path / "run"), *options()]) == 0
    assert "metrics.jsonl alone is written" in capsys.readouterr().err
    assert Run(tmp_path / "run").metrics and not (tmp_path / "run" / "tensorboard").exists()
    # gymnasium is missing from the start.
    program = "import sys; sys.modules['gymnasium'] = None; from worldmodel.__main__ import main; main(['train'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert re.search(f"^the package 'gymnasium' {words}", done.stderr), done.stderr


def test_importing_the_kernels_imports_nothing_of_the_world_model() -> None:
    program = "import sys, wmkernels; print(sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    assert not loaded & {"worldmodel", "gymnasium", "tyro", "rich", "tensorboard", "safetensors", "matplotlib"}


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    expected = [
        ("train", "--num-envs", "--train-ratio", "--prefill", "--steps", "--minutes", "--preset", "--replay.window"),
        ("train", "--resume", "--new-episodes", "--unpickle", "--environment-state", "--open-loop-minutes"),
        ("evaluate", "--num-envs", "--episodes", "--sample", "--video", "--video-episodes", "--json"),
        (
            "imagine",
            "--episodes",
            "--context",
            "--horizon",
            "--random",
            "--sample",
            "--sample-latents",
            "--output",
            "--json",
        ),
    ]
    for command, *names in expected:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert not [name for name in ("--device", "--threads", "--seed", *names) if name not in said]
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in ("train", "evaluate", "imagine", "record", "demo"))
