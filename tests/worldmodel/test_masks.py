"""Masks of legal actions: no illegal action is ever chosen, and imagination keeps to the legal ones it predicts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import worldmodel_environments  # noqa: F401  registers
from gymnasium import spaces

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.commands.options import train_options
from worldmodel.commands.train import train
from worldmodel.data.actions import MASK, ActionSpec
from worldmodel.data.spaces import ObservationSpec
from worldmodel.environments.batched import GymnasiumVectorEnvironment
from worldmodel.environments.making import specs_of
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.single import FirstOfVector
from worldmodel.environments.vector import VectorEnvironment, random_seeds
from worldmodel.learning.settings import TrainConfig
from worldmodel.learning.trainer import Trainer
from worldmodel.model.deciders import action_values, policy_sample
from worldmodel.model.policies import DiscretePolicy, predicted_mask
from worldmodel.model.world_model import WorldModel, WorldModelConfig

SMALL = (
    "--replay.window",
    "24",
    "--replay.batch-size",
    "2",
    "--replay.burn-in",
    "4",
    "--model.perception.hidden",
    "16",
)
FEW = ("--model.memory.width", "32", "--learner.objective.horizon", "2", "--learner.objective.imagination-starts", "2")
pytestmark = pytest.mark.usefixtures("same_threads")


class Ring(gymnasium.Env[Any, Any]):
    """Cells 0 to 4 of a ring; an action moves by 0 to 3, but not by the cell's number, nor by 3 from an odd cell.

    Args:
        form: "array", "tuple" (MultiDiscrete), "observation" (a Dict, as PettingZoo's), "even" (in even cells, where
            the others allow all), or "late" (not from reset).
        length: of an episode; nothing is legal after it.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, form: str = "array", length: int = 9) -> None:
        self.form, self.length = form, length
        self.observation_space: spaces.Space[Any] = spaces.Discrete(5)
        self.action_space: spaces.Space[Any] = spaces.MultiDiscrete([4, 2]) if form == "tuple" else spaces.Discrete(4)
        if form == "observation":
            self.observation_space = spaces.Dict(cell=spaces.Discrete(5), action_mask=spaces.Box(0, 1, (4,), np.int8))

    @property
    def legal(self) -> np.ndarray:
        moves = np.arange(4)
        all_legal = self.form == "even" and self.cell % 2
        return np.int8((moves != self.cell) & ~((self.cell % 2 == 1) & (moves == 3)) | all_legal)

    def _seen(self) -> tuple[Any, dict[str, Any]]:
        mask = np.zeros(4, np.int8) if self.steps == self.length else self.legal
        if self.form == "observation":
            return {"cell": self.cell, MASK: mask}, {}
        if self.form == "tuple":
            return self.cell, {MASK: (mask, np.int8([1, self.cell > 2]) * (self.steps < self.length))}
        absent = (self.form == "even" and self.cell % 2) or (self.form == "late" and not self.steps)
        return self.cell, {} if absent else {MASK: mask}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell, self.steps = 0 if self.form == "even" else int(self.np_random.integers(5)), 0
        return self._seen()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        move, *others = np.atleast_1d(action).tolist()
        assert self.legal[move], f"{move} is illegal in {self.cell}"
        assert not (others == [1] and self.cell <= 2), "the second entry is illegal"
        self.cell = (self.cell + move) % 5
        self.steps += 1
        seen, info = self._seen()
        return seen, float(self.cell == 4), self.steps == self.length, False, info


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in (("Ring", Ring),):
        spec = gymnasium.envs.registration.EnvSpec(f"wmtest/{name}-v0", entry, disable_env_checker=True)
        monkeypatch.setitem(gymnasium.registry, spec.id, spec)


def ring(form: str, *more: str, **changes: Any) -> TrainConfig:
    env = ["--env", "wmtest/Ring-v0", "--env-args", f"form={form}"] if form else ["--env", "wmtest/Echo-v0"]
    options = [*env, "--num-envs", "4", "--prefill", "40"]
    found, _, _ = train_options([*options, "--train-ratio", "4", "--threads", "1", *SMALL, *FEW, *more])
    return dataclasses.replace(found, **changes)


