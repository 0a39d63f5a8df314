"""Random calls of the ops, sampled by Hypothesis."""

import dataclasses
import importlib
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from tolerances import ERROR_FLOOR_ULPS, ERROR_FLUSHED, ERROR_MULTIPLE, ERROR_ULPS_A_STEP, ERROR_ULPS_A_TERM
from torch import Tensor

import wmkernels
from wmkernels import chunked
from wmkernels.checks import state_dtype

# The package attribute is the function, not the module.
scan_module = importlib.import_module("wmkernels.selective_scan.function")
delta_module = importlib.import_module("wmkernels.gated_delta_rule.function")
ssd_module = importlib.import_module("wmkernels.ssd_scan.function")
ssd_meta = importlib.import_module("wmkernels.ssd_scan.meta")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "permuted", "offset", "strided", "expanded"]
MAIN = ("u", "gates", "x", "q", "values")  # names of an op's main input
Results = dict[str, Tensor]


def laid_out(values: Tensor, layout: str, seed: int) -> Tensor:
    """Copies to another layout; "expanded" repeats one slice."""
    rng = random.Random(seed)
    if layout == "permuted":
        order = list(range(values.dim()))
        rng.shuffle(order)
        back = [order.index(i) for i in range(values.dim())]
        return values.permute(order).contiguous().permute(back)
    if layout in ("offset", "strided"):
        step = 2 if layout == "strided" else 1
        larger = values.new_full([size * step + 3 for size in values.shape], float("nan"))
        inside = larger[tuple(slice(1, 1 + size * step, step) for size in values.shape)]
        inside.copy_(values)
        return inside
    if layout == "expanded" and values.dim() and values.numel():
        dim = rng.randrange(values.dim())
        return values.narrow(dim, 0, 1).contiguous().expand(values.shape)
    return values.contiguous()


