"""Tokens of a view: how they enter the memory, how they are predicted, and when two are the same.

IndexTokens      a grid of classes, predicted as categorical
PatchTokens      patches of pixels, predicted as numbers
CodebookTokens   patches of pixels, predicted as the class of the nearest entry of a codebook
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 0.1  # root mean square, of pixels in [0, 1], below which patches are the same
MOST_PATCHES = 2**15  # that a codebook is chosen from


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

    def pixels(self, tokens: Tensor) -> Tensor:
        """Tokens of pictures as patches, (..., places, pixels); others as they are."""
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

    def pixels(self, tokens: Tensor) -> Tensor:
        return tokens

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def loss(self, outputs: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        probabilities = outputs.softmax(-1)
        sampled = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return sampled.view(outputs.shape[:-1])

    def certainty(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1).amax(-1)

    def same(self, one: Tensor, other: Tensor) -> Tensor:
        return one == other


class Patches:
    """Pictures cut into square patches: uint8 or float in [0, 1], (..., height, width, 3)."""

    def __init__(self, patch: int, grid: tuple[int, int]) -> None:
        self.patch, self.grid, self.size = patch, grid, patch * patch * 3

    def cut(self, pictures: Tensor) -> Tensor:
        """(..., places, size), in [0, 1]."""
        if pictures.dtype == torch.uint8:
            pictures = pictures.float() / 255
        rows, columns = self.grid
        split = pictures.unflatten(-3, (rows, self.patch)).unflatten(-2, (columns, self.patch))
        return split.transpose(-4, -3).flatten(-3).flatten(-3, -2)

    def join(self, patches: Tensor) -> Tensor:
        """The inverse."""
        split = patches.unflatten(-1, (self.patch, self.patch, 3)).unflatten(-4, self.grid)
        return split.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)


class PatchTokens(nn.Module):
    """Patches as numbers; a prediction is the mean of what may be there.

    Two are the same if they differ by less than ``TOLERANCE``.
    """

    def __init__(self, patch: int, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.patches = Patches(patch, grid)
        self.outputs = self.patches.size
        self.encode = nn.Linear(self.outputs, width)

    def empty(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, math.prod(self.patches.grid), self.outputs)

    def tokens(self, observations: Tensor) -> Tensor:
        return self.patches.cut(observations)

    def observations(self, tokens: Tensor) -> Tensor:
        return self.patches.join(tokens)

    def pixels(self, tokens: Tensor) -> Tensor:
        return tokens

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
        return (one - other).square().mean(-1) < TOLERANCE**2


class CodebookTokens(IndexTokens):
    """Patches as the class of the nearest entry of a codebook, which is chosen once, before training."""

    codebook: Tensor
    used: Tensor

    def __init__(self, classes: int, patch: int, grid: tuple[int, int], width: int) -> None:
        super().__init__(classes, grid, width)
        self.patches = Patches(patch, grid)
        self.register_buffer("codebook", torch.zeros(classes, self.patches.size))
        self.register_buffer("used", torch.tensor(1))

    def tokens(self, observations: Tensor) -> Tensor:
        return self.nearest(self.patches.cut(observations))

    def observations(self, tokens: Tensor) -> Tensor:
        return self.patches.join(self.pixels(tokens))

    def pixels(self, tokens: Tensor) -> Tensor:
        return self.codebook[tokens]

    @torch.no_grad()
    def choose(self, observations: Tensor, rounds: int = 4) -> None:
        """Patches that differ by more than ``TOLERANCE``, farthest first, then means of what is nearest to each."""
        patches = self.patches.cut(observations).flatten(0, -2)[:MOST_PATCHES]
        nearest = torch.full((len(patches),), math.inf)
        for entry in range(len(self.codebook)):
            farthest = int(nearest.argmax())
            if float(nearest[farthest]) < TOLERANCE**2:
                break
            self.codebook[entry] = patches[farthest]
            self.used.fill_(entry + 1)
            nearest = nearest.minimum((patches - patches[farthest]).square().mean(-1))
        for _ in range(rounds):
            of = self.nearest(patches)
            count = torch.bincount(of, minlength=len(self.codebook))
            total = torch.zeros_like(self.codebook).index_add_(0, of, patches)
            self.codebook.copy_(torch.where(count[:, None] > 0, total / count[:, None], self.codebook))

    def nearest(self, patches: Tensor) -> Tensor:
        """Class of the nearest entry of (..., pixels), in [0, 1]: (...)."""
        known = self.codebook[: int(self.used)]
        return torch.cdist(patches.flatten(0, -2), known).argmin(-1).view(patches.shape[:-1])
