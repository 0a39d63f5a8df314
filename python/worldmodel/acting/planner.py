"""Planning: actions of least cost under a model, by samples or by gradient, for many states at once.

    cem        the cross-entropy method (Rubinstein 1999): refit a normal distribution to the best samples
    mppi       path integrals (Williams et al. 2017): the mean of all samples, weighted by exp(-cost)
    gradient   the best samples, improved by Adam through the model

White noise seldom leaves a room, and the mean of two ways is none. So every round tries, beside the method's own
samples, fresh plans whose actions are constant over random times, and variations of the best plan so far, with several
persistences side by side. The first round is larger, and half of it are variations of the previous plan.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Positive, Share, Size, Weight

Rollout = Callable[[Any, Tensor], Any]
"""State of some rows, and actions (rows, samples, horizon, action width) -> what a cost reads, or costs themselves."""
Cost = Callable[[Any], Tensor]
"""What the rollout returns -> costs (rows, samples)."""
Project = Callable[[Tensor], Tensor]
"""Actions (..., action width) -> the nearest that are allowed."""


@dataclasses.dataclass(frozen=True)
class PlannerConfig(Checked):
    """How plans are searched.

    Attributes:
        method: "cem", "mppi" or "gradient".
        horizon: actions of a plan.
        samples: plans that are tried per iteration.
        first: how many times as many are tried in the first one.
        iterations: rounds of trying; of "gradient", one of sampling and the steps after it.
        elites: samples that CEM refits to, and that "gradient" improves.
        std: initial standard deviation of actions.
        min_std: added to the elites' standard deviation.
        temperature: of MPPI, in standard deviations of the costs.
        learning_rate: of "gradient", in units of actions.
        fresh: share of each round's samples that are fresh, and again of those near the best plan so far.
        turns: probabilities per action that a fresh plan turns; samples share them equally.
        rests: probability that a fresh plan rests until it turns.
        correlations: of the method's own samples from one action to the next; samples share them equally.
        elitism: whether the best plan of all rounds is kept and returned, instead of the last mean.
    """

    method: Literal["cem", "mppi", "gradient"] = "cem"
    horizon: Size = 24
    samples: Annotated[int, Bounds(4, 2**20)] = 128
    first: Annotated[int, Bounds(1, 1024)] = 8
    iterations: Annotated[int, Bounds(1, 10_000)] = 5
    elites: Size = 6
    std: Positive = 1.0
    min_std: Weight = 0.1
    temperature: Positive = 0.2
    learning_rate: Positive = 0.1
    fresh: Annotated[float, Bounds(0, 0.5)] = 0.25
    turns: Annotated[tuple[Share, ...], Bounds(1, 64)] = (0.06, 0.12, 0.25, 0.5)
    rests: Share = 0.15
    correlations: Annotated[tuple[Share, ...], Bounds(1, 64)] = (0.0, 0.5, 0.8, 0.95)
    elitism: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.elites > self.samples:
            raise ConfigurationError(
                f"PlannerConfig: elites is {self.elites} and samples {self.samples}, expected elites <= samples"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of some rows.

    Attributes:
        actions: (rows, horizon, action width).
        cost: of ``actions``, (rows,).
        costs: least cost of each iteration, (iterations, rows).
    """

    actions: Tensor
    cost: Tensor
    costs: Tensor