@dataclasses.dataclass
class Problem:
    function: Callable[..., Any]
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    chunk: int | None = None
    grad_layouts: tuple[str, ...] = ("contiguous", "contiguous")
    unused_output: int | None = None
    seed: int = 0
    activations: int = 1  # outputs in the inputs' dtype; others have the state's

    def __repr__(self) -> str:
        shown = {
            k: f"{v.dtype} {tuple(v.shape)} strides {v.stride()}" for k, v in self.tensors.items() if v is not None
        }
        rest = f"chunk={self.chunk}, grads={self.grad_layouts}, unused={self.unused_output}, seed={self.seed}"
        return f"Problem({self.function.__name__}, {shown}, {self.options}, {rest})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would print every number

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for name, t in self.tensors.items() if name in MAIN and t is not None)

    @property
    def time(self) -> int:
        x, values = self.tensors.get("x"), self.tensors.get("values")
        if "dt" in self.tensors:
            return 1 if "state" in self.tensors else x.shape[1]
        if values is not None:
            return values.shape[1]
        if x is not None and "weight" in self.tensors:
            return x.shape[1 if self.options.get("channel_last") else 2]
        if x is not None:
            return x.shape[1 if self.options.get("batch_first") else 0]
        shape = next(t.shape for name, t in self.tensors.items() if name in ("u", "gates", "q") and t is not None)
        if "state" in self.tensors:
            return 1
        return shape[1] if self.options.get("channel_last") else shape[-1]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Problem":
        return dataclasses.replace(self, tensors={k: None if v is None else change(v) for k, v in self.tensors.items()})

    def leaves(self) -> dict[str, Tensor]:
        return {
            k: v.detach().requires_grad_() for k, v in self.tensors.items() if v is not None and v.is_floating_point()
        }

    def call(self, backend: str, tensors: dict[str, Tensor | None] | None = None) -> tuple[Tensor, ...]:
        arguments = self.tensors if tensors is None else {**self.tensors, **tensors}
        # Most problems span several chunks.
        steps = self.chunk or (4 if self.time <= 64 else 100)
        kept = scan_module.chunk_length if self.chunk is None else lambda *_: self.chunk
        with (
            mock.patch.object(chunked, "steps_per_chunk", lambda _: steps),
            mock.patch.object(scan_module, "chunk_length", kept),
            mock.patch.object(delta_module, "CHUNK", self.chunk or 8),
            mock.patch.object(ssd_module, "CHUNK", self.chunk or 8),
            mock.patch.object(ssd_meta, "KEPT", 12),
        ):
            return self.function(**arguments, **self.options, backend=backend)

    def cotangents(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Equal for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(self.seed)
        grads = []
        for index, (output, layout) in enumerate(zip(outputs, self.grad_layouts, strict=False)):
            values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            # Rounded to the problem's dtype, for equal values in kernel and reference.
            held = self.dtype if index < self.activations else state_dtype(self.dtype)
            grads.append(laid_out(values.to(held).to(output.dtype).to(output.device), layout, self.seed + index))
        return grads

    def solve(self, backend: str) -> Results:
        """Outputs by number and gradients by input name."""
        leaves = self.leaves()
        outputs = self.call(backend, leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = list(zip(outputs, self.cotangents(outputs), strict=True))
        if self.unused_output is not None and len(pairs) > 1:
            del pairs[self.unused_output]
        used, grads = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(used, list(leaves.values()), grads, allow_unused=True)
        results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            assert gradient is None or (gradient.dtype == leaf.dtype and gradient.shape == leaf.shape), name
            results[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
        return results

    def in_float64(self) -> "Problem":
        return self.mapped(lambda x: x.double() if x.is_floating_point() else x)

    def fp64_reference(self) -> Results:
        # Keeps the original dtype's rounding.
        wide = self.in_float64()
        wide.cotangents = lambda outputs: [x.double() for x in Problem.cotangents(self, outputs)]  # type: ignore[method-assign]
        return wide.solve("reference")

    def perturbed(self, number: int) -> Results:
        """Inputs change by up to an ulp of the state's dtype: the effect of cancellation."""
        generator = torch.Generator().manual_seed(self.seed + number)
        eps = torch.finfo(state_dtype(self.dtype)).eps

        def perturb(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) - 0.5
            return x.double() * (1 + 2 * eps * noise)

        wide = self.mapped(perturb)
        wide.cotangents = lambda outputs: [x.double() for x in Problem.cotangents(self, outputs)]  # type: ignore[method-assign]
        return wide.solve("reference")


def assert_as_accurate_as_the_reference(problem: Problem, backend: str) -> None:
    """Allows a multiple of the reference's largest error or of the change under perturbed inputs."""
    fp64_reference = problem.fp64_reference()
    kernel, references = problem.solve(backend), [problem.solve("reference"), problem.perturbed(1)]
    assert kernel.keys() == fp64_reference.keys()
    for name, expected in fp64_reference.items():
        if expected.numel() == 0 or expected.abs().max() > torch.finfo(kernel[name].dtype).max / 2:
            continue  # empty, or overflows float16
        assert kernel[name].isfinite().all(), f"{name} is not finite"
        error, allowed = _error(kernel[name], expected), _allowed(problem, name, expected, references)
        if error > allowed and len(references) == 2:
            # One perturbation may leave a number unchanged.
            references += [problem.perturbed(number) for number in range(2, 11)]
            allowed = _allowed(problem, name, expected, references)
        same_dtype = _error(references[0][name], expected)
        assert error <= allowed, f"{name}: error {error:.3g}, the reference's {same_dtype:.3g}, allowed {allowed:.3g}"


def _error(found: Tensor, expected: Tensor) -> float:
    return (found.double() - expected).abs().max().item()


def _allowed(problem: Problem, name: str, expected: Tensor, references: list[Results]) -> float:
    largest, held = expected.abs().max().item(), torch.finfo(state_dtype(problem.dtype))
    dtype = references[0][name].dtype
    return (
        ERROR_MULTIPLE * max(_error(reference[name], expected) for reference in references)
        + ERROR_FLOOR_ULPS * torch.finfo(dtype).eps * largest
        + ERROR_ULPS_A_STEP * problem.time * held.eps * largest
        + ERROR_ULPS_A_TERM * _equal_terms(problem, name) * held.eps * largest
        + ERROR_FLUSHED * held.tiny
    )


def _equal_terms(problem: Problem, name: str) -> int:
    """Products in the sums of a result, where an input repeats elements; else 0. Sums over time count per step."""
    x = problem.tensors
    inputs = [v for v in x.values() if v is not None and v.is_floating_point()]
    if not any(stride == 0 and size > 1 for v in inputs for stride, size in zip(v.stride(), v.shape, strict=True)):
        return 0
    ih, hh, A = x.get("weight_ih"), x.get("weight_hh"), x.get("A")
    if ih is not None and hh is not None and x["x"] is not None:
        # each gradient also has the error of the gates
        gates, channels = ih[0].numel() + hh[0].numel(), ih.shape[1]
        if name.startswith("output"):
            return gates
        if name.removeprefix("gradient of ") in ("x", "h", "c"):
            return gates + max(ih[:, 0].numel(), hh[:, 0].numel())
        return gates + x["x"].numel() // channels
    if x.get("q") is not None:
        return sum(x[n].shape[3 if problem.options.get("channel_last") else 2] for n in ("q", "v"))
    if "dt" in x:
        return sum(x["x"].shape[2:]) + x["B"].shape[3]
    if A is None:
        return 0  # a linear scan sums over time alone
    of = name.removeprefix("gradient of ")
    if of in ("B", "C"):
        return A.shape[0]
    steps = max(v.numel() for n, v in x.items() if n in ("u", "delta") and v is not None) // A.shape[0]
    return steps if of in ("A", "D", "delta_bias") else A.shape[1]


def _optional(draw: st.DrawFn, value: Callable[[], Tensor]) -> Tensor | None:
    return value() if draw(st.booleans()) else None


STATES = [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 33, 64]


@st.composite
def projections(draw: st.DrawFn, batch: int, channels: int, state: int, time: int | None) -> tuple[list[int], bool]:
    """Shape (time last, absent in a step), and whether it varies."""
    kind = draw(st.sampled_from(["varies", "groups", "constant"] if time is not None else ["varies", "groups"]))
    tail = [state] if time is None else [state, time]
    if kind == "constant":
        return [channels, state], False
    if kind == "varies":
        return [batch, *tail], True
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return [batch, draw(st.sampled_from(divisors)), *tail], True


@st.composite
def scans(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    device: str = "cpu",
    max_time: int = 40,
    states: list[int] = STATES,
    max_channels: int = 40,
    layouts: list[str] = LAYOUTS,
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    batch = draw(st.integers(1, 3))
    channels, time = draw(st.integers(1, max_channels)), draw(st.integers(1, max_time))
    state = draw(st.sampled_from(states))
    seed = draw(st.integers(0, 2**16))
    channel_last, softplus = draw(st.booleans()), draw(st.booleans())
    packed = draw(st.booleans())
    batch = 1 if packed else batch
    generator = torch.Generator().manual_seed(seed)
    parameter = draw(st.sampled_from([dtype, state_dtype(dtype)]))

    def normal(shape: list[int], kind: torch.dtype, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return laid_out(values.to(kind), draw(st.sampled_from(layouts)), seed).to(device)

    def uniform(shape: list[int], kind: torch.dtype, low: float, high: float) -> Tensor:
        values = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        return laid_out(values.to(kind), draw(st.sampled_from(layouts)), seed).to(device)

    def timed(shape: list[int]) -> list[int]:
        return [*shape[:-2], shape[-1], shape[-2]] if channel_last else shape

    bounds = None
    if packed:
        inner = draw(st.lists(st.integers(0, time), max_size=5))
        kind = draw(st.sampled_from([torch.int64, torch.int32]))
        bounds = torch.tensor([0, *sorted(inner), time], dtype=kind, device=device)
    sequences = batch if bounds is None else len(bounds) - 1
    shapes_B, varies_B = draw(projections(batch, channels, state, time))
    shapes_C, varies_C = draw(projections(batch, channels, state, time))
    if len(shapes_B) == 4 and len(shapes_C) == 4:
        shapes_C[1] = draw(st.sampled_from([shapes_B[1], 1]))
    activation = timed([batch, channels, time])
    tensors = {
        "u": normal(activation, dtype),
        "delta": normal(activation, dtype) if softplus else uniform(activation, dtype, -0.05, 0.6),
        "A": uniform([channels, state], parameter, -2.0, 0.2),
        "B": normal(timed(shapes_B) if varies_B else shapes_B, dtype if varies_B else parameter),
        "C": normal(timed(shapes_C) if varies_C else shapes_C, dtype if varies_C else parameter),
        "D": _optional(draw, lambda: normal([channels], parameter)),
        "z": _optional(draw, lambda: normal(activation, dtype)),
        "delta_bias": _optional(draw, lambda: normal([channels], parameter, 0.1)),
        "initial_state": _optional(draw, lambda: normal([sequences, channels, state], parameter)),
        "reset": draw(resets(batch, time, device)),
        "cu_seqlens": bounds,
    }
    options = {"delta_softplus": softplus, "channel_last": channel_last, "return_last_state": True}
    return Problem(
        wmkernels.selective_scan,
        tensors,
        options,
        chunk=draw(st.sampled_from([None, 1, 2, 3, 5, 8, 16, 64])),
        grad_layouts=(draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))),
        unused_output=draw(st.sampled_from([None, 0, 1])),
        seed=seed,
    )


@st.composite
def resets(draw: st.DrawFn, batch: int, time: int, device: str = "cpu") -> Tensor | None:
    share = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]))
    if share is None:
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    reset = torch.rand((batch, time), generator=generator) < share
    return laid_out(reset, draw(st.sampled_from(["contiguous", "permuted"])), 0).to(device)


