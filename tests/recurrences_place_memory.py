"""place_memory and nn.PlaceMemory in tests/core/test_laws.py."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from place_memory_problems import inverse_of, phases, view_keys
from recurrences import Example, Named, Outcome, Recurrence, State, register
from torch import Tensor

import wmkernels
from wmkernels.checks import state_dtype
from wmkernels.nn import PlaceMemory, lattice


class PlaceMemoryRecurrence(Recurrence):
    """The state is the map and the phase of the next write."""

    name, op, packed = "place_memory", "place_memory", True

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {
                "places": st.sampled_from([1, 4, 9]),
                "frequencies": st.sampled_from([1, 5, 12]),
                "groups": st.sampled_from([1, 2]),
                "channels": st.sampled_from([1, 3, 17]),
                "delta": st.booleans(),
                "seed": st.integers(0, 2**16),
            }
        )

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        names = ("places", "frequencies", "groups", "channels", "delta", "seed")
        places, frequencies, groups, channels, delta, seed = (configuration[name] for name in names)
        generator, kind = torch.Generator().manual_seed(seed), state_dtype(dtype)
        keys = view_keys(places, frequencies, True, generator)
        inputs = {
            "values": torch.randn(batch, time, places, groups * channels, generator=generator).to(dtype),
            "phase": phases([batch, time, groups], frequencies, generator).to(kind),
            "gate": torch.rand(batch, time, places, groups, generator=generator).to(kind),
        }
        parameters = {"keys": keys.to(kind)} | ({"inverse": inverse_of(keys).to(kind)} if delta else {})
        state = torch.randn(batch, groups, 2 * frequencies, channels, generator=generator).to(kind)
        first = phases([batch, groups], frequencies, generator).to(kind)
        named = ({k: v.to(device) for k, v in x.items()} for x in (inputs, parameters))
        return Example(configuration, *named, (state.to(device), first.to(device)))

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        phase, bounds = inputs["phase"], None
        if lengths is not None:
            bounds = torch.tensor([0, *lengths], device=phase.device).cumsum(0)
        first, initial_phase = (None, None) if state is None else state
        out, last = wmkernels.place_memory(
            **inputs,
            **parameters,
            initial_state=first,
            initial_phase=initial_phase,
            reset=reset,
            cu_seqlens=bounds,
            return_last_state=True,
        )
        if lengths is not None:
            assert initial_phase is not None and bounds is not None
            ends = bounds[1:].tolist()
            final = [phase[0, e - 1] if n else p for e, n, p in zip(ends, lengths, initial_phase, strict=True)]
            return out, (last, torch.stack(final))
        if phase.shape[1]:
            return out, (last, phase[:, -1].clone())
        assert initial_phase is not None
        return out, (last, initial_phase.clone())

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        single = {name: x[:, None] for name, x in inputs.items()}
        out, after = self.parallel(example, single, parameters, state, None if reset is None else reset[:, None])
        return out[:, 0], after


class PlaceModuleRecurrence(Recurrence):
    """Moves by displacement or by weights over moves; groups that drift; a gate."""

    name, op, is_op = "PlaceMemory", "place_memory", False
    dtypes = (torch.float64, torch.float32)

    def configurations(self) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {
                "groups": st.sampled_from([1, 2]),
                "write": st.sampled_from(["delta", "sum"]),
                "weights": st.booleans(),
                "gate": st.sampled_from([None, "place", "group"]),
                "elapsed": st.booleans(),
                "seed": st.integers(0, 2**16),
            }
        )

    def make(self, configuration: Any, batch: int, time: int, dtype: torch.dtype, device: str) -> Example:
        names = ("groups", "write", "weights", "gate", "elapsed", "seed")
        groups, write, weights, gate, elapsed, seed = (configuration[name] for name in names)
        generator = torch.Generator().manual_seed(seed)
        velocities = torch.randn(groups, 2, generator=generator)
        moves = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        offsets = [[0, 0], [0, 1], [2, 0], [0, -1]]
        module = PlaceMemory(4, offsets, lattice(5), velocities, write, moves=moves).to(device, dtype)
        inputs = {"values": torch.randn(batch, time, 4, 4, generator=generator)}
        if weights:
            inputs["weights"] = torch.rand(batch, time, 3, generator=generator)
        else:
            inputs["displacement"] = torch.randn(batch, time, 2, generator=generator)
        if gate:
            inputs["gate"] = torch.rand(batch, time, 4, *[groups] * (gate == "group"), generator=generator)
        if elapsed:
            inputs["elapsed"] = torch.rand(batch, time, generator=generator)
        inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
        state = module.init_state(batch)
        return Example(configuration, inputs, {}, tuple(torch.rand_like(x) for x in state.values()), module)

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        return self._call(example.module, example, inputs, state, reset)

    def step(
        self, example: Example, inputs: Named, parameters: Named, state: State | None, reset: Tensor | None
    ) -> Outcome:
        assert example.module is not None
        return self._call(example.module.step, example, inputs, state, reset)

    def _call(self, call: Any, example: Example, inputs: Named, state: State | None, reset: Tensor | None) -> Outcome:
        names = ("map", "angle")
        given = None if state is None else dict(zip(names, state, strict=True))
        read, after = call(**inputs, state=given, reset=reset)
        return read, tuple(after[name] for name in names)


register(PlaceMemoryRecurrence())
register(PlaceModuleRecurrence())
