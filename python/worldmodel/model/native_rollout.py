"""Imagination without gradient in one native call, where policy, latent and memory have such layers.

A step of ``WorldModel`` on 64 rows is a hundred operators, whose calls take far longer than their arithmetic. No
gradient passes through the imagined steps of the all-action and REINFORCE gradients.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wmkernels.layers import CannotChain, LayerChain, can_chain, require_unhooked
from wmkernels.nn import CausalConv1d
from worldmodel.data.batch import State
from worldmodel.model.latents import CategoricalLatent
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
    if not can_chain([features, *memory.values(), first_action]):
        return None
    rows, given = features.shape[0], 0 if first_action is None else 1
    out = Rollout(
        features.new_empty(rows, horizon + 1, features.shape[1]),
        features.new_empty(rows, horizon, *latent.shape),
        features.new_empty(rows, horizon, spec.width),
        {name: value.new_empty(value.shape) for name, value in memory.items()},
    )
    numbers = _Numbers(rows, len(spec.sizes), latent.shape[0] if latent.config.stochastic else 0, given)
    values = features.new_empty(numbers.count(horizon))
    try:
        chain = _chain(world_model, latent, features, memory, first_action, values, numbers, out)
    except CannotChain:
        return None
    values.uniform_()
    chain.run(rows, horizon, given)
    return out


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
    memory: State,
    first_action: Tensor | None,
    values: Tensor,
    numbers: _Numbers,
    out: Rollout,
) -> LayerChain:
    spec, decision, prediction = world_model.action_spec, world_model.decision, world_model.prediction
    for module in (decision, decision.network, prediction, prediction.latent):
        require_unhooked(module)
    width, classes, ratio = features.shape[1], latent.shape[1], latent.config.unimix_ratio
    chain = LayerChain()
    now = chain.columns(width + spec.width)  # s_t, a_t
    entered = chain.columns(latent.width + spec.width)  # z_{t+1}, a_t
    action = now + width

    chain.load(features, now)
    chain.store(now, out.features)

    chain.at("chosen")
    logits, probabilities, start = chain.network(decision.network, now), chain.columns(spec.width), 0
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
    chain.softmax(chain.network(prediction.latent, now), entered, latent.width, classes, ratio)
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
    _add_memory(chain, world_model.memory, memory, stepped, now, out.memory)
    chain.store(now, out.features, first=1)
    return chain


def _add_memory(chain: LayerChain, stack: MemoryStack, state: State, x: int, target: int, after: State) -> None:
    """A step of the stack from columns ``x`` to ``target``; raises CannotChain for other blocks than ``GatedConv``."""
    require_unhooked(stack)
    width = stack.norm.normalized_shape[0]
    for index, (block, norm) in enumerate(zip(stack.blocks, stack.norms, strict=True)):
        if type(block) is not GatedConv or type(block.conv1d) is not CausalConv1d or stack.tokens > 1:
            raise CannotChain(f"memory has {type(block).__name__}, or several tokens")
        require_unhooked(block)
        require_unhooked(block.conv1d)
        inner, past = block.conv1d.channels, block.conv1d.kernel_size - 1
        window = chain.columns(past * inner)
        normed, projected, mixed, outputs = (chain.columns(size) for size in (width, 2 * inner, inner, width))
        name = f"{index}.window"
        if past:
            chain.at("before")
            chain.load(_rows(state[name]), window)
            chain.at("after")
            chain.store(window, _rows(after[name]))
            chain.at("step")
        chain.norm(norm, x, normed)
        chain.linear(block.in_proj, normed, projected)
        chain.convolve(block.conv1d.weight, block.conv1d.bias, projected, window, mixed)
        chain.silu(mixed, mixed, inner)
        chain.silu(projected + inner, projected + inner, inner)
        chain.multiply(projected + inner, mixed, inner)
        chain.linear(block.out_proj, mixed, outputs)
        chain.add(outputs, x, width)
    chain.norm(stack.norm, x, target)


def _rows(window: Tensor) -> Tensor:
    if not window.is_contiguous():
        raise CannotChain("a window is not contiguous")
    return window.flatten(1)