@st.composite
def steps(
    draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES, device: str = "cpu", states: list[int] = STATES
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    batch, channels, state = draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.sampled_from(states))
    seed, softplus = draw(st.integers(0, 2**16)), draw(st.booleans())
    parameter = draw(st.sampled_from([dtype, state_dtype(dtype)]))
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: list[int], kind: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return laid_out(values.to(kind), draw(st.sampled_from(LAYOUTS)), seed).to(device)

    shape_B, _ = draw(projections(batch, channels, state, None))
    shape_C, _ = draw(projections(batch, channels, state, None))
    if len(shape_B) == 3 and len(shape_C) == 3:
        shape_C[1] = draw(st.sampled_from([shape_B[1], 1]))
    tensors = {
        "state": normal([batch, channels, state], parameter),
        "u": normal([batch, channels], dtype),
        "delta": normal([batch, channels], dtype) * (1 if softplus else 0.3),
        "A": -normal([channels, state], parameter).abs(),
        "B": normal(shape_B, dtype),
        "C": normal(shape_C, dtype),
        "D": _optional(draw, lambda: normal([channels], parameter)),
        "z": _optional(draw, lambda: normal([batch, channels], dtype)),
        "delta_bias": _optional(draw, lambda: normal([channels], parameter)),
        "reset": _optional(draw, lambda: torch.rand(batch, generator=generator).to(device) < 0.4),
    }
    return Problem(
        wmkernels.selective_step,
        tensors,
        {"delta_softplus": softplus},
        grad_layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        unused_output=draw(st.sampled_from([None, 0, 1])),
        seed=seed,
    )


