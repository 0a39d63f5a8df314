"""The policy is evaluated while it is trained, which changes nothing; the best weights are kept; curves are drawn."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from test_watch import same

from worldmodel.__main__ import main
from worldmodel.acting import evaluator as module
from worldmodel.acting.agent import Agent
from worldmodel.acting.evaluator import PolicyEvaluator, metrics_of
from worldmodel.acting.rollout import Evaluated, RandomPolicy, evaluate
from worldmodel.commands import plot
from worldmodel.commands import train as training
from worldmodel.commands.options import train_options
from worldmodel.commands.train import train
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.learning.settings import saved_config
from worldmodel.learning.trainer import Trainer
from worldmodel.model.deciders import SampledPolicy, policy_sample
from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.run import Run, RunError

ECHO = "worldmodel_environments:wmtest/Echo-v0"
CATCH = "worldmodel_environments:wmtest/Catch-v0"
SMALL = ("--replay.window", "24", "--replay.batch-size", "2", "--replay.burn-in", "4", "--model.perception.hidden", "8")
FEW = ("--num-envs", "2", "--prefill", "60", "--train-ratio", "8", "--threads", "1", "--log-seconds", "0.001")
pytestmark = pytest.mark.usefixtures("same_threads")


class Often(PolicyEvaluator):
    """Evaluates at every second opportunity, and at the end."""

    opportunities = 0

    def is_time(self, seconds: float) -> bool:
        self.opportunities += 1
        return self.opportunities % 2 == 1

    def is_time_at_the_end(self, seconds: float) -> bool:
        return True


def settings(**changes: Any) -> Any:
    found, _, _ = train_options(["--env", ECHO, "--steps", "120", "--open-loop-minutes", "0", *FEW, *SMALL])
    return dataclasses.replace(found, eval_episodes=3, **changes)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PolicyEvaluator", Often)
        return train(settings(), tmp_path_factory.mktemp("runs") / "evaluated", quiet=True)


def test_a_run_is_the_same_however_often_its_policy_is_evaluated(evaluated: Run, tmp_path: Path) -> None:
    never = train(settings(eval_minutes=0), tmp_path / "never", quiet=True)
    assert not any("eval/return" in line for line in never.metrics) and never.best is None
    assert sum("eval/return" in line for line in evaluated.metrics) > 3
    for part in ("world_model", "learner", "replay", "collector"):
        assert same(never.load(part), evaluated.load(part)), part
    assert same(never.load("trainer")["random"], evaluated.load("trainer")["random"])


def test_the_weights_of_the_best_evaluation_are_kept_and_have_its_returns(evaluated: Run) -> None:
    measured = [line for line in evaluated.metrics if "eval/return" in line]
    assert all(line["eval/low"] <= line["eval/return"] <= line["eval/high"] for line in measured)
    best, saved = max(line["eval/return"] for line in measured), evaluated.best_evaluation
    assert saved is not None and saved["eval/return"] == best
    assert saved["steps"] == [line["steps"] for line in measured if line["eval/return"] == best][-1]
    agent = Agent.load(evaluated.folder, best=True)
    found = PolicyEvaluator(settings(), agent.world_model).look(agent.world_model, 1e3)
    assert found is not None and list(found.returns) == saved["returns"]
    assert metrics_of(found) == {name: saved[name] for name in metrics_of(found)}


def test_the_best_goes_on_over_a_resume_and_the_commands_use_it(
    evaluated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "PolicyEvaluator", Often)
    monkeypatch.setattr(Often, "look", lambda *arguments: Evaluated((-5.0,), (3,)))
    folder = tmp_path / "run"
    train(settings(), folder, quiet=True)
    saved = Run(folder).best_evaluation
    assert saved is not None and saved["eval/return"] == -5.0
    for mean, kept in ((-6.0, -5.0), (-4.0, -4.0)):
        monkeypatch.setattr(Often, "look", lambda *arguments, mean=mean: Evaluated((mean,), (3,)))
        steps = int(Run(folder).metrics[-1]["steps"]) + 20
        train(settings(steps=steps), folder, resume=True, quiet=True)
        saved = Run(folder).best_evaluation
        assert saved is not None and saved["eval/return"] == kept
    monkeypatch.undo()
    target = tmp_path / "found.json"
    for best in ((), ("--best",)):
        assert main(["evaluate", str(evaluated.folder), "--episodes", "4", "--json", str(target), *best]) == 0
        agent = Agent.load(evaluated.folder, best=bool(best))
        found = json.loads(target.read_text())
        assert found["returns"] == list(evaluate(agent, ECHO, 4).returns)
        low, high = found["interval"]
        assert low <= found["mean"] <= high and f"[{low:.4f}, {high:.4f}]" in capsys.readouterr().out


def test_a_run_without_evaluations_has_no_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(settings(eval_minutes=0), tmp_path / "run", quiet=True)
    assert main(["evaluate", str(run.folder), "--best"]) == 1
    assert "has no best checkpoint: training evaluates every --eval-minutes" in capsys.readouterr().err
    run.save_best({}, {"eval/return": "high"})
    with pytest.raises(RunError, match="is damaged: it has no eval/return or held_out/action"):
        _ = run.best_evaluation


def test_a_kill_while_the_best_is_replaced_leaves_one(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {"train": {}})
    for mean in (1.0, 2.0):
        run.save_best({"world_model": {"a": torch.full((2,), mean)}}, {"eval/return": mean})
    assert sorted(path.name for path in run.folder.iterdir() if path.name.startswith("best")) == ["best"]
    (run.folder / "best").rename(run.folder / "best.old.partial")  # as if killed before the new one had its name
    again = Run.at_best(run.folder)
    assert again.best_evaluation == {"eval/return": 2.0}
    assert again.load_tensors("world_model")["a"].tolist() == [2.0, 2.0]
    again.save_best({"world_model": {"a": torch.zeros(2)}}, {"eval/return": 3.0})
    assert again.best == run.folder / "best" and again.best_evaluation == {"eval/return": 3.0}
    shutil.copytree(run.folder / "best", run.folder / "best.old.partial")  # as if killed before the old one went
    again.save_best({"world_model": {"a": torch.ones(2)}}, {"eval/return": 4.0})
    assert again.best_evaluation == {"eval/return": 4.0} and not (run.folder / "best.old.partial").exists()


def test_an_evaluation_that_takes_too_long_is_broken_off_and_waits_for_twice_the_time() -> None:
    trainer = Trainer(settings())
    before = torch.get_rng_state()
    evaluator = PolicyEvaluator(settings(), trainer.world_model)
    evaluator.begin(0.0)
    evaluator.took(module.ALLOWANCE, 0.0)  # nothing is left
    assert evaluator.look(trainer.world_model, 0.0) is None
    assert not evaluator.is_time_at_the_end(30.0) and evaluator.look(trainer.world_model, 1e4, lambda: True) is None
    found = evaluator.look(trainer.world_model, 1e6)
    assert found is not None and len(found.returns) == 3 and trainer.world_model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_training_goes_on_without_an_evaluation_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*unused: Any, **named: Any) -> Any:
        raise EnvironmentFailed("there is one licence")

    monkeypatch.setattr(training, "PolicyEvaluator", Often)
    monkeypatch.setattr(module, "make_single", fails)
    run = train(settings(), tmp_path / "run")
    assert run.metrics[-1]["steps"] == 120 and run.best is None
    said = [line for line in capsys.readouterr().err.splitlines() if "licence" in line]
    assert said == ["the policy cannot be evaluated, and training goes on without: there is one licence"]


def test_another_environment_is_evaluated_in_and_needs_the_same_spaces(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"eval_env .*Catch-v0 is not what training sees: observation"):
        train(settings(eval_env=CATCH), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigurationError, match="eval_env_args are arguments of eval_env, which is not given"):
        settings(eval_env_args={"length": 3})
    longer = settings(eval_env=ECHO, eval_env_args={"length": 17})
    found = PolicyEvaluator(longer, Trainer(longer).world_model).look(Trainer(longer).world_model, 1e3)
    assert found is not None and found.lengths == (17, 17, 17)


def test_random_actions_alone_are_not_evaluated() -> None:
    assert training.policy_evaluator(Trainer(settings())) is not None
    assert training.policy_evaluator(Trainer(settings(random_envs=2))) is None
    assert training.policy_evaluator(Trainer(settings(random_envs=2, eval_env=ECHO))) is not None


def test_sampled_and_random_episodes_are_the_same_beside_any_others(evaluated: Run) -> None:
    agent = Agent.load(evaluated.folder)
    for decider in (policy_sample, RandomPolicy(agent.action_spec)):
        one, three, four = (evaluate(agent, ECHO, 7, seed=3, num_envs=n, decider=decider) for n in (1, 3, 4))
        assert one.returns == three.returns == four.returns and len(set(one.returns)) > 1
        later = evaluate(agent, ECHO, 5, seed=5, num_envs=2, decider=decider)
        assert later.returns == one.returns[2:]


def test_where_all_actions_are_random_the_policy_is_not_asked() -> None:
    def never(world_model: Any, state: Any) -> torch.Tensor:
        raise AssertionError

    trainer = Trainer(settings(), never)
    while trainer.steps < 60:
        trainer.iterate()
    with pytest.raises(AssertionError):
        trainer.iterate()
    state, actions = trainer.collector.state, trainer.collector.state["action"]
    assert (actions.sum(-1) == 1).all() and state["features"].abs().sum() > 0


def test_the_interval_is_of_the_mean() -> None:
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        low, high = Evaluated(tuple(random.normal(3.0, 2.0, 20)), (1,) * 20).interval
        inside += low <= 3.0 <= high
    assert 175 <= inside <= 198  # of 20 returns, the bootstrap covers about 93%
    assert Evaluated((2.0,) * 5, (1,) * 5).interval == (2.0, 2.0)
    assert Evaluated((2.0,), (1,)).interval is None and "eval/low" not in metrics_of(Evaluated((2.0,), (1,)))


def run_of(folder: Path, lines: list[dict[str, float]], **train: Any) -> str:
    run = Run.create(folder, {"train": {"env": "made:Up-v0", "seed": 0, **train}})
    for line in lines:
        run.log(line)
    run.close()
    return str(folder)


def test_curves_of_runs_are_named_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(height: float) -> list[dict[str, float]]:
        return [
            {"steps": step, "updates": step // 2, "seconds": step / 10, "eval/return": height * step, "loss/model": 1.0,
             "eval/low": height * step - 1, "eval/high": height * step + 1}
            for step in (100, 200, 400)
        ]  # fmt: skip

    folders = [
        run_of(tmp_path / "a", lines(1.0), model={"width": 8}),
        run_of(tmp_path / "b", lines(3.0), model={"width": 8}, seed=1),
        run_of(tmp_path / "c", lines(2.0), model={"width": 16}),
    ]
    picture = tmp_path / "curves.png"
    assert main(["plot", *folders, "--output", str(picture), "--x", "minutes"]) == 0
    assert picture.stat().st_size > 10_000 and capsys.readouterr().out == f"{picture}\n"
    runs = [Run(folder) for folder in folders]
    assert plot.labels_of(runs) == ["Up-v0, model.width=8", "Up-v0, model.width=8", "Up-v0, model.width=16"]
    assert plot.labels_of(runs[:2]) == ["Up-v0", "Up-v0"]
    sizes = {name: 8 for name in "wxyz"}
    many = [run_of(tmp_path / f"m{seed}", lines(1.0), model=sizes, seed=seed) for seed in (0, 1)]
    many.append(run_of(tmp_path / "other", lines(1.0), model={**sizes, **dict.fromkeys("wxyz", 9)}))
    labels = plot.labels_of([Run(folder) for folder in many])
    assert labels[0] == labels[1] != labels[2] and labels[0].endswith("1 more: m0")
    elsewhere = run_of(tmp_path / "e", lines(1.0), model={"width": 8}, env="another:Up-v0")
    assert len(set(plot.labels_of([runs[0], Run(elsewhere)]))) == 2
    curve = plot.curve_of(runs[1], "eval/return", "minutes", "b")
    np.testing.assert_allclose(curve.x, np.array([10, 20, 40]) / 60)
    assert curve.y.tolist() == [300, 600, 1200] and curve.low is not None and curve.low.tolist() == [299, 599, 1199]
    assert main(["plot", *folders, "--output", str(picture), "--metric", "nothing"]) == 1
    assert "has no metric 'nothing': it has eval/high, eval/low, eval/return, loss/model" in capsys.readouterr().err
    empty = run_of(tmp_path / "d", [])
    assert main(["plot", empty, "--output", str(picture)]) == 1
    assert (
        "none of eval/return, episode/return, loss/model, held_out/action with loss/action, loss/action is"
        in capsys.readouterr().err
    )


def test_an_evaluation_leaves_its_environments_open(evaluated: Run) -> None:
    agent = Agent.load(evaluated.folder)
    evaluator = PolicyEvaluator(settings(), agent.world_model)
    open_ones: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worldmodel_environments.Echo.close", lambda environment: open_ones.remove(id(environment)))
        first = evaluator.look(agent.world_model, 1e3)
        open_ones += [id(environment.unwrapped) for environment in evaluator._environments]
        second = evaluator.look(agent.world_model, 1e3)
        assert first is not None and second is not None and first.returns == second.returns
        assert len(open_ones) == 3
        evaluator.close()
        assert not open_ones


def test_random_actions_do_not_follow_the_environments_random_numbers(evaluated: Run) -> None:
    agent = Agent.load(evaluated.folder)
    found = evaluate(agent, ECHO, 20, decider=RandomPolicy(agent.action_spec), env_args={"lag": 0})
    assert 4 < found.mean < 6  # of 10, for repeating what is seen, which the environment's stream would do each time


def test_deciders_of_which_no_episode_was_begun_draw_by_pytorchs_generator(evaluated: Run) -> None:
    agent = Agent.load(evaluated.folder)
    for kind in (lambda: RandomPolicy(agent.action_spec), SampledPolicy):
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            decider, state, actions = kind(), None, []
            for _ in range(20):
                action, state = agent.act(0, state, decider=decider)
                actions.append(int(action))
            drawn.append(actions)
        assert drawn[0] == drawn[1] != drawn[2]


class Only:
    """Gives the one environment there is."""

    def __init__(self) -> None:
        self.environment: Any = None

    def __call__(self) -> Any:
        self.environment = self.environment or gymnasium.make("worldmodel_environments:wmtest/Echo-v0")
        return self.environment


def test_an_environment_that_exists_once_is_training_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match="2 environments are wanted, and what makes them gave the same one"):
        train(settings(), tmp_path / "two", env=Only(), quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PolicyEvaluator", Often)
        run = train(settings(num_envs=1), tmp_path / "one", env=Only())
    assert run.metrics[-1]["steps"] == 120 and run.best is None
    assert "and training goes on without: " in (said := capsys.readouterr().err)
    assert "is one environment that exists already, expected a new one" in said


def test_the_best_of_other_episodes_is_no_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PolicyEvaluator", Often)
    monkeypatch.setattr(Often, "look", lambda *arguments: Evaluated((9.0, 9.0), (3, 3)))
    folder = tmp_path / "run"
    train(settings(), folder, quiet=True)
    monkeypatch.setattr(Often, "look", lambda *arguments: Evaluated((-5.0, -4.0), (3, 3)))
    config = dataclasses.replace(settings(steps=140), eval_env=ECHO, eval_env_args={"length": 3})
    saved = train(config, folder, resume=True, quiet=True).best_evaluation
    assert saved is not None and saved["eval/return"] == -4.5 and saved["evaluated"]["env_args"] == {"length": 3}


def test_episodes_that_fail_in_an_evaluation_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "PolicyEvaluator", Often)
    monkeypatch.setattr(Often, "look", lambda *arguments: Evaluated((1.0,), (3,), failures=("the cable", "the plug")))
    run = train(settings(), tmp_path / "run")
    measured = [line for line in run.metrics if "eval/return" in line]
    assert len(measured) > 1 and all(line["eval/failed"] == 2 and "eval/low" not in line for line in measured)
    assert capsys.readouterr().err.count("2 of 3 episodes of the evaluation failed: the cable") == 1


def test_a_run_that_was_given_its_evaluation_as_an_object_says_how_it_goes_on(tmp_path: Path) -> None:
    given = settings(eval_env=lambda: gymnasium.make("worldmodel_environments:wmtest/Echo-v0"))
    folder = train(given, tmp_path / "run", quiet=True).folder
    saved = dataclasses.replace(saved_config(Run(folder)), steps=140)
    with pytest.raises(ConfigurationError, match=r"eval_env object/.* is a Python object.*--eval-env names another"):
        train(saved, folder, resume=True, quiet=True)
    train(dataclasses.replace(saved, eval_env=given.eval_env), folder, resume=True, quiet=True)
    assert main(["train", "--resume", str(folder), "--steps", "160", "--eval-minutes", "0"]) == 0
    assert Run(folder).metrics[-1]["steps"] == 160
