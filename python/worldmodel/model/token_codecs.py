"""Tokens of a view: how they enter the memory, how they are predicted, and when two are the same.

IndexTokens   a grid of classes, predicted as categorical
PatchTokens   patches of pixels, predicted as numbers
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenCodec(Protocol):
    """Attributes: ``outputs``, numbers per token that the head predicts."""

    outputs: int

    def empty(self, batch_size: int) -> Tensor:
        """Tokens of no view, (batch, places, *token)."""
        ...

    def tokens(self, observations: Tensor) -> Tensor:
        """Observations (..., *shape) as tokens (..., places, *token)."""
        ...

    def observations(self, tokens: Tensor) -> Tensor:
        """The inverse."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """(..., places, *token) -> (..., places, width)."""
        ...

    def loss(self, outputs: Tensor, tokens: Tensor) -> Tensor:
        """(..., places, outputs), (..., places, *token) -> (..., places)."""
        ...

    def mode(self, outputs: Tensor) -> Tensor:
        """The likeliest tokens, (..., places, *token)."""
        ...

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Tokens, (..., places, *token)."""
        ...

    def certainty(self, outputs: Tensor) -> Tensor:
        """Probability of the likeliest token, (..., places); 1 where it is not known."""
        ...

    def same(self, one: Tensor, other: Tensor) -> Tensor:
        """Whether tokens are the same, bool (...), for (..., *token)."""
        ...


class IndexTokens(nn.Module):
    """Classes: observations int64 (..., places) or (..., rows, columns)."""

    def __init__(self, classes: int, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.outputs, self.grid = classes, grid
        self.embedding = nn.Embedding(classes, width)

    def empty(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, math.prod(self.grid), dtype=torch.long)

    def tokens(self, observations: Tensor) -> Tensor:
        flat = observations.shape[-1] == math.prod(self.grid)
        return (observations if flat else observations.flatten(-2)).long()

    def observations(self, tokens: Tensor) -> Tensor:
        return tokens

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def loss(self, outputs: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        probabilities = outputs.softmax(-1)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return drawn.view(outputs.shape[:-1])

    def certainty(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1).amax(-1)

    def same(self, one: Tensor, other: Tensor) -> Tensor:
        return one == other


class PatchTokens(nn.Module):
    """Square patches of pictures: observations uint8 or float in [0, 1], (..., height, width, channels).

    A token is a patch flattened, in [0, 1]. Two are the same if they differ by less than ``tolerance`` (root mean
    square); a prediction is the mean of what may be there.
    """

    def __init__(
        self, patch: int, grid: tuple[int, int], width: int, channels: int = 3, tolerance: float = 0.1
    ) -> None:
        super().__init__()
        self.patch, self.grid, self.channels, self.tolerance = patch, grid, channels, tolerance
        self.outputs = patch * patch * channels
        self.encode = nn.Linear(self.outputs, width)

    def empty(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, math.prod(self.grid), self.outputs)

    def tokens(self, observations: Tensor) -> Tensor:
        if observations.dtype == torch.uint8:
            observations = observations.float() / 255
        rows, columns = self.grid
        split = observations.unflatten(-3, (rows, self.patch)).unflatten(-2, (columns, self.patch))
        return split.transpose(-4, -3).flatten(-3).flatten(-3, -2)  # (..., rows * columns, patch * patch * channels)

    def observations(self, tokens: Tensor) -> Tensor:
        rows, columns = self.grid
        split = tokens.unflatten(-1, (self.patch, self.patch, self.channels)).unflatten(-4, (rows, columns))
        return split.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.encode(tokens - 0.5)

    def loss(self, outputs: Tensor, tokens: Tensor) -> Tensor:
        return (outputs - tokens).square().sum(-1)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.clamp(0, 1)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.mode(outputs)

    def certainty(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs[..., 0])

    def same(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).square().mean(-1) < self.tolerance**2
