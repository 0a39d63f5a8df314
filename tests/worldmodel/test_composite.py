"""Actions of Tuple and Dict spaces: every environment receives its own form, and learns from all parts."""

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.commands.options import train_options
from worldmodel.commands.train import train
from worldmodel.data.actions import ActionSpec
from worldmodel.environments.batched import GymnasiumVectorEnvironment
from worldmodel.environments.single import make_single
from worldmodel.environments.vector import VectorEnvironment, random_seeds
from worldmodel.model.decision import Decision, DecisionConfig
from worldmodel.model.policies import ContinuousPolicy, DiscretePolicy, MixedPolicy
from worldmodel.runs.configuration import ConfigurationError

SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Tuple([spaces.Discrete(3, start=2), spaces.Dict(b=spaces.MultiBinary(2), a=spaces.Discrete(2))]),
    "continuous": spaces.Dict(z=spaces.Box(-2, 2, (2, 1)), a=spaces.Box(0, 9, (1,), np.int64)),
    "mixed": spaces.Dict(
        push=spaces.Box(-2, 2, (2,)), tool=spaces.MultiDiscrete([2, 3]), more=spaces.Tuple([spaces.Box(0, 1, (1,))])
    ),
}
SMALL = ("--replay.window", "16", "--replay.batch-size", "2", "--replay.burn-in", "2", "--model.memory.width", "32")
FEW = (
    "--train-ratio",
    "4",
    "--prefill",
    "30",
    "--learner.objective.imagination-starts",
    "2",
    "--threads",
    "1",
    "--num-envs",
    "2",
    "--model.perception.hidden",
    "16",
)
pytestmark = pytest.mark.usefixtures("same_threads")


class Parts(gymnasium.Env[Any, Any]):
    """Refuses actions outside its space, and changes what it is given; the reward is the sum of all entries."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, kind: str) -> None:
        self.observation_space, self.action_space = spaces.Box(-99, 99, (1,)), SPACES[kind]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.value = 0, self.np_random.random()
        return np.float32([self.value]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in self.action_space, f"{action} is not in {self.action_space}"
        total = float(sum(part.sum() for part in _leaves(action)))
        for part in _leaves(action):
            if isinstance(part, np.ndarray):
                part[...] = 0
        self.steps += 1
        self.value = 0.5 * self.value + total
        return np.float32([self.value]), total, self.steps == 6, False, {}


def _leaves(action: Any) -> list[Any]:
    parts = action.values() if isinstance(action, dict) else action if isinstance(action, tuple) else None
    return [action] if parts is None else [leaf for part in parts for leaf in _leaves(part)]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(num_envs: int, kind: str) -> Any:
        return gymnasium.vector.SyncVectorEnv([lambda: Parts(kind)] * num_envs)

    for name, options in (("Parts", {"entry_point": Parts}), ("Vector", {"vector_entry_point": together})):
        spec = gymnasium.envs.registration.EnvSpec(f"wmtest/{name}-v0", disable_env_checker=True, **options)
        monkeypatch.setitem(gymnasium.registry, spec.id, spec)


@pytest.mark.parametrize("kind", SPACES)
def test_actions_have_the_form_of_their_space(kind: str) -> None:
    space, random = SPACES[kind], np.random.default_rng(0)
    spec = ActionSpec.from_space(space)
    assert spec.kind == kind and ActionSpec.from_json(spec.to_json()) == spec
    actions = spec.sample(random, 50)
    assert actions.shape == (50, *spec.shape) and actions.dtype == spec.dtype
    assert (spec.check(actions, 50, "test") == actions).all()
    given = spec.rows_to_env(actions)
    assert all(action in space for action in given)
    assert len({str(action) for action in given}) > 20
    encoded = spec.encode(torch.from_numpy(actions))
    assert encoded.shape == (50, spec.width)
    np.testing.assert_array_equal(spec.decode(encoded).numpy(), actions)
    together = gymnasium.vector.utils.batch_space(space, 50)
    assert spec.to_env(actions) in together
    with pytest.raises(ValueError, match=r"^test: actions has "):
        spec.check(actions + 7, 50, "test")


@pytest.mark.parametrize("kind", SPACES)
def test_an_environment_is_trained_resumed_and_evaluated(tmp_path: Path, kind: str) -> None:
    names = ["--env", "wmtest/Parts-v0", "--env-args", f"kind={kind}"]
    settings, _, _ = train_options([*names, *FEW, *SMALL])
    run = train(dataclasses.replace(settings, steps=52), tmp_path / "run", quiet=True)
    assert run.metrics[-1]["updates"] >= 2 and np.isfinite(run.metrics[-1]["loss/policy"])
    train(dataclasses.replace(settings, steps=58), run.folder, resume=True, quiet=True)  # repeats what was done
    assert main(["evaluate", str(run.folder), "--episodes", "1"]) == 0
    assert main(["evaluate", str(run.folder), "--episodes", "1", "--env", "wmtest/Vector-v0", *names[2:]]) == 0
    action, _ = Agent.load(run.folder).act(np.float32([0.5]))
    assert action in SPACES[kind]


def test_a_vector_environment_receives_the_same_actions_as_single_ones() -> None:
    for kind in SPACES:
        made = gymnasium.vector.SyncVectorEnv([lambda kind=kind: Parts(kind)] * 2)
        both = GymnasiumVectorEnvironment(made, 0), VectorEnvironment([Parts(kind), Parts(kind)], random_seeds(0))
        alone = make_single("wmtest/Vector-v0", kind=kind)
        alone.reset(seed=0)
        for actions in both[0].action_spec.sample(np.random.default_rng(1), 5, 2):
            rewards = [episodes.step(actions).rewards.tolist() for episodes in both]
            assert rewards[0] == rewards[1]
            given = both[0].action_spec.rows_to_env(actions)[0]
            assert np.float32(alone.step(given)[1]) == np.float32(rewards[0][0])


def test_a_mixed_policy_adds_up() -> None:
    spec = ActionSpec.from_space(SPACES["mixed"])
    decision = Decision(4, spec, DecisionConfig())
    assert decision.gradient == "pathwise" and not decision.is_enumerable
    torch.nn.init.normal_(decision.network[-1].weight)  # type: ignore[arg-type]
    policy = decision(torch.randn(8, 4))
    assert isinstance(policy, MixedPolicy)
    discrete, continuous = policy.discrete, policy.continuous
    assert isinstance(discrete, DiscretePolicy) and isinstance(continuous, ContinuousPolicy)
    action = policy.sample()
    assert (
        action.shape == (8, spec.width) and (action[:, :2].sum(-1) == 1).all() and (action[:, 2:5].sum(-1) == 1).all()
    )
    torch.testing.assert_close(policy.entropy(), discrete.entropy() + continuous.entropy())
    torch.testing.assert_close(
        policy.log_probability(action),
        discrete.log_probability(action[:, :5]) + continuous.log_probability(action[:, 5:]),
    )
    assert policy.mode().shape == (8, spec.width)
    gradients = torch.autograd.grad(policy.log_probability(action).sum() + action.square().sum(), decision.parameters())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    with pytest.raises(ConfigurationError, match="'all_action' for mixed actions"):
        Decision(4, spec, DecisionConfig(gradient="all_action"))
