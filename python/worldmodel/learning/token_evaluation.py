"""Evaluation of a ``TokenWorldModel``: cells that come back into view, by how long they were out of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.data.batch import State
from worldmodel.environments.grids import Worlds
from worldmodel.environments.returning import Predictor, Score, score
from worldmodel.learning.token_trainer import predict
from worldmodel.learning.view_sources import batch_of
from worldmodel.model.tokens import TokenWorldModel


class TokenPredictor:
    """A model as a predictor of ``environments.returning``: its state goes on from part to part.

    Pixels are predicted as the class of the nearest colour.

    Args:
        model: to be evaluated.
        worlds: as they are before the first part.
    """

    def __init__(self, model: TokenWorldModel, worlds: Worlds) -> None:
        self.model, self.agents = model, worlds.agents
        self.colours = torch.from_numpy(worlds.colours).float() / 255
        self.positions = worlds.positions
        self.state: State | None = None

    @torch.no_grad()
    def __call__(self, steps: Mapping[str, Tensor]) -> Tensor:
        batch = batch_of(steps, self.positions)
        prediction, self.state = predict(self.model, batch, self.state)
        classes = self._classes(prediction.outputs)
        if self.agents == 1:
            return classes
        self.positions = self.positions + steps["displacement"].sum(2).to(self.positions)
        return classes.unflatten(1, (-1, self.agents)).transpose(1, 2)

    def _classes(self, outputs: Tensor) -> Tensor:
        if self.model.config.patch == 0:
            return outputs.argmax(-1)
        pixels = self.model.codec.pixels(self.model.codec.mode(outputs))
        mean = pixels.unflatten(-1, (-1, 3)).mean(-2)  # (batch, time, places, colour)
        return torch.cdist(mean, self.colours).argmin(-1)


def evaluate_returning(model: TokenWorldModel, worlds: Worlds, steps: int, chunk: int = 256) -> Score:
    """Scores the model on ``steps`` steps of new ``worlds``; memory is constant in their number."""
    training = model.training
    predictors: dict[str, Predictor] = {"model": TokenPredictor(model.eval(), worlds)}
    found = score(worlds, predictors, steps, chunk)["model"]
    model.train(training)
    return found
