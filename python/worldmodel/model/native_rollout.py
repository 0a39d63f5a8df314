"""Imagination without gradient in one native call, where policy, latent and memory have such layers.

A step of ``WorldModel`` on 64 rows is a hundred operators, whose calls take far longer than their arithmetic. No
gradient passes through the imagined steps of the all-action and REINFORCE gradients, nor through the plans that are
sampled. On thousands of rows, such as those of plans, the arithmetic counts: a tile of rows stays in the cache.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wmkernels.layers import CannotChain, LayerChain, can_chain, require_unhooked
from wmkernels.nn import CausalConv1d, Mamba, RotaryMamba
from worldmodel.data.batch import State
from worldmodel.model.latents import CategoricalLatent, EmbeddingLatent
from worldmodel.model.memory import MemoryStack
from worldmodel.model.recurrent import GatedConv

if TYPE_CHECKING:
    from worldmodel.model.world_model import WorldModel


@dataclasses.dataclass
class Rollout:
    """Features (rows, horizon + 1, features), latents and actions (rows, horizon, ...), and memory's last state."""

    features: Tensor
    latents: Tensor
    actions: Tensor
    memory: State


def roll_out(
    world_model: "WorldModel", features: Tensor, memory: State, horizon: int, first_action: Tensor | None
) -> Rollout | None:
    """``horizon`` steps from ``features``, with samples of the policy and of the latent; None where a chain cannot run.

    ``first_action`` as for ``WorldModel.imagine``. Draws the random numbers that the operators would draw.
    """
    spec, latent = world_model.action_spec, world_model.perception.latent
    if torch.is_grad_enabled() or spec.kind != "discrete" or type(latent) is not CategoricalLatent:
        return None
    if world_model.decision.gradient == "pathwise":  # losses are the same numbers with and without gradients
        return None
    if not can_chain([features, *memory.values(), first_action]):
        return None
    rows, given = features.shape[0], 0 if first_action is None else 1
    out = Rollout(
        features.new_empty(rows, horizon + 1, features.shape[1]),
        features.new_empty(rows, horizon, *latent.shape),
        features.new_empty(rows, horizon, spec.width),
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in memory.items()},
    )
    numbers = _Numbers(rows, len(spec.sizes), latent.shape[0] if latent.config.stochastic else 0, given)
    values = features.new_empty(numbers.count(horizon))
    try:
        chain = _chain(world_model, latent, features, first_action, values, numbers, out)
    except CannotChain:
        return None
    values.uniform_()
    chain.run(rows, horizon, given)
    return out


def roll_out_latents(world_model: "WorldModel", state: State, memory: State, actions: Tensor) -> Tensor | None:
    """The embeddings that ``actions`` (rows, horizon, action width) lead to; None where a chain cannot run.

    Args:
        world_model: whose latent is an embedding.
        state: with "features" and "latent".
        memory: its part of the state, which stays as it is.
        actions: encoded.

    Returns:
        (rows, horizon, latent width).
    """
    latent = world_model.perception.latent
    if torch.is_grad_enabled() or type(latent) is not EmbeddingLatent:
        return None
    if not can_chain([state["features"], state["latent"], *memory.values(), actions]):
        return None
    features, held, actions = (each.contiguous() for each in (state["features"], state["latent"], actions))
    latents = actions.new_empty(*actions.shape[:2], latent.width)
    carried = {name: value.clone(memory_format=torch.contiguous_format) for name, value in memory.items()}
    try:
        chain = _latent_chain(world_model, features, held, actions, carried, latents)
    except CannotChain:
        return None
    chain.run(*actions.shape[:2])
    return latents


def _latent_chain(
    world_model: "WorldModel", features: Tensor, held: Tensor, actions: Tensor, memory: State, latents: Tensor
) -> LayerChain:
    prediction, width, size, moves = world_model.prediction, features.shape[1], held.shape[1], actions.shape[2]
    require_unhooked(prediction)
    chain = LayerChain()
    now = chain.columns(width + moves + size)  # s_t, a_t, z_t
    entered = chain.columns(size + moves)  # z_{t+1}, a_t
    action, latent = now + width, now + width + moves

    chain.load(features, now)
    chain.load(held, latent)

    chain.at("step")
    chain.load(actions, action)
    chain.load(actions, entered + size)
    change, _ = chain.network(prediction.latent, now, width + moves + size)
    chain.add(change, latent, size)
    chain.scale(latent, entered, size, 1, 0)
    chain.store(latent, latents)
    stepped = chain.columns(width)
    chain.linear(world_model.entry, entered, stepped)
    _add_memory(chain, world_model.memory, memory, stepped, now)
    return chain


@dataclasses.dataclass
class _Numbers:
    """Where the random numbers of a step are: each class index of the actions has ``rows``, then each row ``latents``.

    The first ``given`` steps, 0 or 1, have none for actions.
    """

    rows: int
    entries: int
    latents: int
    given: int

    @property
    def stride(self) -> int:
        return self.rows * (self.entries + self.latents)

    def count(self, horizon: int) -> int:
        return horizon * self.stride - self.given * self.rows * self.entries

    def first(self, entry: int) -> int:
        """Of an entry; of the latent for ``entries``. As if the first step had those that are left out."""
        return self.rows * (entry - self.given * self.entries)