@st.composite
def linear_scans(
    draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES, device: str = "cpu", max_time: int = 60
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, max_time))
    inner = draw(st.sampled_from([[], [1], [3], [16], [37], [2, 5], [3, 1, 4]]))
    seed, channel_last = draw(st.integers(0, 2**16)), draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: list[int], kind: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return laid_out(values.to(kind), draw(st.sampled_from(LAYOUTS)), seed).to(device)

    shape = [batch, time, *inner] if channel_last else [batch, *inner, time]
    tensors = {
        "gates": normal(shape, dtype).tanh(),
        "tokens": normal(shape, dtype),
        "initial_state": _optional(
            draw, lambda: normal([batch, *inner], draw(st.sampled_from([dtype, state_dtype(dtype)])))
        ),
        "reset": draw(resets(batch, time, device)),
    }
    options = {"reverse": draw(st.booleans()), "channel_last": channel_last, "return_last_state": True}
    return Problem(
        wmkernels.linear_scan,
        tensors,
        options,
        grad_layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        unused_output=draw(st.sampled_from([None, 0, 1])),
        seed=seed,
    )


def few_channels(
    dtype: torch.dtype, time: int, device: str, packed: bool = False, channels: int = 2, state: int = 4
) -> Problem:
    """Forces parallelism over time."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    reset = torch.rand((1, time), generator=generator).to(device) < 3 / time
    tensors = {
        "u": normal(1, channels, time),
        "delta": 0.1 * normal(1, channels, time).abs(),
        "A": -normal(channels, state).abs(),
        "B": normal(1, state, time),
        "C": normal(1, state, time),
        "z": normal(1, channels, time),
        "initial_state": normal(3 if packed else 1, channels, state),
        "reset": reset,
        "cu_seqlens": torch.tensor([0, 5, time // 3, time], device=device) if packed else None,
    }
    return Problem(wmkernels.selective_scan, tensors, {"return_last_state": True})
