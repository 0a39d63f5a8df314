"""conv_lstm and nn.ConvLSTM in tests/core/test_laws.py."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from recurrences import Example, Named, Outcome, Recurrence, State, register
from torch import Tensor

import wmkernels
from wmkernels.checks import state_dtype
from wmkernels.nn import ConvLSTM

SIZE = (3, 4)  # (height, width) of the input


class ConvLSTMRecurrence(Recurrence):
    name, op = "conv_lstm", "conv_lstm"
    dtypes = (torch.float64, torch.float32)

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {
                "inputs": st.sampled_from([1, 3, 5]),
                "hidden": st.sampled_from([1, 2, 8, 17]),
                "kernel": st.sampled_from([1, 3]),
                "stride": st.sampled_from([1, 2]),
                "peephole": st.sampled_from([None, "channel", "position"]),
                "bias": st.booleans(),
                "keep_gates": st.booleans(),
                "batch_first": st.booleans(),
                "seed": st.integers(0, 2**16),
            }
        )

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        inputs, hidden, kernel = (configuration[name] for name in ("inputs", "hidden", "kernel"))
        generator = torch.Generator().manual_seed(configuration["seed"])

        def normal(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(kind).to(device)

        size = [-(-side // configuration["stride"]) for side in SIZE]
        # Rounding errors must not grow over time.
        scale = 0.6 / (kernel * hidden**0.5)
        parameters = {
            "weight_ih": normal(4 * hidden, inputs, 2, 3, scale=0.3),
            "weight_hh": normal(4 * hidden, hidden, kernel, kernel, scale=scale),
        }
        if configuration["bias"]:
            parameters["bias"] = normal(4 * hidden)
        if configuration["peephole"]:
            positions = size if configuration["peephole"] == "position" else []
            parameters["peephole"] = normal(3, hidden, *positions, scale=0.5)
        state = (normal(batch, hidden, *size).tanh(), normal(batch, hidden, *size, kind=state_dtype(dtype)))
        return Example(configuration, {"x": normal(batch, time, inputs, *SIZE)}, parameters, state)

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        x, batch_first = inputs["x"], example.configuration["batch_first"]
        if not batch_first:
            x, reset = x.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
        outputs, after = wmkernels.conv_lstm(
            x, state=state, reset=reset, batch_first=batch_first, **parameters, **self.options(example)
        )
        return outputs if batch_first else outputs.transpose(0, 1), after

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        return wmkernels.conv_lstm_step(inputs["x"], state, reset=reset, **parameters, **self.options(example))

    def options(self, example: Example) -> dict[str, Any]:
        return {name: example.configuration[name] for name in ("stride", "keep_gates")}


class ConvLSTMModuleRecurrence(Recurrence):
    """Two layers; states have layers before batch."""

    name, op, kernels_only = "ConvLSTM", "conv_lstm", True
    dtypes = (torch.float64, torch.float32)

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {"peephole": st.sampled_from([False, True, SIZE]), "bias": st.booleans(), "seed": st.integers(0, 2**16)}
        )

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        torch.manual_seed(configuration["seed"])
        module = ConvLSTM(
            2, 3, (3, 1), 2, configuration["bias"], True, peephole=configuration["peephole"], device=device, dtype=dtype
        )
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        if configuration["peephole"]:
            parameters |= {n: torch.randn_like(p) * 0.5 for n, p in parameters.items() if "peephole" in n}
        state = tuple(torch.randn_like(x).transpose(0, 1) for x in module.init_state(batch, SIZE))
        inputs = {"inputs": torch.randn(batch, time, 2, *SIZE, device=device, dtype=dtype)}
        return Example(configuration, inputs, parameters, state, module)

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        return self.call(_Forward(example.module), inputs, parameters, state, reset)

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        return self.call(_Step(example.module), inputs, parameters, state, reset)

    def call(
        self, module: torch.nn.Module, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        prefixed = {f"module.{name}": p for name, p in parameters.items()}
        given = None if state is None else tuple(x.transpose(0, 1) for x in state)
        output, after = torch.func.functional_call(module, prefixed, (inputs["inputs"], given, reset))
        return output, tuple(x.transpose(0, 1) for x in after)


class _Forward(torch.nn.Module):
    def __init__(self, module: Any):
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)


class _Step(_Forward):
    def forward(self, *arguments: Any) -> Any:
        return self.module.step(*arguments)


register(ConvLSTMRecurrence())
register(ConvLSTMModuleRecurrence())
