"""The recurrences that the laws of tests/core/test_laws.py are checked for; a new one joins by an adapter here.

An adapter is a subclass of ``Recurrence``, registered at the end of this file (or with ``register`` from any file that
test_laws.py imports). It has four methods; batch comes first, time second, and a state is a tuple of tensors with batch
first:

    configurations()                  a Hypothesis strategy of what builds a memory
    make(configuration, batch, time, dtype, device)
                                      an ``Example``: inputs (batch, time, ...) by name, parameters by name, a state
    parallel(example, inputs, parameters, state, reset)     -> (outputs (batch, time, ...), state)
    step(example, inputs, parameters, state, reset)         -> (output (batch, ...), state)

``state`` may be None, the initial state; ``reset`` is None or bool (batch, time), in a step (batch,). With ``packed =
True``, ``parallel`` takes ``lengths`` as well: batch is 1 and the state has a row per sequence. The law file sets
``wmkernels.dispatch.REQUESTED`` to the backend.

A torch.nn module with the methods ``init_state(batch_size)``, ``forward(inputs, state, reset)`` and ``step(input,
state, reset)`` needs no subclass:

    register(ModuleRecurrence("Mamba", op="selective_scan", build=lambda width: Mamba(width)))

The modules of wmkernels.nn join in tests/recurrences_nn.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import wmkernels
from wmkernels.checks import state_dtype

Named = dict[str, Tensor]
State = tuple[Tensor, ...]
Outcome = tuple[Tensor, State]


@dataclasses.dataclass
class Example:
    """A memory with random inputs; ``configuration`` is a sample of ``configurations``."""

    configuration: Any
    inputs: Named
    parameters: Named
    state: State
    module: nn.Module | None = None


class Recurrence:
    """A memory that the laws are checked for."""

    name: str
    op: str  # whose backends it runs on
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16)
    packed = False
    kernels_only = False  # for a module whose op is a recurrence of its own here, reference and all
    is_op = True  # not a module; the chunked form of an op is checked with the op

    def configurations(self) -> st.SearchStrategy[Any]:
        raise NotImplementedError

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        raise NotImplementedError

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        raise NotImplementedError

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        raise NotImplementedError


class SelectiveScanRecurrence(Recurrence):
    """selective_scan, its state, and selective_step."""

    name, op, packed = "selective_scan", "selective_scan", True

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {
                "channels": st.sampled_from([1, 2, 6, 16, 18, 34]),
                "state": st.sampled_from([1, 2, 3, 8, 16, 19]),
                "divide": st.sampled_from([1, 2]),
                "constant_B": st.booleans(),
                "channel_last": st.booleans(),
                "softplus": st.booleans(),
                "extras": st.booleans(),
                "seed": st.integers(0, 2**16),
            }
        )

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        channels, state = configuration["channels"], configuration["state"]
        groups = configuration["divide"] if channels % configuration["divide"] == 0 else 1
        generator = torch.Generator().manual_seed(configuration["seed"])
        parameter = state_dtype(dtype)

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).to(device)

        inputs = {
            "u": normal(batch, time, channels),
            "delta": normal(batch, time, channels).abs() * 0.4,
            "C": normal(batch, time, groups, state),
        }
        parameters = {"A": -normal(channels, state, kind=parameter).abs()}
        if configuration["constant_B"]:
            parameters["B"] = normal(channels, state, kind=parameter)
        else:
            inputs["B"] = normal(batch, time, 1, state)
        if configuration["extras"]:
            inputs["z"] = normal(batch, time, channels)
            parameters["D"] = normal(channels, kind=parameter)
            parameters["delta_bias"] = normal(channels, kind=parameter) * 0.1
        return Example(configuration, inputs, parameters, (normal(batch, channels, state, kind=parameter),))

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        channel_last = example.configuration["channel_last"]
        arguments = dict(parameters)
        for name, x in inputs.items():
            if name in ("B", "C"):
                arguments[name] = x.permute(0, 2, 1, 3) if channel_last else x.permute(0, 2, 3, 1)
            else:
                arguments[name] = x if channel_last else x.transpose(1, 2)
        bounds = None
        if lengths is not None:
            device = inputs["u"].device
            bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
        out, last_state = wmkernels.selective_scan(
            **arguments,
            delta_softplus=example.configuration["softplus"],
            return_last_state=True,
            initial_state=None if state is None else state[0],
            reset=reset,
            cu_seqlens=bounds,
            channel_last=channel_last,
        )
        return out if channel_last else out.transpose(1, 2), (last_state,)

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        if state is None:
            state = (torch.zeros_like(example.state[0]),)
        arguments = {**parameters, **inputs}
        if arguments["B"] is parameters.get("B"):
            # A step takes B a batch element: a constant one is a group a channel.
            arguments["B"] = arguments["B"].to(inputs["u"].dtype).expand(len(inputs["u"]), -1, -1)
            groups = arguments["C"].shape[1]
            arguments["C"] = arguments["C"].repeat_interleave(inputs["u"].shape[1] // groups, 1)
        out, new_state = wmkernels.selective_step(
            state[0], **arguments, delta_softplus=example.configuration["softplus"], reset=reset
        )
        return out, (new_state,)


class LinearScanRecurrence(Recurrence):
    """linear_scan forward in time."""

    name, op = "linear_scan", "linear_scan"

    def configurations(self) -> st.SearchStrategy[Any]:
        inner = st.sampled_from([[], [1], [7], [16], [33], [2, 3]])
        return st.fixed_dictionaries({"inner": inner, "channel_last": st.booleans(), "seed": st.integers(0, 2**16)})

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        generator = torch.Generator().manual_seed(configuration["seed"])
        inner = configuration["inner"]

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).to(device)

        inputs = {"gates": normal(batch, time, *inner).tanh(), "tokens": normal(batch, time, *inner)}
        return Example(configuration, inputs, {}, (normal(batch, *inner, kind=state_dtype(dtype)),))

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        channel_last = example.configuration["channel_last"]
        gates, tokens = (x if channel_last else x.movedim(1, -1) for x in (inputs["gates"], inputs["tokens"]))
        out, last_state = wmkernels.linear_scan(
            gates,
            tokens,
            None if state is None else state[0],
            reset=reset,
            channel_last=channel_last,
            return_last_state=True,
        )
        return out if channel_last else out.movedim(-1, 1), (last_state,)

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        gates, tokens = inputs["gates"], inputs["tokens"]
        kind = state_dtype(gates.dtype)
        before = torch.zeros_like(example.state[0]) if state is None else state[0].to(kind)
        gate = gates.to(kind)
        if reset is not None:
            mask = reset.view(-1, *[1] * (gate.dim() - 1))
            before, gate = before.masked_fill(mask, 0), gate.masked_fill(mask, 0)
        after = gate * before + tokens.to(kind)
        return after.to(gates.dtype), (after,)


class ReverseLinearScanRecurrence(LinearScanRecurrence):
    """linear_scan in reverse, seen from its own beginning, the end of time.

    Seen from there, a step forgets what came before it where the step after it in time has ``reset``: the flags move by
    one, and one at the very beginning forgets the state handed in.
    """

    name = "linear_scan reverse"

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        gates, tokens = (inputs[name].flip(1) for name in ("gates", "tokens"))
        before = None if state is None else state[0]
        if reset is not None and reset.shape[1]:
            if before is not None:
                before = before.masked_fill(reset[:, 0].view(-1, *[1] * (before.dim() - 1)), 0)
            reset = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:].flip(1)], 1)
        out, last_state = wmkernels.linear_scan(
            gates, tokens, before, reverse=True, reset=reset, channel_last=True, return_last_state=True
        )
        return out.flip(1), (last_state,)


class ModuleRecurrence(Recurrence):
    """A torch.nn module with init_state, forward and step, batch first; its inputs are (batch, time, width)."""

    dtypes = (torch.float64, torch.float32)
    is_op = False

    def __init__(self, name: str, op: str, build: Callable[[int], nn.Module], widths: Sequence[int] = (4, 8)):
        self.name, self.op, self.build, self.widths = name, op, build, widths

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries({"width": st.sampled_from(list(self.widths)), "seed": st.integers(0, 2**16)})

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        torch.manual_seed(configuration["seed"])
        module = self.build(configuration["width"]).to(device, dtype)
        inputs = {"inputs": torch.randn(batch, time, configuration["width"]).to(device, dtype)}
        state = module.init_state(batch)
        parts = [x for x in (state.values() if isinstance(state, dict) else state)]
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return Example(configuration, inputs, parameters, tuple(torch.randn_like(x) for x in parts), module)

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        return self._call(example, "forward", inputs, parameters, state, reset)

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        return self._call(example, "step", inputs, parameters, state, reset)

    def _call(
        self,
        example: Example,
        method: str,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
    ) -> Outcome:
        assert example.module is not None
        sequence = inputs["inputs"]
        names = None
        first = example.module.init_state(len(sequence))
        if isinstance(first, dict):
            names = list(first)
        given: Any = first if state is None and method == "step" else state
        if state is not None and names is not None:
            given = dict(zip(names, state, strict=True))
        call = _Method(example.module, method)
        prefixed = {f"module.{name}": p for name, p in parameters.items()}
        output, after = torch.func.functional_call(call, prefixed, (sequence, given, reset))
        return output, tuple(after.values() if isinstance(after, dict) else after)


class _Method(nn.Module):
    """A method of a module as a module, for functional_call."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.module, self.method)(*arguments)


RECURRENCES: list[Recurrence] = []


def register(memory: Recurrence) -> None:
    """Has the laws checked for ``memory``."""
    RECURRENCES.append(memory)


register(SelectiveScanRecurrence())
register(LinearScanRecurrence())
register(ReverseLinearScanRecurrence())
