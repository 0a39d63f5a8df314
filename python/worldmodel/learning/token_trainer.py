"""Training of a ``TokenWorldModel`` on views."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from worldmodel.data.batch import State
from worldmodel.learning.timed import Rate, ScheduledConfig, Timed, scheduled_step
from worldmodel.learning.view_sources import ViewBatch, ViewSource, pad_step
from worldmodel.model.motion import LearnedMotion
from worldmodel.model.tokens import TokenConfig, TokenPrediction, TokenWorldModel
from worldmodel.runs.fields import Bounds, Limit, Positive, Size, Weight


@dataclasses.dataclass(frozen=True)
class TokenTrainConfig(ScheduledConfig):
    """How a ``TokenWorldModel`` is trained.

    Attributes:
        batch_size: episodes per update.
        steps: per episode.
        new_weight: of the loss of tokens never seen before, which nothing can tell: small, and not 0, so that the model
            remains uncertain there.
        in_view_weight: of tokens that the view before showed.

    The others are of ``ScheduledConfig``.
    """

    batch_size: Size = 32
    steps: Annotated[int, Bounds(2, 2**20)] = 128
    new_weight: Weight = 0.1
    in_view_weight: Weight = 0.0
    minutes: Positive = dataclasses.field(default=0.5, kw_only=True)
    lr: Rate = dataclasses.field(default=5e-3, kw_only=True)
    warmup: Limit = dataclasses.field(default=20, kw_only=True)
    cooldown: Annotated[float, Bounds(0, 1, above=True)] = dataclasses.field(default=0.4, kw_only=True)


def predict(
    model: TokenWorldModel, batch: ViewBatch, state: Mapping[str, Tensor] | None = None, *, hindsight: bool = False
) -> tuple[TokenPrediction, State]:
    """The prediction of each step's next view, of the batch's steps or, in ``hindsight``, of all its views."""
    if hindsight:
        views, actions = batch.views, pad_step(batch.actions)
    else:
        views, actions = batch.views[:, :-1], batch.actions
    reset = None if batch.is_first is None else batch.is_first[:, : views.shape[1]]
    return model(views, actions, state, reset, **batch.motion(padded=hindsight), hindsight=hindsight)


def token_loss(model: TokenWorldModel, batch: ViewBatch, config: TokenTrainConfig) -> tuple[Tensor, dict[str, float]]:
    """Loss of an update, and its parts. Raises ValueError for a model of rewards where the batch has none."""
    steps = batch.actions.shape[1]
    prediction, _ = predict(model, batch, hindsight=isinstance(model.motion, LearnedMotion))
    target = model.codec.tokens(batch.views[:, 1:] if batch.target is None else batch.target)
    losses = model.codec.loss(prediction.outputs[:, :steps], target)  # (batch, time, places)
    weights = torch.ones_like(losses)
    if batch.gap is not None:
        weights = torch.where(batch.gap == 0, config.in_view_weight, torch.where(batch.gap < 0, config.new_weight, 1.0))
    follows = torch.ones(batch.actions.shape) if batch.is_first is None else (~batch.is_first[:, 1:]).float()
    weights = weights * follows[..., None]
    total = (losses * weights).sum() / weights.sum().clamp(min=1)
    metrics = {"token_loss": float(total.detach())}
    if batch.gap is not None:
        known = (batch.gap > 0) & follows.bool()[..., None]
        right = model.codec.same(model.codec.mode(prediction.outputs[:, :steps]), target)
        metrics["returning"] = float((right & known).sum() / known.sum().clamp(min=1))
    path = prediction.path
    if path is not None and path.prior is not None and path.posterior is not None:
        prior, posterior = path.prior[:, :steps], path.posterior[:, 1:]
        moves = (-(posterior.exp() * prior).sum(-1) * follows).sum() / follows.sum().clamp(min=1)
        metrics |= {
            "move_loss": float(moves.detach()),
            "moves": float((prior.argmax(-1) == posterior.argmax(-1)).float().mean()),
        }
        total = total + moves
    if model.scalars:
        if batch.rewards is None or batch.terminated is None:
            raise ValueError("token_loss: the model predicts rewards, and the batch has none: turn model.rewards off")
        scalars = model.scalar_losses(prediction.features[:, :steps], batch.rewards, batch.terminated, follows)
        metrics |= {f"{name}_loss": float(loss.detach()) for name, loss in scalars.items()}
        total = total + sum(scalars.values())
    return total, metrics


class TokenTrainer(Timed):
    """Trains on batches of a source.

    Attributes:
        model: what is trained.
        updates: so far.
        seconds: of training, by ``config.clock``, over all processes.
    """

    def __init__(self, model: TokenConfig, config: TokenTrainConfig, source: ViewSource) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.config, self.source = config, source
        self.model = TokenWorldModel(model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        )

    def iterate(self) -> dict[str, float]:
        """An update; returns its metrics.

        Raises:
            ArithmeticError: a loss or gradient that is not finite.
        """
        with self.timing():
            batch = self.source.sample(self.config.batch_size, self.config.steps)
            if not self.updates:
                self.model.begin(batch.views)
            loss, metrics = token_loss(self.model, batch, self.config)
            self.optimizer.zero_grad()
            loss.backward()
            norm = scheduled_step(self.optimizer, self.config, self.updates, self.progress)
            self.updates += 1
        return {"loss": float(loss.detach()), "grad_norm": norm, **metrics}

    def state_dict(self) -> dict[str, Any]:
        """For ``Run.save``: parts by name."""
        trainer = {"updates": self.updates, "seconds": self.seconds, "random": {"torch": torch.get_rng_state()}}
        return {
            "token_model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": trainer | {"source": self.source.state_dict()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.model.load_state_dict(saved["token_model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.updates, self.seconds = int(saved["trainer"]["updates"]), float(saved["trainer"]["seconds"])
        torch.set_rng_state(saved["trainer"]["random"]["torch"])
        self.source.load_state_dict(saved["trainer"]["source"])