def test_a_masked_policy_is_the_policy_of_the_legal_classes() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    mask = torch.tensor([True, False, True, True, False]).expand(6, 5)
    masked = DiscretePolicy(logits, (3, 2), 0.1, mask)
    small = DiscretePolicy(logits[:, [0, 2, 3]], (2, 1), 0.1)
    probabilities = torch.cat(masked.probabilities, -1)
    assert (probabilities[~mask] == 0).all()
    torch.testing.assert_close(probabilities[mask].view(6, 3), torch.cat(small.probabilities, -1))
    torch.testing.assert_close(masked.entropy(), small.entropy())
    actions = torch.cat([DiscretePolicy(logits, (3, 2), 0.1, mask).sample() for _ in range(300)])
    assert (actions.view(300, 6, 5)[:, ~mask] == 0).all()
    loss = masked.entropy().sum() + masked.log_probability(masked.sample()).sum() + masked.sample().square().sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()
    # Padding has no legal class, and its policy must not be NaN.
    none = DiscretePolicy(logits, (3, 2), 0.1, torch.zeros(6, 5, dtype=torch.bool))
    assert torch.equal(
        torch.cat(none.probabilities, -1), torch.cat(DiscretePolicy(logits, (3, 2), 0.1).probabilities, -1)
    )


def test_a_predicted_mask_has_a_legal_class_per_entry() -> None:
    odds = torch.tensor([[1.0, -1.0, -3.0, -2.0], [-4.0, -0.5, 0.0, 3.0], [-1.0, -2.0, -1.5, -1.5]])
    assert predicted_mask(odds, (2, 2)).int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]]


@pytest.mark.parametrize(
    ("form", "gradient"),
    [("array", "all_action"), ("observation", "all_action"), ("tuple", "reinforce"), ("even", "pathwise")],
)
def test_no_illegal_action_is_chosen(tmp_path: Path, form: str, gradient: str) -> None:
    settings = ring(form, "--model.decision.gradient", gradient, "--steps", "120")
    run = train(settings, tmp_path / "run", quiet=True)
    assert run.metrics[-1]["updates"] >= 6 and np.isfinite(run.metrics[-1]["loss/policy"])
    json_file = tmp_path / "told.json"
    for more in ((), ("--sample",)):
        assert main(["evaluate", str(run.folder), "--episodes", "6", "--json", str(json_file), *more]) == 0
        told = json.loads(json_file.read_text())
        assert told["lengths"] == told["random"]["lengths"] == [9] * 6
    train(dataclasses.replace(settings, steps=124), run.folder, resume=True, quiet=True)


def test_replay_has_the_mask_of_every_step_and_imagination_learns_it() -> None:
    trainer = Trainer(
        ring(
            "array",
            "--learner.model-lr",
            "0.01",
            "--train-ratio",
            "24",
            "--learner.warm-up",
            "5",
            "--prefill",
            "100",
            updates=45,
        )
    )
    while not trainer.finished:
        trainer.iterate()
    batch, _ = trainer.replay.sample()
    cells = batch.observations["observation"][..., 0].long()
    moves = torch.arange(4)
    truth = (moves != cells[..., None]) & ~((cells[..., None] % 2 == 1) & (moves == 3))
    masks = batch.observations[MASK] != 0
    ended = batch.is_last & batch.valid & (batch.terminated.roll(1, 1))
    assert ended.any() and not masks[ended].any()
    inside = batch.valid & ~batch.is_last
    assert torch.equal(masks[inside], truth[inside])

    model = trainer.world_model
    observed = model.observe(batch, states_after=[3])
    assert torch.equal(observed.states_after[MASK], masks[:, 2])
    start = {name: value[batch.is_first[:, 0]] for name, value in observed.states_after.items()}
    many = {name: value.repeat_interleave(100, 0) for name, value in start.items()}
    imagined = model.imagine(many, model.decision, 4)
    assert imagined.action_masks is not None and imagined.action_masks.any(-1).all()
    chosen = imagined.actions.argmax(-1)
    assert imagined.action_masks[:, :-1].gather(-1, chosen[..., None]).all()
    predicted_cells = model.perception.reconstruct(imagined.latent)["observation"][..., 0]
    lawful = (chosen[:, 1:] != predicted_cells[:, :-1]) & ~((predicted_cells[:, :-1] % 2 == 1) & (chosen[:, 1:] == 3))
    assert lawful.double().mean() > 0.85, "chance is 0.65"
    q, _ = action_values(model, start)
    assert torch.equal(q.isinf(), ~start[MASK])


