"""Packed sequences, one after the other: for the forms in plain PyTorch."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import require_sequences


def by_sequence(
    op: str,
    run: Callable[[Any], tuple[Tensor, Tensor]],
    inputs: Any,
    timed: Sequence[str],
    firsts: Sequence[str],
    dim: int,
) -> tuple[Tensor, Tensor]:
    """``run`` for each sequence of an op's ``inputs``.

    Args:
        op: for the error.
        run: canonical inputs -> (out, last_state).
        inputs: with ``cu_seqlens``.
        timed: fields with time in dimension ``dim``, as the output; the first of them is not None.
        firsts: fields with a row per sequence.
        dim: of time.
    """
    require_sequences(op, inputs.cu_seqlens, getattr(inputs, timed[0]).shape[dim])
    outputs, states = [], []
    for index, (start, end) in enumerate(pairwise(inputs.cu_seqlens.tolist())):
        own: dict[str, Any] = {"cu_seqlens": None}
        for names, along, first, size in ((timed, dim, start, end - start), (firsts, 0, index, 1)):
            for name in names:
                x = getattr(inputs, name)
                own[name] = None if x is None else x.narrow(along, first, size)
        out, state = run(inputs._replace(**own))
        outputs.append(out)
        states.append(state)
    return torch.cat(outputs, dim), torch.cat(states)
