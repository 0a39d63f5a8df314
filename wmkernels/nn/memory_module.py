"""What the modules share: steps through the module's call, and parameters without weight decay."""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from wmkernels.nn.checks import State


class MemoryModule(nn.Module):
    """Base of the modules with ``init_state``, ``forward`` and ``step``.

    ``step`` calls the module, with ``single_step=True``: hooks, and what is built on them (pruning, weight norm,
    sharding), act on a step as on a sequence. A subclass whose ``forward`` has no ``single_step`` steps without a call.

    Attributes:
        undecayed: names of parameters that need no weight decay.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()
    _steps_by_call: ClassVar[bool] = True

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls._steps_by_call = "single_step" in inspect.signature(cls.forward).parameters

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """Parameters for an optimiser's group with ``weight_decay=0``.

        Found by name, so pruned, parametrised and replaced ones as well.
        """
        found: list[nn.Parameter] = []
        for name in self.undecayed:
            for own, parameter in self._parameters.items():
                if parameter is not None and (own == name or own.startswith(f"{name}_")):
                    found.append(parameter)
            if "parametrizations" in self._modules and name in self.parametrizations:  # type: ignore[operator]
                found += self.parametrizations[name].parameters(recurse=False)  # type: ignore[index,union-attr]
        return found

    def _mark_parameters(self) -> None:
        """``_no_weight_decay``, as other libraries read it."""
        for parameter in self.no_decay_parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    # PyTorch makes new parameters, without attributes, in each of these.
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._mark_parameters()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_parameters()
        self._mark_when_loaded()

    def _mark_when_loaded(self) -> None:
        if _mark not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_mark)


def _mark(module: nn.Module, incompatible_keys: object) -> None:
    """After ``load_state_dict``, with ``assign=True`` as well."""
    if isinstance(module, MemoryModule):
        module._mark_parameters()


def forward_with_states(
    module: nn.Module,
    inputs: Tensor,
    states_after: Sequence[int],
    state: Mapping[str, Tensor] | None = None,
    reset: Tensor | None = None,
    *,
    elapsed: Tensor | None = None,
) -> tuple[Tensor, list[State]]:
    """Outputs of a memory module, and its states after some of the steps, all differentiable.

    One call over all steps where the module has a method of this name; else a call for each part, as well where hooks
    are to see every call.

    Args:
        module: ``module(inputs, state, reset)`` returns outputs and the last state.
        inputs: (batch, time, ...).
        states_after: step counts, increasing from 1 to time, else ValueError.
        state: before the first step; zeros if None.
        reset: bool (batch, time).
        elapsed: (batch, time), for a module that takes it.

    Example:
        >>> import torch, wmkernels
        >>> memory, inputs = wmkernels.nn.Mamba(8), torch.randn(2, 10, 8)
        >>> outputs, (middle, last) = forward_with_states(memory, inputs, [4, 10])
        >>> torch.allclose(memory(inputs[:, 4:], middle)[0], outputs[:, 4:], atol=1e-6)
        True
    """
    time = inputs.shape[1]
    if any(low >= high for low, high in itertools.pairwise([0, *states_after, time + 1])):
        raise ValueError(
            f"forward_with_states: states_after is {list(states_after)}, expected to rise from 1 to {time}"
        )
    at_once = getattr(module, "forward_with_states", None)
    if at_once is None or _is_watched(module):
        return forward_in_parts(module, inputs, states_after, state, reset, elapsed=elapsed)
    found: tuple[Tensor, list[State]] = at_once(
        inputs, states_after, state, reset, **({} if elapsed is None else {"elapsed": elapsed})
    )
    return found


def forward_in_parts(
    module: nn.Module,
    inputs: Tensor,
    states_after: Sequence[int],
    state: Mapping[str, Tensor] | None = None,
    reset: Tensor | None = None,
    *,
    elapsed: Tensor | None = None,
) -> tuple[Tensor, list[State]]:
    """``forward_with_states`` by a call of ``module`` for each part."""
    times: dict[str, Tensor] = {} if elapsed is None else {"elapsed": elapsed}
    outputs, states, carried, start = [], [], state, 0
    for stop in sorted({*states_after, inputs.shape[1]}):
        now = slice(start, stop)
        parts = {name: value[:, now] for name, value in times.items()}
        output, carried = module(inputs[:, now], carried, None if reset is None else reset[:, now], **parts)
        outputs.append(output)
        states.append(carried)
        start = stop
    return torch.cat(outputs, 1), states[: len(states_after)]


def _is_watched(module: nn.Module) -> bool:
    """Whether something may tell a call of ``module`` from its computation: hooks, or a ``forward`` of its own."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return "forward" in module.__dict__ or any(hooks) or (not torch.compiler.is_compiling() and _has_any_global_hook())


def no_decay_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of every ``MemoryModule`` in ``module``.

    Example:
        >>> import torch, wmkernels
        >>> model = torch.nn.Sequential(wmkernels.nn.Mamba(8), torch.nn.Linear(8, 8))
        >>> [tuple(p.shape) for p in wmkernels.nn.no_decay_parameters(model)]
        [(16, 16), (16,)]
    """
    found = [p for part in module.modules() if isinstance(part, MemoryModule) for p in part.no_decay_parameters()]
    return list(dict.fromkeys(found))


def takes_elapsed(module: nn.Module) -> bool:
    """Whether ``module`` takes the time since the step before as ``elapsed``.

    A wrapper with ``**arguments``, such as ``torch.compile`` makes, takes it if the memories within do.
    """
    parameters = inspect.signature(module.forward).parameters
    if all(x.kind is not inspect.Parameter.VAR_KEYWORD for x in parameters.values()):
        return "elapsed" in parameters
    memories = [child for child in module.children() if callable(getattr(child, "init_state", None))]
    return "elapsed" in parameters or all(takes_elapsed(memory) for memory in memories)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module(x)`` is ``F.linear(x, module.weight, module.bias)`` and nothing else can tell."""
    return is_plain(module, nn.Linear)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is that of ``kind`` and nothing else can tell.

    Not with an adapter, a quantised or parametrised weight, a hook, a wrapper, or a ``forward`` of its own.
    """
    return type(module) is kind and not _is_watched(module)