def test_every_mode_of_vector_environments_gives_its_masks() -> None:
    class Seeded(Ring):
        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            return super().reset(seed=seed if seed is not None else 100 + self.steps, options=options)

    for form in ("array", "even", "observation", "tuple"):
        for mode in gymnasium.vector.AutoresetMode:
            made = gymnasium.vector.SyncVectorEnv([lambda form=form: Seeded(form, 3)] * 3, autoreset_mode=mode)
            episodes = GymnasiumVectorEnvironment(made, 0)
            random, ends = np.random.default_rng(0), 0
            for _ in range(20):
                legal = episodes.observation_spec.legal(episodes.observations)
                happened = episodes.step(episodes.action_spec.sample(random, 3, mask=legal))
                over = happened.terminated
                masks = happened.next_observations[MASK][over]
                ends += len(masks)
                cells = happened.next_observations["cell" if form == "observation" else "observation"][over]
                assert not masks[cells[:, 0] % 2 == 0].any() and (form == "even" or not masks.any())
            assert ends >= 12


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones(3, np.int8), r"action_mask has shape \(3,\) and dtype int8, expected \(4,\) and bool or int8"),
        (np.ones(4), "dtype float64, expected"),
        ("yes", "dtype <U3, expected"),
        (np.int8([0, 2, 1, 1]), "action_mask has values from 0 to 2, expected 0 to 1"),
        (np.zeros(4, bool), "action_mask has no legal action"),
    ],
    ids=repr,
)
def test_a_mask_amiss_is_one_line_with_its_place(mask: Any, words: str) -> None:
    environment = Ring()
    episodes = VectorEnvironment([environment], random_seeds(0))
    real = environment._seen
    environment._seen = lambda: (real()[0], {MASK: mask})  # type: ignore[method-assign]
    action = episodes.action_spec.sample(
        np.random.default_rng(0), 1, mask=episodes.observation_spec.legal(episodes.observations)
    )
    with pytest.raises(
        EnvironmentFailed, match=rf"Ring, observation 1 of the episode with seed \d+: .*{words}"
    ) as error:
        episodes.step(action)
    assert "\n" not in str(error.value)


def test_what_exists_as_a_vector_only_gives_its_masks_to_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in gymnasium.vector.AutoresetMode:
        made = gymnasium.vector.SyncVectorEnv([Ring], autoreset_mode=mode)
        found = []
        for environment in (Ring(), FirstOfVector(made)):
            episodes, random = VectorEnvironment([environment], random_seeds(0)), np.random.default_rng(0)
            for _ in range(12):
                legal = episodes.observation_spec.legal(episodes.observations)
                happened = episodes.step(episodes.action_spec.sample(random, 1, mask=legal))
                found.append((legal.tolist(), happened.next_observations[MASK].tolist()))
        assert found[:12] == found[12:]


def test_masks_of_other_actions_make_no_world_model() -> None:
    seen = ObservationSpec.from_space(
        spaces.Discrete(2), actions=ActionSpec.from_space(spaces.Discrete(3)), info={MASK: 1}
    )
    with pytest.raises(ValueError, match=r"masks have \(3,\) entries, expected the 2 classes"):
        WorldModel(seen, ActionSpec.from_space(spaces.Discrete(2)), WorldModelConfig())
    fields = seen.to_json()
    with pytest.raises(ValueError, match="no part 'action_mask' is one"):
        ObservationSpec.from_json({**fields, "modalities": {"observation": fields["modalities"]["observation"]}})


