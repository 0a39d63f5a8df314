"""Adapters of the recurrences that tests/core/test_laws.py checks.

Subclass ``Recurrence`` and call ``register`` in a file that test_laws.py imports. A state is a tuple of tensors, batch
first:

    configurations()                  a Hypothesis strategy
    make(configuration, batch, time, dtype, device)
                                      an ``Example``: inputs (batch, time, ...), parameters, state
    parallel(example, inputs, parameters, state, reset)     -> (outputs (batch, time, ...), state)
    step(example, inputs, parameters, state, reset)         -> (output (batch, ...), state)

``state`` None is the initial state; ``reset`` is None or bool (batch, time), per step (batch,). If ``packed``,
``parallel`` accepts ``lengths``: batch is 1, the state has one row per sequence. Modules with ``init_state``,
``forward`` and ``step`` need no subclass:

    register(ModuleRecurrence("Mamba", op="selective_scan", build=lambda width: Mamba(width)))
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
    configuration: Any
    inputs: Named
    parameters: Named
    state: State
    module: nn.Module | None = None


class Recurrence:
    name: str
    op: str
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16)
    packed = False
    kernels_only = False  # the op has an adapter of its own
    is_op = True  # modules skip the chunked backend
    is_composed = False  # of PyTorch's ops and other modules: one backend per device is enough
    longest = 20  # steps of an example

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
            # Steps take B per batch element: one group per channel.
            arguments["B"] = arguments["B"].to(inputs["u"].dtype).expand(len(inputs["u"]), -1, -1)
            groups = arguments["C"].shape[1]
            arguments["C"] = arguments["C"].repeat_interleave(inputs["u"].shape[1] // groups, 1)
        out, new_state = wmkernels.selective_step(
            state[0], **arguments, delta_softplus=example.configuration["softplus"], reset=reset
        )
        return out, (new_state,)


class LinearScanRecurrence(Recurrence):
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
    """Time is flipped: a reset at t + 1 cuts the state passed to t; the first clears the initial state."""

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
    """Inputs (batch, time, width), or (batch, time, tokens, width) with ``tokens``."""

    dtypes = (torch.float64, torch.float32)
    is_op = False

    def __init__(
        self,
        name: str,
        op: str,
        build: Callable[[int], nn.Module],
        widths: Sequence[int] = (4, 8),
        tokens: int | None = None,
    ):
        self.name, self.op, self.build, self.widths = name, op, build, widths
        self.tokens = () if tokens is None else (tokens,)

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries({"width": st.sampled_from(list(self.widths)), "seed": st.integers(0, 2**16)})

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        torch.manual_seed(configuration["seed"])
        module = self.build(configuration["width"]).to(device, dtype)
        inputs = {"inputs": torch.randn(batch, time, *self.tokens, configuration["width"]).to(device, dtype)}
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
    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.module, self.method)(*arguments)


class GatedDeltaRuleRecurrence(Recurrence):
    name, op, packed = "gated_delta_rule", "gated_delta_rule", True

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {
                "heads": st.sampled_from([1, 2]),
                "repeats": st.sampled_from([1, 2]),
                "d_k": st.sampled_from([1, 4, 17]),
                "d_v": st.sampled_from([1, 5, 16, 33]),
                "channel_last": st.booleans(),
                "seed": st.integers(0, 2**16),
            }
        )

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        generator = torch.Generator().manual_seed(configuration["seed"])
        heads, d_k, d_v = (configuration[name] for name in ("heads", "d_k", "d_v"))
        value_heads = heads * configuration["repeats"]

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

        values = {
            "q": normal(time, heads, d_k),
            "k": nn.functional.normalize(normal(time, heads, d_k), dim=-1),
            "v": normal(time, value_heads, d_v),
            "gate": -normal(time, value_heads).abs(),
            "beta": normal(time, value_heads).sigmoid(),
        }
        inputs = {name: x.to(dtype).to(device) for name, x in values.items()}
        state = normal(value_heads, d_k, d_v).to(state_dtype(dtype)).to(device)
        return Example(configuration, inputs, {}, (state,))

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
        device = inputs["v"].device
        out, last_state = wmkernels.gated_delta_rule(
            *(x if channel_last else x.movedim(1, -1) for x in inputs.values()),
            initial_state=None if state is None else state[0],
            reset=reset,
            cu_seqlens=None if lengths is None else torch.tensor([0, *lengths], device=device).cumsum(0),
            channel_last=channel_last,
            return_last_state=True,
        )
        return out if channel_last else out.movedim(-1, 1), (last_state,)

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        before = torch.zeros_like(example.state[0]) if state is None else state[0]
        out, after = wmkernels.gated_delta_rule_step(before, *inputs.values(), reset=reset)
        return out, (after,)


class SSDRecurrence(Recurrence):
    name, op, packed = "ssd_scan", "ssd_scan", True
    longest = 12  # "chunked" cuts a sequence at each reset

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {
                "groups": st.sampled_from([1, 2]),
                "repeats": st.sampled_from([1, 2]),
                "d": st.sampled_from([1, 5, 16, 33]),
                "n": st.sampled_from([1, 4, 17]),
                "seed": st.integers(0, 2**16),
            }
        )

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        generator = torch.Generator().manual_seed(configuration["seed"])
        groups, d, n = (configuration[name] for name in ("groups", "d", "n"))
        heads, held = groups * configuration["repeats"], state_dtype(dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        values = {
            "x": normal(batch, time, heads, d),
            "dt": normal(batch, time, heads).abs(),
            "B": normal(batch, time, groups, n),
            "C": normal(batch, time, groups, n),
            "z": normal(batch, time, heads, d),
        }
        inputs = {name: x.to(dtype).to(device) for name, x in values.items()}
        parameters = {"A": -normal(heads).abs().to(held).to(device), "D": normal(heads).to(held).to(device)}
        state = normal(batch, heads, d, n).to(held).to(device)
        return Example(configuration, inputs, parameters, (state,))

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        device = inputs["x"].device
        out, last_state = wmkernels.ssd_scan(
            **inputs,
            **parameters,
            initial_state=None if state is None else state[0],
            reset=reset,
            cu_seqlens=None if lengths is None else torch.tensor([0, *lengths], device=device).cumsum(0),
            return_last_state=True,
        )
        return out, (last_state,)

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        before = torch.zeros_like(example.state[0]) if state is None else state[0]
        out, after = wmkernels.ssd_step(before, **inputs, **parameters, reset=reset)
        return out, (after,)


class CausalConvRecurrence(Recurrence):
    name, op, packed = "causal_conv1d", "causal_conv1d", True

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {
                "channels": st.sampled_from([1, 5, 8, 19]),
                "width": st.sampled_from([1, 2, 3, 4, 7]),
                "bias": st.booleans(),
                "activation": st.sampled_from([None, "silu"]),
                "channel_last": st.booleans(),
                "seed": st.integers(0, 2**16),
            }
        )

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        generator = torch.Generator().manual_seed(configuration["seed"])
        channels, past = configuration["channels"], configuration["width"] - 1

        held = state_dtype(dtype)

        def normal(*shape: int, kind: torch.dtype = held) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).to(device)

        parameters = {"weight": normal(channels, past + 1)}
        if configuration["bias"]:
            parameters["bias"] = normal(channels)
        shape = (past, channels) if configuration["channel_last"] else (channels, past)
        inputs = {"x": normal(batch, time, channels, kind=dtype)}
        return Example(configuration, inputs, parameters, (normal(batch, *shape),))

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        x, channel_last = inputs["x"], example.configuration["channel_last"]
        out, last_state = wmkernels.causal_conv1d(
            x if channel_last else x.mT,
            **parameters,
            activation=example.configuration["activation"],
            initial_state=None if state is None else state[0],
            reset=reset,
            cu_seqlens=None if lengths is None else torch.tensor([0, *lengths], device=x.device).cumsum(0),
            channel_last=channel_last,
            return_last_state=True,
        )
        return out if channel_last else out.mT, (last_state,)

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        before = torch.zeros_like(example.state[0]) if state is None else state[0]
        options = {name: example.configuration[name] for name in ("activation", "channel_last")}
        out, after = wmkernels.causal_conv1d_step(before, inputs["x"], **parameters, reset=reset, **options)
        return out, (after,)


RECURRENCES: list[Recurrence] = []


def register(memory: Recurrence) -> None:
    RECURRENCES.append(memory)


register(SelectiveScanRecurrence())
register(LinearScanRecurrence())
register(ReverseLinearScanRecurrence())
register(GatedDeltaRuleRecurrence())
register(SSDRecurrence())
register(CausalConvRecurrence())
