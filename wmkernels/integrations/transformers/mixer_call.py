"""What a mixer's call knows and the functions inside it are not told: packed sequences, and Mamba-1's cached state."""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_tracing_state

calls: Counter[str] = Counter()


PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seqlens")


class Packing(NamedTuple):
    """Where packed sequences start, as a model was told.

    Attributes:
        arguments: of ``PACKING``, those given.
        checkpointed: whether layers run again in the backward pass, where the model's arguments are gone.
    """

    arguments: dict[str, Tensor]
    checkpointed: bool


class MixerCall(NamedTuple):
    """A running call of a mixer.

    Attributes:
        reset: bool (batch, time), true where a packed sequence starts, or None.
        states: initial states of the scans to come in this call, in order; empty at the start of a sequence.
    """

    reset: Tensor | None
    states: list[Tensor]


_running = threading.local()


def current() -> MixerCall | None:
    """The innermost call of a mixer in this thread."""
    return getattr(_running, "call", None)


def count(name: str) -> None:
    """Counts a call for ``report()``; a compiled graph does not count."""
    if not torch.compiler.is_compiling():
        calls[name] += 1


def is_recorded() -> bool:
    """Whether an exporter or tracer records the call: its graph holds the library's own operators."""
    return torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and _get_tracing_state() is not None)


def given_packing(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arguments of ``PACKING`` that are given."""
    return {name: arguments[name] for name in PACKING if arguments.get(name) is not None}


def with_packing(call: Callable[..., Any]) -> Callable[..., Any]:
    """``__call__`` of a model that tells its mixers where packed sequences start, which some models do not."""

    @functools.wraps(call)
    def model_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = given_packing(kwargs)
        if not given:
            return call(self, *args, **kwargs)
        outer = getattr(_running, "packing", None)
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        _running.packing = Packing(given, self.training and checkpointed)
        try:
            return call(self, *args, **kwargs)
        finally:
            _running.packing = outer

    return model_call


def packed_reset(arguments: Mapping[str, Any], batch: int, time: int, device: torch.device) -> Tensor | None:
    """Where packed sequences start, without the first step; None where nothing is packed.

    Args:
        arguments: of the mixer; else those of the model are read: ``seq_idx``, (batch, time), ``cu_seq_lens_q`` or
            ``cu_seqlens``, (sequences + 1,).
        batch: of the mixer's inputs.
        time: of the mixer's inputs.
        device: of the mixer's inputs.

    Raises:
        ValueError: another shape, or layers that run again without those arguments.
    """
    if time == 1:
        return None
    given, told = given_packing(arguments), getattr(_running, "packing", None)
    if not given and told is not None:
        if told.checkpointed:
            raise ValueError(
                f"{', '.join(told.arguments)} with gradient checkpointing: this model does not pass it to its layers, "
                "which run again in the backward pass; turn gradient checkpointing off"
            )
        given = told.arguments
    if not given:
        return None
    reset = torch.zeros(batch, time, dtype=torch.bool, device=device)
    seq_idx, bounds = given.get("seq_idx"), given.get("cu_seq_lens_q", given.get("cu_seqlens"))
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (batch, time):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, expected (batch={batch}, time={time})")
        reset[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if bounds is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q with a batch of {batch}, expected 1: packed sequences lie along time")
        inner = bounds[1:-1].to(device)
        reset[0, inner[(inner > 0) & (inner < time)].long()] = True
    return reset


def require_one(mixer: object, reset: Tensor | None, state: object) -> None:
    """Raises ValueError for packed sequences beside a cached state."""
    if reset is not None and state is not None:
        raise ValueError(
            f"{type(mixer).__name__}: packed sequences (seq_idx, cu_seq_lens_q) with a cached state, expected one of "
            "them: pass the sequences without a cache, or each of them with its own"
        )


def with_mixer_call(forward: Callable[..., Tensor], passes_state: bool) -> Callable[..., Tensor]:
    """``forward`` of a mixer, with a ``MixerCall`` around it.

    Args:
        forward: the library's method.
        passes_state: whether it passes its scan the cached state.
    """

    @functools.wraps(forward)
    def mixer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_recorded():
            return forward(self, hidden_states, *args, **kwargs)
        batch, time = hidden_states.shape[:2]
        cache = args[0] if args else kwargs.get("cache", kwargs.get("cache_params"))
        state = None
        if cache is not None and time > 1 and cache.has_previous_state(self.layer_idx):
            state = cache.layers[self.layer_idx].recurrent_states[0]
        reset = packed_reset(kwargs, batch, time, hidden_states.device)
        require_one(self, reset, state)
        states: list[Tensor] = []
        if state is not None and not passes_state:
            states = list(state.unbind(1)) if state.dim() == 4 else [state]  # Zamba scans each head by itself
        outer = current()
        _running.call = MixerCall(reset, states)
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            _running.call = outer

    return mixer_forward
