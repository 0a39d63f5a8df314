"""The world model of views: laws of its memory, motion by localisation, views that turn."""

import dataclasses

import pytest
import torch

from worldmodel.environments.rooms import RoomsConfig, RoomWorlds
from worldmodel.learning.token_evaluation import TokenPredictor, evaluate_returning
from worldmodel.learning.token_trainer import TokenTrainConfig, TokenTrainer, predict, token_loss
from worldmodel.learning.view_sources import ViewBatch, WorldSource, batch_of
from worldmodel.model.block import Block
from worldmodel.model.blocks import GRUBlock, ScanBlock, TokenAttentionBlock
from worldmodel.model.motion import LearnedMotion
from worldmodel.model.place_map import PlaceConfig
from worldmodel.model.tokens import TokenConfig, TokenWorldModel
from worldmodel.model.views import TurnedView, turned, view_offsets
from worldmodel.runs.configuration import from_json, to_json
from worldmodel.runs.fields import ConfigurationError

PLACES = {
    "given": PlaceConfig(period=9),
    "learned": PlaceConfig(period=9, motion="learned"),
    "turning": PlaceConfig(period=9, motion="learned", turns=True),
    "drifting": PlaceConfig(period=9, velocities=((0, 0), (0, 1)), gated=True),
}
CONFIGS = {
    **{name: TokenConfig(grid=(3, 3), classes=6, place=place, rewards=True) for name, place in PLACES.items()},
    "blocks": TokenConfig(grid=(3, 3), classes=6, place=None, blocks=(GRUBlock(), TokenAttentionBlock()), rewards=True),
    "pooled": TokenConfig(grid=(3, 3), classes=6, place=None, blocks=(ScanBlock(),), pooled=32, rewards=True),
    "both": TokenConfig(grid=(3, 3), classes=6, place=PLACES["given"], blocks=(GRUBlock(),), rewards=True),
    "patches": TokenConfig(grid=(3, 3), classes=0, patch=2, place=PLACES["learned"], rewards=True),
}


def rooms(**options: object) -> RoomsConfig:
    return RoomsConfig(size=5, view=3, colours=5, bumps=True, **options)


def sample(config: TokenConfig, batch: int = 2, steps: int = 12, seed: int = 0) -> ViewBatch:
    turns = config.place is not None and config.place.turns
    worlds = rooms(own_heading=turns, pixels=config.patch)
    return WorldSource(RoomWorlds, worlds, torch.Generator().manual_seed(seed)).sample(batch, steps)


def model_of(config: TokenConfig) -> TokenWorldModel:
    torch.manual_seed(0)
    model = TokenWorldModel(config)
    for parameter in model.parameters():  # an untrained prior is even, and its largest entry arbitrary
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_is_its_steps_and_its_parts(name: str) -> None:
    model, batch = model_of(CONFIGS[name]), sample(CONFIGS[name])
    batch.elapsed = torch.rand(2, 12) + 0.5
    whole, last = predict(model, batch)
    state, outputs = None, []
    for t in range(12):
        motion = {key: None if x is None else x[:, t] for key, x in batch.motion().items()}
        prediction, state = model.step(batch.views[:, t], batch.actions[:, t], state, **motion)
        outputs.append(prediction.outputs)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.outputs, rtol=1e-4, atol=1e-5)
    assert state is not None and state.keys() == last.keys() == model.init_state(2).keys()
    for key, value in last.items():
        if key != "place.angle":  # the same angle is 0 or 2 pi
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["drifting", "pooled"])
def test_the_time_between_views_counts(name: str) -> None:
    model, batch = model_of(CONFIGS[name]), sample(CONFIGS[name])
    even, _ = predict(model, batch)
    batch.elapsed = torch.full((2, 12), 2.0)
    other, _ = predict(model, batch)
    assert not torch.allclose(even.outputs, other.outputs)


