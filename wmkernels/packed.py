"""Packed sequences, one after the other: for the forms in plain PyTorch."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import require_sequences


def by_sequence(
    op: str,
    run: Callable[[Any], tuple[Tensor, Any]],
    inputs: Any,
    timed: Sequence[str],
    firsts: Sequence[str],
    dim: int,
) -> tuple[Tensor, Any]:
    """``run`` for each sequence of an op's ``inputs``.

    Args:
        op: for the error.
        run: canonical inputs -> (out, last_state), a tensor or a named tuple.
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
    return torch.cat(outputs, dim), _cat(states)


def _cat(states: list[Any]) -> Any:
    """Of tensors, or of named tuples of tensors and None."""
    if isinstance(states[0], Tensor):
        return torch.cat(states)
    return type(states[0])(*(None if x[0] is None else torch.cat(x) for x in zip(*states, strict=True)))
