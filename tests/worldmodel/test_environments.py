"""Environments that raise, that change what they are given, or that return something else than gymnasium's do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import worldmodel_environments
from gymnasium import spaces

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.acting.rollout import evaluate, evaluate_filmed
from worldmodel.commands.options import environment_arguments, train_options
from worldmodel.commands.train import train
from worldmodel.data.spaces import ActionSpec
from worldmodel.environments.registry import EnvironmentFailed, UnknownEnvironment, make
from worldmodel.environments.single import make_single
from worldmodel.environments.vector import VectorEnvironment, random_seeds
from worldmodel.learning.settings import TrainConfig, saved_config
from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.run import Run

SMALL = ("--replay.window", "24", "--replay.batch-size", "2", "--replay.burn-in", "4", "--model.perception.hidden", "8")
FEW = ("--prefill", "20", "--train-ratio", "8", "--threads", "1")
pytestmark = pytest.mark.usefixtures("same_threads")


class Plain(gymnasium.Env[Any, Any]):
    """Returns ``reward``; episodes of 5 steps. One observation array, used again in every step of every instance."""

    seen = np.zeros(2, np.float32)

    def __init__(self, reward: Any = 1.0) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-2, 2, (2,), np.float32)
        self.reward = reward

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        self.value = float(self.np_random.integers(100))
        return self._observation(), {}

    def _observation(self) -> np.ndarray:
        self.seen[:] = self.value, self.steps
        return self.seen

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.steps += 1
        self.value += float(action[0])
        action += 100.0
        return self._observation(), self.reward, self.steps == 5, False, {}


class SomeSeeds(worldmodel_environments.Echo):
    """Two episodes in three raise, in ``where``."""

    where = "step"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.bad = bool((seed or 0) % 3)
        if self.bad and self.where == "reset":
            raise ZeroDivisionError("no\nlevel")
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        if self.bad and self.where == "step":
            raise ZeroDivisionError("no\nlevel")
        if self.bad and self.where == "reward" and len(self.seen) > 3:
            reward = float("nan")
        return 7 if self.bad and self.where == "observation" else observation, reward, *rest  # type: ignore[return-value]


def config(name: str, **changes: Any) -> TrainConfig:
    found, _, _ = train_options(["--env", name, *FEW, *SMALL])
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize(("where", "num_envs"), [("step", 1), ("observation", 2), ("reward", 2), ("reset", 2)])
def test_a_run_goes_on_after_episodes_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str, num_envs: int
) -> None:
    monkeypatch.setattr(SomeSeeds, "where", "never" if where == "reset" else where)
    monkeypatch.setitem(
        gymnasium.registry, "wmtest/Some-v0", gymnasium.envs.registration.EnvSpec("wmtest/Some-v0", SomeSeeds)
    )
    settings, folder = config("wmtest/Some-v0", num_envs=num_envs, steps=26), tmp_path / "run"
    failed = 0
    real = VectorEnvironment._restart

    def first_resets_work(self: VectorEnvironment) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(SomeSeeds, "where", "never")
            real(self)
        SomeSeeds.where = where

    monkeypatch.setattr(VectorEnvironment, "_restart", first_resets_work)
    for _ in range(40):
        try:
            train(settings, folder, resume=failed > 0)
            break
        except EnvironmentFailed as error:
            failed, said = failed + 1, str(error)
            assert f"saved; --resume {folder} goes on with another episode" in said and "\n" not in said
            if where in ("step", "reset"):
                assert f"ZeroDivisionError: no level ({__file__}:" in said and f", in {where})" in said
    run = Run(folder)
    assert failed >= 1 and run.metrics[-1]["steps"] >= 26
    steps = [line["steps"] for line in run.metrics]
    assert steps == sorted(steps) and run.load("collector")["episodes"]["failures"] >= failed
    assert "; another began in the place of each" in capsys.readouterr().err


def test_a_transition_beside_a_failure_is_kept() -> None:
    episodes = VectorEnvironment(
        [worldmodel_environments.Numbered(40, fail_at=3), worldmodel_environments.Numbered(40)],
        lambda number: 4 + number,
    )
    action = np.array([1, 2])
    with pytest.raises(
        EnvironmentFailed, match=r"step 3 .* ArithmeticError: the simulator broke \(.*:\d+, in step"
    ) as e:
        for _ in range(3):
            episodes.step(action)
    assert e.value.happened.rows.tolist() == [1]
    assert episodes.observations["observation"][:, 1].tolist() == [2, 3] and episodes.failed == {0}
    again = VectorEnvironment([worldmodel_environments.Numbered(40) for _ in "ab"], lambda number: 4 + number)
    again.load_state_dict(episodes.state_dict())
    assert again.observations["observation"][:, 1].tolist() == [0, 3]
    assert again.seeds == [6, 5] and again.is_first.tolist() == [True, False] and again.failures == 1


def test_arrays_that_environments_use_again_or_change_are_copied() -> None:
    made = [VectorEnvironment([Plain(), Plain()], random_seeds(0)) for _ in "ab"]
    assert made[0].observations["observation"][0, 0] != made[0].observations["observation"][1, 0]
    action = np.array([[0.5, 0.0], [-0.25, 0.0]], np.float32)
    begun = made[0].observations["observation"][:, 0].copy()
    happened = made[0].step(action)
    np.testing.assert_allclose(happened.next_observations["observation"][:, 0] - begun, [1.0, -0.5])
    made[0].step(action)
    saved = made[0].state_dict()
    assert np.abs(saved["actions"][0]).max() <= 2
    made[1].load_state_dict(saved)  # raises if the environments do not repeat themselves
    assert np.abs(saved["actions"][0]).max() <= 2


@pytest.mark.parametrize(
    "reward",
    [
        1,
        True,
        np.array([1.0]),
        np.array([[1]]),
        np.float64(1),
        np.bool_(True),
        torch.tensor(1.0, requires_grad=True),
        [1.0],
    ],
    ids=repr,
)
def test_a_reward_is_a_number_in_any_form(reward: Any) -> None:
    happened = VectorEnvironment([Plain(reward)], random_seeds(0)).step(np.zeros((1, 2), np.float32))
    assert happened.rewards.tolist() == [1.0] and happened.rewards.dtype == np.float32


OLD_STEP = "step returned a tuple of 4, expected .*before 0.26"
NO_REWARD = "reward is None, expected one number"


@pytest.mark.parametrize(
    ("method", "returned", "words"),
    [
        ("step", (np.zeros(2, np.float32), 1.0, False, {}), OLD_STEP),
        ("step", None, "step returned None"),
        ("step", (np.zeros(2, np.float32), None, False, False, {}), NO_REWARD),
        ("step", (np.zeros(2, np.float32), np.zeros(2), False, False, {}), r"reward is ndarray of shape \(2,\)"),
        ("step", (np.zeros(2, np.float32), np.inf, False, False, {}), "a reward is NaN or infinite"),
        ("step", (np.zeros(2, np.float32), 1.0, None, False, {}), "terminated is None"),
        ("step", (np.zeros(3, np.float32), 1.0, False, False, {}), "step 1|observation 1"),
        ("reset", np.zeros(2, np.float32), r"reset returned ndarray of shape \(2,\), expected .*before 0.26"),
        ("reset", (np.zeros(2), np.zeros(2)), "reset returned a tuple of 2"),
    ],
)
def test_what_an_environment_returns_amiss_is_one_line(method: str, returned: Any, words: str) -> None:
    environment = Plain()
    setattr(environment, method, lambda *_, **__: returned)
    with pytest.raises(EnvironmentFailed, match=words) as error:
        VectorEnvironment([environment], random_seeds(0)).step(np.zeros((1, 2), np.float32))
    assert "\n" not in str(error.value)


def test_a_reset_without_seed_is_told_how_it_should_be() -> None:
    environment = Plain()
    environment.reset = lambda: (np.zeros(2, np.float32), {})  # type: ignore[method-assign, assignment]
    with pytest.raises(EnvironmentFailed, match=r"expected|reset\(self, \*, seed=None, options=None\)"):
        VectorEnvironment([environment], random_seeds(0))


def test_an_environment_that_cannot_be_made_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise KeyError("level")

    spec = gymnasium.envs.registration.EnvSpec("wmtest/Broken-v0", broken)
    monkeypatch.setitem(gymnasium.registry, "wmtest/Broken-v0", spec)
    with pytest.raises(EnvironmentFailed, match=rf"cannot be made: KeyError: 'level' \({__file__}:\d+, in broken\)"):
        make("wmtest/Broken-v0")


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2), spaces.Text(3)]),
        spaces.Dict(a=spaces.Sequence(spaces.Discrete(2))),
        spaces.Dict({1: spaces.Discrete(2)}),
        spaces.Tuple([]),
        spaces.Text(3),
        spaces.Box(-np.inf, 1, (2,)),
    ],
    ids=repr,
)
def test_actions_of_other_spaces_are_told_what_to_do(space: spaces.Space[Any]) -> None:
    with pytest.raises(ValueError, match=r"gymnasium.ActionWrapper") as error:
        ActionSpec.from_space(space)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [("--env-args", "length=4", "lag=0"), ("--env-args", '{"length": 4, "lag": 0}')])
def test_arguments_reach_the_environment_and_stay_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...]
) -> None:
    folder, json_file = tmp_path / "run", tmp_path / "told.json"
    env = ("--env", "wmtest/Echo-v0")
    assert main(["train", *env, *given, "--run", str(folder), "--steps", "30", "--num-envs", "2", *FEW, *SMALL]) == 0
    assert saved_config(Run(folder)).env_args == {"length": 4, "lag": 0}
    assert main(["train", "--resume", str(folder), "--steps", "40"]) == 0
    assert saved_config(Run(folder)).env_args == {"length": 4, "lag": 0}
    for more, length in (((), 4), (("--env-args", "length=3"), 3), (env, 10)):
        options = ("--episodes", "2", "--random-episodes", "0", "--json", str(json_file))
        assert main(["evaluate", str(folder), *options, *more]) == 0
        assert json.loads(json_file.read_text())["lengths"] == [length] * 2
    capsys.readouterr()
    assert main(["train", "--resume", str(folder), "--env-args", "length=5"]) != 0
    assert "env_args.length is 4 there and 5 here" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--env-args", "colour=red"]) != 0
    said = capsys.readouterr().err
    assert "unexpected keyword argument 'colour'" in said and len(said.splitlines()) == 1


def test_arguments_in_python_choose_the_preset_and_are_plain() -> None:
    assert TrainConfig(env="wmtest/Catch-v0", env_args={"side": 32}).env_args == {"side": 32}
    with pytest.raises(ConfigurationError, match=r"env_args.*plain values"):
        TrainConfig(env="wmtest/Echo-v0", env_args={"lag": object()})
    for amiss in ("lag", "{lag", "=3"):
        with pytest.raises(ConfigurationError, match="--env-args"):
            environment_arguments([amiss])


def test_functions_classes_and_objects_are_saved_by_name(tmp_path: Path) -> None:
    echo = "worldmodel_environments:Echo"
    assert make(echo, lag=2, length=3).get_wrapper_attr("lag") == 2
    config_of = lambda env: TrainConfig(env=env, env_args={"lag": 2}, preset="popgym")  # noqa: E731
    assert config_of(worldmodel_environments.Echo).env == echo == TrainConfig(env=echo, preset="popgym").env
    made = gymnasium.make("wmtest/Echo-v0", length=7, max_episode_steps=5)
    for given in (made, made.spec):
        found = config_of(given)
        assert (found.env, found.env_args) == ("wmtest/Echo-v0", {"length": 7, "max_episode_steps": 5, "lag": 2})
    for amiss in (3, gymnasium.vector.SyncVectorEnv([worldmodel_environments.Echo])):
        with pytest.raises(ConfigurationError, match=r"expected a name, a function or class that makes an environment"):
            config_of(amiss)
    assert make("worldmodel_environments:slow_echo", lag=3).get_wrapper_attr("lag") == 3
    assert config_of(worldmodel_environments.slow_echo).env == "worldmodel_environments:slow_echo"
    for nothing_that_makes_one in (
        "builtins:tuple",
        "subprocess:getoutput",
        "gymnasium:make",
        "gymnasium.envs.registration:make",
        "worldmodel.environments.registry:make",
        "worldmodel_environments:gymnasium.make",
        "worldmodel_environments:undeclared",
    ):
        with pytest.raises(UnknownEnvironment, match=r"neither a class of gymnasium\.Env nor a function"):
            make(nothing_that_makes_one)
    with pytest.raises(UnknownEnvironment, match="there is no environment"):
        make("worldmodel_environments:nothing")
    settings = dataclasses.replace(config("wmtest/Echo-v0"), env=worldmodel_environments.Echo, steps=25, num_envs=2)
    train(settings, tmp_path / "run", quiet=True)
    assert saved_config(Run(tmp_path / "run")).env == echo
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--random-episodes", "0"]) == 0


@pytest.mark.parametrize("mode", list(gymnasium.vector.AutoresetMode))
def test_what_exists_as_a_vector_only_is_evaluated_as_the_single_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: gymnasium.vector.AutoresetMode
) -> None:
    def together(num_envs: int, length: int = 6) -> Any:
        made = [lambda: worldmodel_environments.Echo(length=length)] * num_envs
        return gymnasium.vector.SyncVectorEnv(made, autoreset_mode=mode)

    spec = gymnasium.envs.registration.EnvSpec("wmtest/Both-v0", vector_entry_point=together)
    monkeypatch.setitem(gymnasium.registry, spec.id, spec)
    found = []
    for name in ("worldmodel_environments:Echo", "wmtest/Both-v0"):
        episodes = VectorEnvironment([make_single(name, length=6) for _ in "ab"], lambda number: number)
        for step in range(20):
            happened = episodes.step(np.array([step % 2, 1]))
            seen = happened.next_observations["observation"].ravel().tolist()
            found.append((seen, happened.rewards.tolist(), happened.terminated.tolist(), list(episodes.episode_ids)))
    assert found[:20] == found[20:]


def test_an_object_without_a_name_is_trained_on_and_resumed_with_it_given_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = 7

    def closure() -> gymnasium.Env[Any, Any]:
        return worldmodel_environments.Echo(length=length)

    instance = gymnasium.wrappers.TransformReward(worldmodel_environments.Echo(length=length), abs)
    finished = []
    for env in (lambda: closure(), instance):
        settings = dataclasses.replace(config("wmtest/Echo-v0", num_envs=2), env=env)
        assert settings.env.startswith("object/")
        folder = tmp_path / str(len(finished))
        train(dataclasses.replace(settings, steps=24), folder)
        said = capsys.readouterr().err
        line = next(line for line in said.splitlines() if "is a Python object" in line)
        assert f"train(saved_config(Run('{folder}')), '{folder}', resume=True, env=...)" in line
        assert "python -m worldmodel" not in said
        saved = dataclasses.replace(saved_config(Run(folder)), steps=34)
        assert main(["evaluate", str(folder)]) == 1 == main(["train", "--resume", str(folder)])
        told = capsys.readouterr().err.splitlines()
        assert ["is a Python object, which only the program that gave it has" in line for line in told] == [True, True]
        with pytest.raises(UnknownEnvironment, match="resume=True, env=...) resumes its run".replace(")", r"\)")):
            train(saved, folder, resume=True)
        train(saved, folder, resume=True, env=env, quiet=True)
        assert evaluate(Agent.load(folder), env, 2).lengths == (7, 7)
        finished.append(Run(folder).load("world_model"))
    assert all(torch.equal(value, finished[0][name]) for name, value in finished[1].items())
    wrapped = gymnasium.wrappers.TransformReward(gymnasium.make("wmtest/Echo-v0", length=3), abs).spec
    assert isinstance(make(wrapped), gymnasium.wrappers.TransformReward)
    with pytest.raises(EnvironmentFailed, match="is an instance, which takes no arguments"):
        TrainConfig(env=instance, env_args={"length": 3})
    locked = worldmodel_environments.Locked()
    with pytest.raises(EnvironmentFailed, match=r"cannot be copied \(TypeError: .*: give a function that makes it"):
        TrainConfig(env=locked)


class Breaks(worldmodel_environments.Catch):
    """Raises in step 2 of every third episode, by seed, or in its reset."""

    where = "step"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.bad, self.steps = (seed or 0) % 3 == 1, 0
        if self.bad and self.where == "reset":
            raise ZeroDivisionError("no\nlevel")
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if (self.bad and self.steps == 2) or self.where == "always":
            raise ZeroDivisionError("no\nlevel")
        return super().step(action)


@pytest.fixture(scope="module")
def catch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    env = ("--env", "wmtest/Catch-v0", "--num-envs", "2")
    folder = tmp_path_factory.mktemp("runs") / "catch"
    assert main(["train", *env, "--run", str(folder), "--steps", "24", *FEW, *SMALL]) == 0
    return folder


@pytest.mark.parametrize("where", ["step", "reset"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_evaluate_goes_on_after_episodes_that_fail(
    catch: Path, monkeypatch: pytest.MonkeyPatch, where: str, num_envs: int
) -> None:
    monkeypatch.setattr(Breaks, "where", where)
    agent = Agent.load(catch)
    made = [Breaks(balls=1) for _ in range(num_envs)]
    found = evaluate(agent, "Breaks", 7, seed=3, environments=made)  # seeds 4 and 7 fail
    whole = [evaluate(agent, "Catch", 1, seed=seed, environments=[Breaks(balls=1)]) for seed in (3, 5, 6, 8, 9)]
    assert found.returns == tuple(one.returns[0] for one in whole)
    assert found.lengths == tuple(one.lengths[0] for one in whole)
    assert len(found.failures) == 2 and found.to_json()["failures"] == list(found.failures)
    for line, seed in zip(found.failures, (4, 7), strict=True):
        step = 2 if where == "step" else 0
        assert f"{where} {step} of the episode with seed {seed}: ZeroDivisionError: no level ({__file__}:" in line
    with pytest.raises(EnvironmentFailed, match=r"with seed 1: ZeroDivisionError: no level \(.*, in "):
        evaluate(agent, "Breaks", 1, seed=1, environments=[Breaks()])


def test_commands_keep_what_finished_and_say_what_failed(
    catch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        gymnasium.registry,
        "wmtest/Breaks-v0",
        gymnasium.envs.registration.EnvSpec("wmtest/Breaks-v0", Breaks, kwargs={"balls": 1}),
    )
    told, place = tmp_path / "told.json", f"ZeroDivisionError: no level ({__file__}:"
    env = ("--env", "wmtest/Breaks-v0", "--json", str(told))
    assert main(["evaluate", str(catch), *env, "--episodes", "3", "--video", str(tmp_path / "a.gif")]) == 1
    said = capsys.readouterr()
    assert "over 2 episodes" in said.out and (tmp_path / "a.gif").exists()
    assert (
        said.err.count("\n") == 1 and place in said.err and "2 episodes failed and are left out; the first" in said.err
    )
    assert len(json.loads(told.read_text())["returns"]) == 2
    assert main(["imagine", str(catch), *env, "--episodes", "2", "--output", str(tmp_path / "b")]) == 1
    said = capsys.readouterr()
    assert place in said.err and said.err.count("\n") == 1 and (tmp_path / "b.png").exists()
    found = json.loads(told.read_text())
    assert len(found["episodes"]) == 1 == len(found["failures"])
    monkeypatch.setattr(Breaks, "where", "always")
    for command in ("evaluate", "imagine"):
        assert main([command, str(catch), *env]) == 1
        said = capsys.readouterr()
        assert place in said.err and said.err.count("\n") == 1


class Dims(worldmodel_environments.Catch):
    """Rendering, but no observation, fails in step 9."""

    problem: Any = None

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**options)
        return super().render(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.shown, self.render_mode = self.render_mode, None
        result = super().step(action)
        self.render_mode = self.shown
        return result

    def render(self) -> Any:
        picture = super().render()
        if self.render_mode is None or self.y < 18:
            return picture
        if isinstance(self.problem, Exception):
            raise self.problem
        return self.problem(picture) if callable(self.problem) else self.problem


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (RuntimeError("lost\ncontext"), f"RuntimeError: lost context ({__file__}:"),
        (None, "render() returned a NoneType, expected (height, width, 3)"),
        (lambda picture: picture[:12], "render() returned shape (12, 24, 3) and dtype uint8, expected (24, 24, 3)"),
        (lambda picture: picture.astype(np.float32), "dtype float32, expected (24, 24, 3) and uint8 as at first"),
    ],
)
def test_a_film_ends_where_rendering_fails_and_the_evaluation_goes_on(
    catch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    problem: Any,
    words: str,
) -> None:
    monkeypatch.setattr(Dims, "problem", staticmethod(problem) if callable(problem) else problem)
    spec = gymnasium.envs.registration.EnvSpec("wmtest/Dims-v0", Dims, kwargs={"balls": 1})
    monkeypatch.setitem(gymnasium.registry, spec.id, spec)
    found = evaluate_filmed(Agent.load(catch), "wmtest/Dims-v0", tmp_path / "a.gif", filmed=1, episodes=2)
    assert len(found.returns) == 2 and not found.failures
    (line,) = caplog.messages
    assert line.startswith("the video ends after 9 frames, at step 9 of the episode with seed 0: ") and words in line
    assert len(iio.imread(tmp_path / "a.gif", index=None)) == 9