class Planner:
    """Searches actions of least cost.

    Args:
        rollout: of the model; for "gradient" differentiable in the actions.
        cost: of what ``rollout`` returns; None if that is the cost.
        width: of an action.
        config: of the search.
        project: makes actions allowed; clamps them to -1 and 1 if None.
        generator: of samples; or one per row, so that a row is drawn alike beside any others.

    Raises:
        ValueError: in ``plan``, costs of another shape, or without a number in some row; generators of other rows.

    Example:
        >>> target = torch.tensor([[0.5, -0.2], [-1.0, 1.0]])
        >>> def rollout(position, actions):                                # a point that moves by .2 of each action
        ...     return position[:, None, None] + 0.2 * actions.cumsum(2)   # (rows, samples, horizon, 2)
        >>> def cost(path):
        ...     return (path[:, :, -1] - target[:, None]).norm(dim=-1)
        >>> generator = torch.Generator().manual_seed(0)
        >>> planner = Planner(rollout, cost, 2, PlannerConfig(horizon=8), generator=generator)
        >>> plan = planner.plan(torch.zeros(2, 2), rows=2)
        >>> plan.actions.shape, bool((plan.cost < 0.1).all())
        (torch.Size([2, 8, 2]), True)
    """

    def __init__(
        self,
        rollout: Rollout,
        cost: Cost | None,
        width: int,
        config: PlannerConfig | None = None,
        *,
        project: Project | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> None:
        self.rollout, self.cost, self.width = rollout, cost, width
        self.config = config or PlannerConfig()
        self.project = project or _clamped
        self.generator = generator

    def plan(self, state: Any, rows: int, warm_start: Tensor | None = None, cost: Cost | None = None) -> Plan:
        """Plans for all rows of ``state``.

        Args:
            state: for ``rollout``.
            rows: of it.
            warm_start: actions to begin with, (rows, horizon, action width), such as ``shifted`` ones; zeros if None.
            cost: replaces the planner's.

        Raises:
            ValueError: a warm start of another shape, or as for ``Planner``.
        """
        shape = rows, self.config.horizon, self.width
        mean = torch.zeros(shape) if warm_start is None else warm_start.detach()
        if mean.shape != shape:
            raise ValueError(f"Planner.plan: warm_start has shape {tuple(mean.shape)}, expected {shape}")
        if isinstance(self.generator, Sequence) and len(self.generator) != rows:
            raise ValueError(f"Planner.plan: there are {len(self.generator)} generators, expected one for {rows} rows")
        cost = cost or self.cost
        if self.config.method == "gradient":
            return self._descend(state, mean, cost)
        return self._sample(state, mean, cost)

    def _sample(self, state: Any, mean: Tensor, cost: Cost | None) -> Plan:
        config, std = self.config, torch.full_like(mean, self.config.std)
        best: Tensor | None = None
        least: list[Tensor] = []
        with torch.no_grad():
            for iteration in range(config.iterations):
                tried = self._proposals(mean, std, best, iteration)
                costs = self._costs(state, tried, cost)
                order = costs.topk(config.elites, 1, largest=False)
                elites = _taken(tried, order.indices)
                best = elites[:, 0]
                least.append(order.values[:, 0])
                if config.method == "cem":
                    mean = elites.mean(1)
                    std = (elites - mean[:, None]).square().mean(1).sqrt() + config.min_std
                else:
                    weights = self._weights(costs)[..., None, None]
                    mean = (weights * tried).sum(1)
                    std = (weights * (tried - mean[:, None]).square()).sum(1).sqrt() + config.min_std
            if config.elitism and best is not None:
                return Plan(best, least[-1], torch.stack(least))
            mean = self.project(mean)
            return Plan(mean, self._costs(state, mean[:, None], cost)[:, 0], torch.stack(least))

    def _descend(self, state: Any, mean: Tensor, cost: Cost | None) -> Plan:
        config = self.config
        with torch.no_grad():
            tried = self._proposals(mean, torch.full_like(mean, config.std), None, 0)
            costs = self._costs(state, tried, cost)
            order = costs.topk(config.elites, 1, largest=False)
            improved = _taken(tried, order.indices)
        best, least = improved[:, 0].clone(), [order.values[:, 0]]
        with torch.enable_grad():
            improved.requires_grad_()
            adam = torch.optim.Adam([improved], config.learning_rate)
            for iteration in range(config.iterations):
                costs = self._costs(state, improved, cost)
                index = costs.detach().argmin(1, keepdim=True)
                here, found = costs.detach().gather(1, index)[:, 0], _taken(improved.detach(), index)[:, 0]
                better = here < least[-1] if config.elitism else torch.ones_like(here, dtype=torch.bool)
                best = torch.where(better[:, None, None], found, best)
                least.append(torch.where(better, here, least[-1]))
                if iteration + 1 < config.iterations:
                    (improved.grad,) = torch.autograd.grad(costs.nan_to_num(0, 0, 0).sum(), improved)
                    adam.step()
                    with torch.no_grad():
                        improved.copy_(self.project(improved))
        return Plan(best, least[-1], torch.stack(least[1:]))

    def _costs(self, state: Any, actions: Tensor, cost: Cost | None) -> Tensor:
        """(rows, samples), infinite instead of NaN."""
        found = self.rollout(state, actions)
        costs: Tensor = found if cost is None else cost(found)
        expected = tuple(actions.shape[:2])
        if not isinstance(costs, Tensor) or tuple(costs.shape) != expected:
            shape = tuple(costs.shape) if isinstance(costs, Tensor) else type(costs).__name__
            raise ValueError(f"Planner: costs are {shape}, expected (rows, samples) {expected}")
        costs = torch.where(costs.isnan(), torch.inf, costs)
        if not bool((costs < torch.inf).any(1).all()):
            row = int((costs < torch.inf).any(1).int().argmin())
            raise ValueError(f"Planner: all costs of row {row} are NaN or infinite, expected one finite cost at least")
        return costs

    def _weights(self, costs: Tensor) -> Tensor:
        finite = torch.where(costs.isfinite(), costs, costs.amin(1, keepdim=True))
        scale = finite.std(1, keepdim=True).clamp_min(1e-9) * self.config.temperature
        return (-(costs - costs.amin(1, keepdim=True)) / scale).softmax(1)

    def _proposals(self, mean: Tensor, std: Tensor, best: Tensor | None, iteration: int) -> Tensor:
        """(rows, samples, horizon, width), ``mean`` and ``best`` first."""
        config = self.config
        count = min(int(config.fresh * config.samples), (config.samples - 2) // 2)  # beside the mean and the best
        parts = [mean[:, None]]
        if best is None:
            samples = config.first * config.samples
            count = samples // 2
            parts.append(mean[:, None] + self._held(mean, samples - count - 1))
        else:
            if config.elitism:
                parts.append(best[:, None])
            parts.append(best[:, None] + 0.5**iteration * self._held(mean, count))
            parts.append(self._around(mean, std, config.samples - 2 * count - len(parts) + 1))
        parts.append(self._held(mean, count))
        return self.project(torch.cat(parts, 1))

    def _held(self, like: Tensor, samples: int) -> Tensor:
        """Noise that is constant over random times, or zero: (rows, samples, horizon, width)."""
        config, (rows, horizon, width) = self.config, like.shape
        shape = rows, samples, horizon
        probability = _shared(config.turns, samples).to(like)[:, None]
        turn = self._uniform(shape, like) < probability
        turn[..., 0] = True
        since = torch.where(turn, torch.arange(horizon, device=like.device), 0).cummax(-1).values
        noise = 1.5 * config.std * self._noise(shape, like)
        noise = noise * (self._uniform(shape, like) >= config.rests)[..., None]
        return noise.gather(2, since[..., None].expand(-1, -1, -1, width))

    def _around(self, mean: Tensor, std: Tensor, samples: int) -> Tensor:
        """Normal, correlated in time: (rows, samples, horizon, width)."""
        rows, horizon, _ = mean.shape
        rho = _shared(self.config.correlations, samples).to(mean)[:, None]
        noise = self._noise((rows, samples, horizon), mean)
        steps = [noise[:, :, 0]]
        for step in range(1, horizon):
            steps.append(rho * steps[-1] + (1 - rho.square()).sqrt() * noise[:, :, step])
        return mean[:, None] + std[:, None] * torch.stack(steps, 2)

    def _uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._drawn(torch.rand, shape).to(like)

    def _noise(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._drawn(torch.randn, (*shape, self.width)).to(like)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        if isinstance(self.generator, Sequence):
            return torch.stack([draw(*shape[1:], generator=each) for each in self.generator])
        return draw(*shape, generator=self.generator)


def shifted(actions: Tensor, taken: int) -> Tensor:
    """A plan (rows, horizon, width) after its first ``taken`` actions, with zeros at its end: a warm start."""
    return torch.cat([actions[:, taken:], torch.zeros_like(actions[:, :taken])], 1)


def within_norm(longest: float) -> Project:
    """Shortens actions whose Euclidean norm is above ``longest``."""

    def project(actions: Tensor) -> Tensor:
        return actions * (longest / actions.norm(dim=-1, keepdim=True).clamp_min(longest))

    return project


def _clamped(actions: Tensor) -> Tensor:
    return actions.clamp(-1, 1)


def _shared(values: tuple[float, ...], samples: int) -> Tensor:
    """Each of ``values`` in turn, (samples,)."""
    return torch.tensor(values).repeat(-(-samples // len(values)))[:samples]


def _taken(plans: Tensor, index: Tensor) -> Tensor:
    """(rows, samples, horizon, width) at index (rows, chosen)."""
    return plans.gather(1, index[..., None, None].expand(-1, -1, *plans.shape[2:]))
