"""Pictures in bounded memory: perception by chunks of steps, rows by bytes, frames resized by area."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import CONFIG, small_model, tiny_options

from worldmodel.acting.agent import Agent
from worldmodel.acting.rollout import evaluate
from worldmodel.commands.options import train_options
from worldmodel.commands.train import train
from worldmodel.data.batch import Batch
from worldmodel.data.resizing import resized
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.learning.learner import Learner, LearnerConfig
from worldmodel.learning.memory_use import UpdateMemory, peak_bytes
from worldmodel.learning.objectives import ObjectiveConfig
from worldmodel.learning.presets import PRESETS
from worldmodel.learning.settings import saved_config
from worldmodel.learning.trainer import Trainer
from worldmodel.model.latents import CategoricalConfig
from worldmodel.model.perception import PerceptionConfig
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.configuration import ConfigurationError, to_json

CATCH = "worldmodel_environments:wmtest/Catch-v0"
FEW = ("--num-envs", "2", "--prefill", "30", "--train-ratio", "8", "--open-loop-minutes", "0", "--threads", "1")
PARTS: dict[str, spaces.Space[Any]] = {
    "image": spaces.Box(0, 255, (20, 24, 3), np.uint8),
    "map": spaces.Box(-np.inf, np.inf, (9, 8, 2), np.float32),
    "board": spaces.Box(0, 5, (5, 5, 1), np.uint8),
    "numbers": spaces.Box(-1, 1, (3,)),
}
pytestmark = pytest.mark.usefixtures("same_threads")


def batch_of(spec: ObservationSpec, actions: ActionSpec, rows: int, steps: int) -> Batch:
    random = np.random.default_rng(0)

    def values(name: str) -> np.ndarray:
        modality = spec.modalities[name]
        if modality.dtype == "float32":
            return random.normal(size=(rows, steps, *modality.shape)).astype(np.float32)
        return random.integers(0, max(modality.sizes, default=256), (rows, steps, *modality.shape)).astype(np.uint8)

    first = torch.zeros(rows, steps, dtype=torch.bool)
    return Batch(
        spec.to_tensors({name: values(name) for name in spec.modalities}),
        torch.from_numpy(actions.sample(random, rows, steps)),
        torch.from_numpy(random.normal(size=(rows, steps)).astype(np.float32)),
        terminated=first,
        is_last=first,
        is_first=first,
        valid=torch.from_numpy(random.random((rows, steps)) < 0.9),
    )


def learner_of(space: Any, dtype: torch.dtype = torch.float32, **perception: Any) -> Learner:
    """The same weights for every dtype."""
    torch.manual_seed(0)
    config = PerceptionConfig(CategoricalConfig(2, 3, stochastic=False), hidden=8, image_channels=4)
    config = dataclasses.replace(config, **perception)
    specs = ObservationSpec.from_space(space), ActionSpec.from_space(spaces.Discrete(3))
    model = WorldModel(*specs, dataclasses.replace(CONFIG, perception=config)).to(dtype)
    return Learner(model, LearnerConfig(objective=ObjectiveConfig(horizon=1, imagination_starts=1)))


def gradients(learner: Learner, batch: Batch, chunk_steps: int | None) -> list[torch.Tensor]:
    """The losses and their gradient."""
    model = learner.world_model
    model.perception.chunk_steps = chunk_steps
    torch.manual_seed(1)
    losses = learner.losses(batch)
    parameters = list(model.perception.parameters()) + list(model.memory.parameters())
    return [losses.model.detach(), *torch.autograd.grad(losses.model, parameters)]


@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_chunks_of_steps_have_the_loss_and_the_gradients_of_the_whole(part: str) -> None:
    """Against the whole in float64, chunks in float32 are at most twice as far off as the whole in float32 is.

    The room for the other order of summation is one unit in the last place of the largest entry per chunk.
    """
    space = spaces.Dict(PARTS) if part == "all" else PARTS[part]
    learner, exact = learner_of(space), learner_of(space, torch.float64)
    batch = batch_of(learner.world_model.observation_spec, learner.world_model.action_spec, 2, 9)
    whole, chunked, truth = gradients(learner, batch, None), gradients(learner, batch, 4), gradients(exact, batch, None)
    assert all(torch.equal(x, y) for x, y in zip(whole, gradients(learner, batch, 18), strict=True))
    for ours, theirs, expected in zip(chunked, whole, truth, strict=True):
        unit = torch.finfo(torch.float32).eps * expected.abs().max()
        error, usual = ((x.double() - expected).abs().max() for x in (ours, theirs))
        assert error <= 2 * usual + 5 * unit
    for ours, expected in zip(gradients(exact, batch, 4), truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", ["map", "all"])
def test_chunks_have_the_statistics_and_the_reconstruction_of_the_whole(part: str) -> None:
    space = spaces.Dict(PARTS) if part == "all" else PARTS[part]
    learners = [learner_of(space, torch.float64) for _ in range(2)]
    learners[1].world_model.perception.chunk_steps = 5
    for learner in learners:
        torch.manual_seed(1)
        learner.update(batch_of(learner.world_model.observation_spec, learner.world_model.action_spec, 2, 9))
    whole, chunked = (learner.world_model.perception for learner in learners)
    for name, value in whole.named_buffers():
        torch.testing.assert_close(dict(chunked.named_buffers())[name], value, rtol=1e-9, atol=1e-12)
    latent = torch.rand(2, 9, *whole.latent.shape, dtype=torch.float64)
    for method in ("reconstruct", "decode"):
        for name, value in getattr(whole, method)(latent).items():
            expected = dict(rtol=1e-6, atol=1e-6) if value.is_floating_point() else dict(rtol=0, atol=1)
            torch.testing.assert_close(getattr(chunked, method)(latent)[name], value, **expected)


def test_an_update_stays_below_its_bound_for_every_size_of_the_batch() -> None:
    learner = learner_of(spaces.Box(0, 255, (32, 30, 3), np.uint8), image_channels=16)
    model = learner.world_model
    memory = UpdateMemory.of(model, learner.config, 16)
    limit = memory.total(4, 2.5)
    assert memory.chunk_steps(4, limit) == 2 and memory.chunk_steps(4, memory.total(4)) is None
    for rows in (2, 4):
        batch = batch_of(model.observation_spec, model.action_spec, rows, 16)
        used = []
        for chunk_steps in (None, memory.chunk_steps(rows, limit)):
            model.perception.chunk_steps = chunk_steps
            used.append(peak_bytes(functools.partial(learner.update, batch)))
        assert used[1] < limit < used[0]


def test_the_estimate_of_an_update_is_what_it_takes() -> None:
    learner = learner_of(PARTS["image"])
    model = learner.world_model
    memory = UpdateMemory.of(model, learner.config, 16)
    bare = memory.row * 6 + memory.step * 96 + sum(x.nbytes for x in model.parameters())
    batch = batch_of(model.observation_spec, model.action_spec, 6, 16)
    assert bare == pytest.approx(peak_bytes(lambda: learner.losses(batch).total.backward()), rel=0.25)
    before = torch.get_rng_state()
    UpdateMemory.of(model, learner.config, 16)
    assert torch.equal(before, torch.get_rng_state())


def tiny_run(*more: str) -> Any:
    return train_options(["--env", CATCH, *FEW, *tiny_options(**{"model.perception.image-channels": 4}), *more])[0]


def test_a_run_keeps_the_steps_at_once_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = tiny_run("--steps", "60", "--update-megabytes", "4")
    assert bounded.chunk_steps is None
    whole = train(dataclasses.replace(bounded, steps=90), tmp_path / "whole", quiet=True)
    chunk_steps = saved_config(train(bounded, tmp_path / "run", quiet=True)).chunk_steps
    assert chunk_steps is not None and 1 <= chunk_steps < 24
    assert Agent.load(tmp_path / "run").world_model.perception.chunk_steps == chunk_steps
    monkeypatch.setattr(UpdateMemory, "of", lambda *_: pytest.fail("chosen again"))
    again = train_options(["--resume", str(tmp_path / "run"), "--steps", "90"])[0]
    run = train(again, tmp_path / "run", resume=True, quiet=True)
    weights, expected = run.load("world_model"), whole.load("world_model")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    # Runs of earlier releases have none of these settings.
    old = {**run.config["train"]}
    for name in ("chunk_steps", "update_megabytes", "image_size"):
        del old[name]
    run.config["train"] = old
    assert saved_config(run).chunk_steps is None and saved_config(run).image_size is None


def test_rows_that_do_not_fit_are_left_out_and_said_and_a_row_that_does_not_is_refused() -> None:
    config = tiny_run()
    made = Trainer(config)
    assert made.bound_memory() == [] and made.config == config
    row, two = made.update_memory.total(1, 1) / 2**20, made.update_memory.total(2, 1) / 2**20
    made.config = dataclasses.replace(config, update_megabytes=(row + two) / 2)
    (said,) = made.bound_memory()
    assert said.startswith("batches have 1 rows of 24 steps, not 2: more would take an update past ")
    assert made.config.replay.batch_size == made.replay.config.batch_size == 1 and made.config.chunk_steps == 1
    made.config = dataclasses.replace(config, update_megabytes=row / 2)
    with pytest.raises(
        ConfigurationError, match=r"and an update with one row of 24 steps takes .*: raise it, or lower"
    ):
        made.bound_memory()


@pytest.mark.parametrize(("before", "after"), [((4, 6), (2, 3)), ((5, 4), (2, 3)), ((7, 3), (4, 3)), ((6, 6), (6, 5))])
def test_a_resized_pixel_is_the_mean_of_its_area(before: tuple[int, int], after: tuple[int, int]) -> None:
    """Each pixel is cut into equal parts, so that the new pixels are means of whole parts."""
    array = np.random.default_rng(0).integers(0, 256, (2, *before, 3)).astype(np.uint8)
    fine = array.repeat(after[0], -3).repeat(after[1], -2)
    blocks = fine.reshape(2, after[0], before[0], after[1], before[1], 3)
    np.testing.assert_array_equal(resized(array, *after), blocks.sum((2, 4)) / (before[0] * before[1]))
    np.testing.assert_allclose(resized(array.astype(np.float32), *after), blocks.mean((2, 4)), rtol=1e-12)


@pytest.mark.parametrize(
    ("space", "shape", "said"),
    [
        (spaces.Box(0, 255, (4, 84, 80), np.uint8), (64, 64, 4), "image 64x64, 4 channels, channels first, resized"),
        (spaces.Box(0, 1, (28, 70, 3), np.float32), (28, 64, 3), "image 28x64, 3 channels, channels last, resized"),
        (
            spaces.Box(-np.inf, np.inf, (2, 70, 70), np.float32),
            (64, 64, 2),
            "map 64x64, 2 channels, channels first, re",
        ),
        (spaces.Box(0, 255, (64, 64, 3), np.uint8), (64, 64, 3), "image 64x64, 3 channels, channels last (from"),
        (spaces.Box(0, 5, (8, 8), np.uint8), (8, 8, 1), "grid 8x8, 1 channel, 6 classes (from"),
    ],
)
def test_large_images_and_maps_are_resized_where_observations_are_read(space: Any, shape: Any, said: str) -> None:
    spec = ObservationSpec.from_space(space, image_size=64)
    modality = spec.modalities["observation"]
    assert modality.shape == shape and modality.description.startswith(said)
    assert ObservationSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert ObservationSpec.from_space(space, spec, image_size=64) == spec
    space.seed(0)
    seen = np.stack([space.sample(), space.sample()])
    encoded = spec.encode_batch(seen)["observation"]
    assert encoded.shape == (2, *shape) and encoded.dtype == modality.dtype
    full = ObservationSpec.from_space(space).encode_batch(seen)["observation"]
    expected = resized(full, *shape[:2]) if full.shape != encoded.shape else full
    np.testing.assert_array_equal(encoded, np.rint(expected) if modality.kind == "image" else expected.astype("f4"))
    np.testing.assert_array_equal(spec.encode(seen[1])["observation"], encoded[1])


def test_a_run_with_resized_images_is_resumed_evaluated_and_acts(tmp_path: Path) -> None:
    config = tiny_run("--steps", "40", "--env-args", "side=40", "--image-size", "16")
    train(config, tmp_path / "run", quiet=True)
    run = train(train_options(["--resume", str(tmp_path / "run"), "--steps", "60"])[0], tmp_path / "run", resume=True)
    agent = Agent.load(run.folder)
    assert agent.observation_spec.modalities["observation"].shape == (16, 16, 3)
    assert len(evaluate(agent, CATCH, 1, env_args={"side": 40}, max_steps=3).returns) == 1
    frame = np.full((40, 40, 3), 9, np.uint8)
    assert int(agent.act(frame)[0]) in (0, 1, 2)
    with pytest.raises(ValueError, match=r"has shape \(16, 16, 3\), expected shape \(40, 40, 3\)"):
        agent.act(frame[:16, :16])


def test_pictures_choose_the_preset_that_resizes_them() -> None:
    config = train_options(["--env", CATCH])[0]
    assert config.preset == "pixels" and config.image_size == 64 and "image_size" in to_json(config)
    assert train_options(["--env", CATCH, "--preset", "popgym"])[0].image_size is None
    preset = PRESETS["pixels"]()
    spec = ObservationSpec.from_space(spaces.Box(0, 255, (64, 64, 3), np.uint8))
    frame = sum(array.nbytes for array in spec.zeros(1).values())
    assert preset.replay.max_megabytes * 2**20 // frame > 40_000


def test_an_update_with_weights_of_rare_classes_is_measured() -> None:
    seen = spaces.Dict(board=spaces.MultiDiscrete([[5, 4], [3, 6]]), map=spaces.Box(-1, 1, (8, 8, 1)))
    model = small_model(seen, perception=PerceptionConfig(hidden=8, rare=0.5), dtype=torch.float32)
    assert UpdateMemory.of(model, LearnerConfig(), 12).most_rows(2**30) > 1
