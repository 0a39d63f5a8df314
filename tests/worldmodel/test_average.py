from pathlib import Path

import pytest
import torch
from worldmodel_examples import random_batch, small_model, tiny_options

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.learning.learner import Learner, LearnerConfig
from worldmodel.learning.objectives import ObjectiveConfig
from worldmodel.runs.run import Run

SPAN = 4
SHORT = ObjectiveConfig(horizon=2, imagination_starts=2)
ECHO = "worldmodel_environments:wmtest/Echo-v0"
pytestmark = pytest.mark.usefixtures("same_threads")


def learned(average: int, updates: int) -> tuple[Learner, list[torch.Tensor]]:
    """The learner, and its flattened parameters after each update."""
    torch.manual_seed(0)
    model = small_model()
    learner, batch, rows = Learner(model, LearnerConfig(ema=average, objective=SHORT)), random_batch(model), []
    for _ in range(updates):
        learner.update(batch)
        rows.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return learner, rows


def averaged(learner: Learner) -> torch.Tensor:
    assert learner.ema is not None
    return torch.cat([p.flatten() for p in learner.ema.module.parameters()])


def test_the_average_weighs_updates_less_the_older_they_are() -> None:
    updates = 60
    learner, rows = learned(SPAN, updates)
    # From update 40 on, SPAN is at most a tenth of the updates and the decay is constant.
    expected, left = torch.zeros_like(rows[0]), 1.0
    for row in reversed(rows[40:]):
        expected, left = expected + left / SPAN * row, left * (1 - 1 / SPAN)
    torch.testing.assert_close(averaged(learner), expected + left * averaged(learned(SPAN, 40)[0]), rtol=1e-9, atol=0)
    assert (averaged(learner) - rows[-1]).abs().max() > 1e-4


def test_while_updates_are_few_the_average_is_that_of_the_last_tenth() -> None:
    learner, rows = learned(1000, 10)
    assert torch.equal(averaged(learner), rows[-1])
    learner, rows = learned(1000, 20)
    torch.testing.assert_close(averaged(learner), averaged(learned(2, 20)[0]), rtol=0, atol=0)


def test_buffers_are_the_newest() -> None:
    learner, _ = learned(SPAN, 30)
    assert learner.ema is not None
    newest = dict(learner.world_model.named_buffers())
    assert any("mean" in name and (value != 0).any() for name, value in newest.items())
    assert all(torch.equal(value, newest[name]) for name, value in learner.ema.module.named_buffers())


def test_learning_is_the_same_with_an_average() -> None:
    (_, alone), (_, beside) = learned(0, 10), learned(SPAN, 10)
    assert torch.equal(alone[-1], beside[-1])


def test_an_agent_acts_with_the_average(tmp_path: Path) -> None:
    few = ["--num-envs", "2", "--prefill", "40", "--train-ratio", "8", "--threads", "1", "--steps", "300"]
    run = tmp_path / "run"
    assert main(["train", "--env", ECHO, "--run", str(run), *few, *tiny_options(), "--learner.ema", "20"]) == 0
    opened = Run(run)
    average, newest = opened.load("ema"), opened.load("world_model")
    acting = dict(Agent.load(run).world_model.state_dict())
    assert average.keys() == newest.keys() == acting.keys()
    assert all(torch.equal(value, average[name]) for name, value in acting.items())
    assert not torch.equal(average["entry.weight"], newest["entry.weight"])


def test_an_average_over_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="ema is -1, expected a whole number, at least 0"):
        LearnerConfig(ema=-1)
