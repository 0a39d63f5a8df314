"""Recall of the newest value of a key, soon after it was stored or long after.

A token stores a value under a key, or asks for the newest value of a key. Half of the questions are about keys stored
within the window of windowed attention, which reads them off; the others must be held by a state.
"""

import torch
from torch import Tensor

KEYS, VALUES = 24, 8
CLASSES = KEYS * VALUES + KEYS  # what stores, what asks
TIME = 128
NEAR = 8  # steps, those of the window


def batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (rows, TIME), the answers where a token asks, -1 elsewhere, and how many steps ago they were stored."""
    tokens, answers, ages = (torch.empty(rows, TIME, dtype=torch.long) for _ in range(3))
    row = torch.arange(rows)
    value = torch.zeros(rows, KEYS, dtype=torch.long)
    stored = torch.zeros(rows, KEYS, dtype=torch.long)  # when
    asks = torch.rand(TIME, rows, generator=generator) < 0.5
    asks[:KEYS] = False
    near = torch.rand(TIME, rows, 1, generator=generator) < 0.5
    order = torch.rand(TIME, rows, KEYS, generator=generator)
    new = torch.randint(VALUES, (TIME, rows), generator=generator)
    for t in range(TIME):
        fits = (t - stored < NEAR) == near[t]
        key = torch.where(asks[t], (order[t] + fits).argmax(1), order[t].argmax(1) if t >= KEYS else t)
        value[row, key] = torch.where(asks[t], value[row, key], new[t])
        stored[row, key] = torch.where(asks[t], stored[row, key], t)
        tokens[:, t] = torch.where(asks[t], KEYS * VALUES + key, key * VALUES + new[t])
        answers[:, t] = torch.where(asks[t], value[row, key], -1)
        ages[:, t] = t - stored[row, key]
    return tokens, answers, ages