def test_a_mask_that_comes_later_than_the_first_reset_is_told() -> None:
    episodes = VectorEnvironment([Ring("late")], lambda _: 3)
    with pytest.raises(EnvironmentFailed, match=r"observation 1 .* that of the first reset had none: give it there"):
        episodes.step(np.array([1]))
    # A saved run without masks goes on without them.
    plain = ObservationSpec.from_space(spaces.Discrete(5))
    for kinds, spec in ((plain, None), (None, plain)):
        old = VectorEnvironment([Ring("late")], lambda _: 3, spec, kinds=kinds)
        assert old.step(np.array([1])).next_observations.keys() == {"observation"}


def test_the_start_of_a_run_says_where_masks_come_from_and_kinds_reads_them_otherwise() -> None:
    seen, _ = specs_of("wmtest/Ring-v0", env_args={"form": "observation"})
    assert seen.action_mask == "observation"
    assert any(f"{MASK}: from observation" in line and f"--kinds {MASK}=" in line for line in seen.description())
    assert specs_of("wmtest/Ring-v0")[0].description()[1].startswith(f"{MASK}: from info")
    numbers = specs_of("wmtest/Ring-v0", {MASK: "vector"}, {"form": "observation"})[0]
    assert numbers.action_mask == "" and numbers.modalities[MASK].kind == "vector"
    other = spaces.Dict(cell=spaces.Discrete(5), action_mask=spaces.Box(0, 1, (3,), np.int8))
    actions = ActionSpec.from_space(spaces.Discrete(4))
    assert ObservationSpec.from_space(other, actions=actions).action_mask == ""
    with pytest.raises(ValueError, match="info and the observation have an 'action_mask' each"):
        ObservationSpec.from_space(other, actions=actions, info={MASK: np.ones(4)})


def test_the_caller_of_act_says_what_is_legal_also_for_runs_without_masks(tmp_path: Path) -> None:
    masked = train(ring("array", "--steps", "48"), tmp_path / "masked", quiet=True)
    plain = train(ring("", "--steps", "48"), tmp_path / "plain", quiet=True)
    for run, observation, classes in ((masked, 2, 4), (plain, 1, 2)):
        agent, state = Agent.load(run.folder), None
        for only in [*range(classes)] * 3:
            mask = np.arange(classes) == only
            for decider in (None, policy_sample):
                action, state = agent.act(observation, state, decider=decider, action_mask=mask)
                assert action == only
        action, state = agent.act(observation, state)
        with pytest.raises(ValueError, match=r"^Agent.act: action_mask has no legal action"):
            agent.act(observation, action_mask=np.zeros(classes, np.int8))
        with pytest.raises(ValueError, match=r"action_mask has shape \(9,\)"):
            agent.act(observation, action_mask=np.ones(9, np.int8))


def test_masks_have_the_form_of_the_spaces_own_sample() -> None:
    parts = spaces.Dict(
        a=spaces.Discrete(3, start=5),
        b=spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3])]),
        c=spaces.MultiBinary(3),
    )
    spec = ActionSpec.from_space(parts)
    a, b, c = np.int8([0, 1, 1]), (np.int8([1, 0]), np.int8([0, 1, 0])), np.int8([0, 1, 2])
    mask = spec.encode_mask({"a": a, "b": (None, b), "c": c})
    assert mask.astype(int).tolist() == [0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1]
    drawn = spec.rows_to_env(spec.sample(np.random.default_rng(0), 200, mask=np.stack([mask] * 200)))
    assert all(action in parts for action in drawn)
    assert {int(action["a"]) for action in drawn} == {6, 7}
    assert {tuple(action["b"][1].tolist()) for action in drawn} == {(0, 1)}
    assert {tuple(action["c"].tolist()) for action in drawn} == {(0, 1, 0), (0, 1, 1)}
    assert torch.equal(torch.from_numpy(spec.encode_mask(mask)), torch.from_numpy(mask))
    with pytest.raises(ValueError, match="action_mask has no part 'b/1'"):
        spec.encode_mask({"a": a, "c": c})
    with pytest.raises(ValueError, match="no classes that it could be for"):
        ActionSpec.from_space(spaces.Box(-1, 1, (2,))).encode_mask(np.ones(2))