@pytest.mark.parametrize("name", ["learned", "turning", "both", "blocks"])
def test_an_imagined_step_is_a_step_whose_view_was_foreseen(name: str) -> None:
    config = CONFIGS[name]
    if name == "both":
        config = dataclasses.replace(config, place=PlaceConfig(period=9, moves=((-1, 0), (0, 1), (1, 0), (0, -1))))
    model, batch = model_of(config), sample(config)
    _, state = predict(model, batch)
    tokens, action = model.codec.tokens(batch.views[:, -1]), torch.tensor([1, 2])
    prediction, after = model.step(batch.views[:, -1], action, state)
    if model.place is not None:  # as a world has it: the view is in the map, and the last move is made
        before = {**state, **after} if name == "both" else None
        if before is None:
            certain = model.motion.certain(torch.zeros(2, dtype=torch.long))
            settled, _ = model.step(batch.views[:, -1], action, state)
            heading = settled.path.headings[:, -1]
            moved = model.place.memory.move(
                {"map": after["place.map"], "angle": state["place.angle"]}, settled.path.first
            )
            before = {**after, "place.angle": moved["angle"], "place.heading": heading, "place.prior": certain}
        else:
            before |= {"place.angle": state["place.angle"]} | {
                name: value for name, value in state.items() if name.startswith("blocks.")
            }
        state = before
    outputs, features, _, _ = model.imagine(tokens, action, state)
    torch.testing.assert_close(outputs, prediction.outputs[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features, prediction.features[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_crosses_a_reset(name: str) -> None:
    model, batch = model_of(CONFIGS[name]), sample(CONFIGS[name])
    batch.is_first = torch.zeros(2, 13, dtype=torch.bool)
    batch.is_first[:, 7] = True
    joined, _ = predict(model, batch)
    motion = {key: None if x is None else x[:, 7:] for key, x in batch.motion().items()}
    alone, _ = model(batch.views[:, 7:12], batch.actions[:, 7:], **motion)
    torch.testing.assert_close(joined.outputs[:, 7:], alone.outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "patches"])
def test_a_value_s_gradient_reaches_the_first_observation(name: str) -> None:
    model, batch = model_of(CONFIGS[name]), sample(CONFIGS[name])
    inputs = []
    model.codec.embedding.register_forward_hook(lambda *call: inputs.append(call[2]) or call[2].retain_grad())
    prediction, _ = predict(model, batch)
    model.scalars["value"](prediction.features[:, -1]).sum().backward()
    assert inputs[0].grad[:, 0].abs().sum() > 0


def test_motion_by_localisation_needs_no_learning_and_no_displacement() -> None:
    for own_heading in (False, True):
        config = TokenConfig(classes=9, place=PlaceConfig(motion="learned", turns=own_heading))
        worlds = RoomsConfig(bumps=True, edits=0.1, own_heading=own_heading)
        batch = WorldSource(RoomWorlds, worlds, torch.Generator().manual_seed(1)).sample(8, 64)
        model = TokenWorldModel(config)
        prediction, _ = predict(model, batch, hindsight=True)
        motion, chosen = model.motion, prediction.path.posterior.argmax(-1)[:, 1:]
        assert isinstance(motion, LearnedMotion)
        assert torch.equal(motion.candidates[chosen], batch.displacement)
        turn = torch.zeros_like(chosen) if batch.turn is None else batch.turn
        assert torch.equal(motion.turns[chosen], turn)
        assert bool((batch.displacement == 0).all(-1).any()) and (not own_heading or bool(turn.any()))


def test_equal_views_follow_the_prior() -> None:
    model = TokenWorldModel(TokenConfig(place=PlaceConfig(motion="learned")))
    motion = model.motion
    assert isinstance(motion, LearnedMotion)
    state = model.init_state(3) | {"place.prior": motion.certain(torch.tensor([0, 3, 4]))}
    views = torch.zeros(3, 1, 25, dtype=torch.long)
    prediction, _ = model(views, torch.zeros(3, 1, dtype=torch.long), state)
    assert prediction.path.posterior.argmax(-1)[:, 0].tolist() == [0, 3, 4]


def test_a_turn_permutes_the_places_of_a_view() -> None:
    for grid, whole in (((3, 3), True), ((2, 5), False)):
        view, offsets = TurnedView(grid, True), view_offsets(grid)
        assert view.whole == whole
        heading = torch.tensor([0, 1, 2, 3])
        values = offsets.float().expand(4, -1, -1)  # each place holds where it is in the view
        framed, gate = view.to_frame(values, heading)
        for k in range(4):
            seen = framed[k] if gate is None else framed[k][gate[k] > 0]
            places = view.offsets if gate is None else view.offsets[gate[k] > 0]
            assert torch.equal(turned(seen, k), places.float())
        assert torch.equal(view.from_frame(framed, heading), values)


def test_weights_fit_a_lattice_of_any_size() -> None:
    small, large = (TokenWorldModel(TokenConfig(place=PlaceConfig(period=period))) for period in (15, 25))
    large.load_state_dict(small.state_dict())


def trained_with(agents: int) -> TokenWorldModel:
    trainer = TokenTrainer(
        TokenConfig(grid=(3, 3), classes=6, place=PlaceConfig(period=11)),
        TokenTrainConfig(batch_size=8, steps=48, updates=16, lr=2e-2, minutes=10, warmup=5),
        WorldSource(RoomWorlds, rooms(agents=agents), torch.Generator().manual_seed(0)),
    )
    while not trainer.finished:
        trainer.iterate()
    return trainer.model


@pytest.fixture(scope="module")
def trained() -> TokenWorldModel:
    """A map of places for small rooms, with given motion."""
    return trained_with(agents=1)


def test_a_wrong_turn_a_skipped_write_and_an_aliased_lattice_are_planted_and_seen(
    trained: TokenWorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(model: TokenWorldModel) -> float:
        worlds = dataclasses.replace(rooms(), size=9)
        return evaluate_returning(model, RoomWorlds(2, worlds, torch.Generator().manual_seed(3)), 96).accuracy

    assert accuracy(trained) == 1
    aliased = TokenWorldModel(dataclasses.replace(trained.config, place=PlaceConfig(period=7)))
    aliased.load_state_dict(trained.state_dict())
    assert accuracy(aliased) < 0.9
    memory = trained.place.memory
    whole = memory.forward

    def skipping(values: torch.Tensor, *arguments: object, **named: object) -> object:
        gate = torch.ones(values.shape[:3])
        gate[:, 10:20] = 0
        return whole(values, *arguments, **{**named, "gate": gate})

    def turning_wrong(values: torch.Tensor, moves: torch.Tensor, *arguments: object, **named: object) -> object:
        return whole(values, moves.flip(-1), *arguments, **named)

    for planted in (skipping, turning_wrong):
        monkeypatch.setattr(memory, "forward", planted)
        assert accuracy(trained) < 1


def test_agents_of_one_map_take_turns_and_know_what_another_has_seen(trained: TokenWorldModel) -> None:
    worlds = RoomWorlds(2, rooms(agents=2), torch.Generator().manual_seed(1))
    start = worlds.positions
    steps = worlds.rollout(20)
    batch = batch_of(steps, start)
    stands = start[:, 0].float() + batch.displacement.cumsum(1)[:, -1]
    assert torch.equal(stands, worlds.positions[:, 0].float())
    large = dataclasses.replace(rooms(agents=2), size=9)
    again = RoomWorlds(2, large, torch.Generator().manual_seed(1))
    predictor = TokenPredictor(trained, again)
    others = 0
    for _ in range(3):
        part = again.rollout(30)
        known = part["gap"] > 0
        others += int((part["other"] & known).sum())
        assert torch.equal(predictor(part)[known], part["next_tokens"][known])
    assert others > 20
    new = RoomWorlds(2, rooms(), torch.Generator().manual_seed(2))
    assert evaluate_returning(trained, new, 32, chunk=9).accuracy == 1


def test_two_agents_train_a_map_as_one_does() -> None:
    model = trained_with(agents=2)
    for agents in (1, 2):
        worlds = RoomWorlds(2, rooms(agents=agents), torch.Generator().manual_seed(3))
        assert evaluate_returning(model, worlds, 64).accuracy == 1
    batch = WorldSource(RoomWorlds, rooms(agents=2), torch.Generator().manual_seed(3)).sample(2, 12)
    with pytest.raises(ValueError, match="learned motion compares an agent's consecutive views"):
        token_loss(model_of(CONFIGS["learned"]), batch, TokenTrainConfig())


@pytest.mark.parametrize("agents", [1, 2])
def test_rewards_of_the_worlds_are_learned(agents: int) -> None:
    source = WorldSource(RoomWorlds, rooms(agents=agents), torch.Generator().manual_seed(3))
    batch = source.sample(2, 12)
    steps = RoomWorlds(2, rooms(agents=agents), torch.Generator().manual_seed(3)).rollout(12 // agents)
    new = (steps["inside"] & (steps["gap"] < 0)).float().mean(-1).view(2, agents, -1)
    assert torch.equal(batch.rewards, new.mT.flatten(1)) and new.any()
    assert batch.terminated.shape == batch.actions.shape and not batch.terminated.any()
    model = model_of(CONFIGS["learned" if agents == 1 else "given"])
    loss, metrics = token_loss(model, batch, TokenTrainConfig())
    loss.backward()
    assert model.scalars["reward"].weight.grad.any() and metrics["reward_loss"] > 0
    batch.rewards = None
    with pytest.raises(ValueError, match="the batch has none"):
        token_loss(model, batch, TokenTrainConfig())


def test_training_remembers_and_repeats_itself() -> None:
    config = TokenTrainConfig(batch_size=8, steps=48, updates=16, lr=1e-2, minutes=10, warmup=5)

    def trainer() -> TokenTrainer:
        source = WorldSource(RoomWorlds, rooms(), torch.Generator().manual_seed(0))
        return TokenTrainer(CONFIGS["learned"], config, source)

    first = trainer()
    while not first.finished:
        if first.updates == 12:
            saved = {name: part for name, part in first.state_dict().items()}
            saved = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, saved)
        metrics = first.iterate()
    assert metrics["returning"] > 0.99
    second = trainer()
    second.load_state_dict(saved)
    while not second.finished:
        again = second.iterate()
    assert metrics == again
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_settings_survive_json_and_contradictions_are_refused() -> None:
    for config in CONFIGS.values():
        assert from_json(TokenConfig, to_json(config)) == config
    assert all(isinstance(block, Block) for block in CONFIGS["blocks"].blocks)
    for wrong, reason in (
        ({"classes": 0}, "classes and patch are 0"),
        ({"place": None}, "expected a memory"),
        ({"place": PlaceConfig(period=4)}, "place.period is 4"),
        ({"place": PlaceConfig(velocities=((0.0, 1.0),) * 3)}, "width is 16"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            TokenConfig(**wrong)
    model = TokenWorldModel(TokenConfig())
    with pytest.raises(ValueError, match="displacement is missing"):
        model(torch.zeros(1, 2, 25, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="several agents need positions"):
        batch_of(RoomWorlds(1, rooms(agents=2)).rollout(2))