def _chain(
    world_model: "WorldModel",
    latent: CategoricalLatent,
    features: Tensor,
    first_action: Tensor | None,
    values: Tensor,
    numbers: _Numbers,
    out: Rollout,
) -> LayerChain:
    spec, decision, prediction = world_model.action_spec, world_model.decision, world_model.prediction
    for module in (decision, prediction):
        require_unhooked(module)
    width, classes, ratio = features.shape[1], latent.shape[1], latent.config.unimix_ratio
    chain = LayerChain()
    now = chain.columns(width + spec.width)  # s_t, a_t
    entered = chain.columns(latent.width + spec.width)  # z_{t+1}, a_t
    action = now + width

    chain.load(features, now)
    chain.store(now, out.features)

    chain.at("chosen")
    logits, _ = chain.network(decision.network, now, width)
    probabilities, start = chain.columns(spec.width), 0
    for index, size in enumerate(spec.sizes):
        chain.softmax(logits + start, probabilities + start, size, size, decision.config.unimix_ratio)
        place = numbers.first(index), (1, numbers.stride)
        chain.sample(probabilities + start, action + start, size, size, values, *place)
        start += size

    if first_action is not None:
        chain.at("given")
        chain.load(first_action[:, None], action)

    chain.at("step")
    chain.store(action, out.actions)
    chain.scale(action, entered + latent.width, spec.width, 1, 0)
    prior, _ = chain.network(prediction.latent, now, width + spec.width)
    chain.softmax(prior, entered, latent.width, classes, ratio)
    latents = out.latents.flatten(2)
    if latent.config.stochastic:
        sampled = chain.columns(latent.width)
        place = numbers.first(len(spec.sizes)), (numbers.latents, numbers.stride)
        chain.sample(entered, sampled, latent.width, classes, values, *place)
        chain.store(sampled, latents)
        chain.scale(sampled, entered, latent.width, 1 - ratio, ratio / classes)
    else:
        chain.store(entered, latents)
    stepped = chain.columns(width)
    chain.linear(world_model.entry, entered, stepped)
    _add_memory(chain, world_model.memory, out.memory, stepped, now)
    chain.store(now, out.features, first=1)
    return chain


def _add_memory(chain: LayerChain, stack: MemoryStack, state: State, x: int, target: int) -> None:
    """A step of the stack from columns ``x`` to ``target``; ``state`` changes in place.

    Raises CannotChain for blocks other than gated convolutions and scans.
    """
    require_unhooked(stack)
    width = stack.norm.normalized_shape[0]
    if stack.tokens > 1:
        raise CannotChain("memory has several tokens")
    block: Any
    norm: Any
    for index, (block, norm) in enumerate(zip(stack.blocks, stack.norms, strict=True)):
        if type(block) not in (GatedConv, Mamba, RotaryMamba):
            raise CannotChain(f"memory has {type(block).__name__}")
        require_unhooked(block)
        normed, outputs = chain.columns(width), chain.columns(width)
        chain.norm(norm, x, normed)
        part = {name: state[f"{index}.{name}"] for name in block.init_state(1)}
        _add_block(chain, block, part, normed, outputs)
        chain.add(outputs, x, width)
    chain.norm(stack.norm, x, target)


def _add_block(chain: LayerChain, block: GatedConv | Mamba, state: State, x: int, target: int) -> None:
    convolution = block.conv1d
    require_unhooked(convolution)
    if type(convolution) is not CausalConv1d:
        raise CannotChain(f"{type(convolution).__name__} in place of a convolution")
    if convolution.activation != (None if isinstance(block, Mamba) else "silu"):  # Mamba applies its own
        raise CannotChain(f"a convolution's activation is {convolution.activation}")
    inner, past = convolution.channels, convolution.kernel_size - 1
    projected, mixed, window = chain.columns(2 * inner), chain.columns(inner), chain.columns(past * inner)
    if past:
        chain.at("before")
        chain.load(state["window"].flatten(1), window)
        chain.at("after")
        chain.store(window, state["window"].flatten(1))
        chain.at("step")
    chain.linear(block.in_proj, x, projected)
    chain.convolve(convolution.weight, convolution.bias, projected, window, mixed)
    chain.silu(mixed, mixed, inner)
    if isinstance(block, Mamba):
        mixed = _add_scan(chain, block, state, mixed)
    chain.silu(projected + inner, projected + inner, inner)
    chain.multiply(projected + inner, mixed, inner)
    chain.linear(block.out_proj, mixed, target)


def _add_scan(chain: LayerChain, block: Mamba, state: State, x: int) -> int:
    size = block.groups * block.d_state
    projections = chain.columns(block.dt_rank + 2 * size)
    delta, outputs = chain.columns(block.d_inner), chain.columns(block.d_inner)
    chain.linear(block.x_proj, x, projections)
    chain.linear(block.dt_proj, projections, delta)
    projections += block.dt_rank
    if isinstance(block, RotaryMamba):
        if block.angle_proj is not None or block.speed_proj is not None:
            raise CannotChain("angles depend on the input")
        chain.rotate(block.angle_rate, projections, state["angle"])
    chain.scan(block.decay(), block.D, x, delta, projections, block.groups, state["scan"], outputs)
    return outputs
