"""Sizes, inputs and the roofline of the ConvLSTM problems.

A step costs ``4 hidden (channels + hidden) k²`` multiply-adds per batch element and position; backward costs twice
that. x, h and their gradients move once. Roofline time: the larger of arithmetic and memory traffic at measured peak
rates, without exponentials. Winograd's convolution takes fewer multiply-adds: rows may exceed 100%.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import state_dtype

LANES = 16
PASSES = {"step": 1, "forward": 1, "training": 3}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    batch: int
    channels: int  # of the input
    hidden: int
    size: int  # height and width
    kernel: int
    time: int
    dtype: torch.dtype
    carried: bool = False  # initial state, as in a rollout step

    @property
    def elements(self) -> int:
        return self.time * self.batch * self.hidden * self.size**2

    @property
    def name(self) -> str:
        return f"{self.hidden} channels, {self.size}×{self.size}, k={self.kernel}, batch {self.batch}"

    def describe(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("batch", "channels", "hidden", "size", "kernel", "time")}
        return sizes | {"dtype": str(self.dtype).removeprefix("torch.")}

    def small(self) -> "Problem":
        sizes = {"batch": min(self.batch, 2), "size": min(self.size, 6), "time": min(self.time, 3)}
        return replace(self, channels=min(self.channels, 8), hidden=min(self.hidden, 8), **sizes)

    def multiply_adds(self, measure: str) -> int:
        one = self.elements * 4 * (self.channels + self.hidden) * self.kernel**2
        return PASSES[measure] * one

    def bytes(self, measure: str) -> int:
        once = self.elements // self.hidden * (self.channels + self.hidden) * self.dtype.itemsize
        return once * (3 if measure == "training" else 1)


def make_inputs(problem: Problem, device: torch.device, requires_grad: bool = False, seed: int = 0) -> Inputs:
    """x (time, batch, channels, height, width), weights as nn.LSTM initialises them, initial state."""
    generator = torch.Generator(device).manual_seed(seed)
    size, kernel, gates = problem.size, problem.kernel, 4 * problem.hidden

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        return values.mul_(scale).to(problem.dtype).requires_grad_(requires_grad)

    scale = ((problem.channels + problem.hidden) * kernel**2) ** -0.5
    inputs = {
        "x": normal(problem.time, problem.batch, problem.channels, size, size),
        "weight_ih": normal(gates, problem.channels, kernel, kernel, scale=scale),
        "weight_hh": normal(gates, problem.hidden, kernel, kernel, scale=scale),
        "bias": normal(gates, scale=0.1),
    }
    if problem.carried:
        h, c = (normal(problem.batch, problem.hidden, size, size) for _ in range(2))
        inputs |= {"h": h, "c": c.to(state_dtype(problem.dtype))}
    return inputs


def limit_seconds(problem: Problem, measure: str, rates: dict[str, Any], device_type: str) -> tuple[float, str] | None:
    """Also names the bound; None without a measured rate."""
    candidates = [(problem.bytes(measure) / rates["copy"], "copy bandwidth")]
    if device_type == "cpu":
        rate = rates.get("multiply_add")
        width = 2 if problem.dtype == torch.float64 else 1
        if rate:
            candidates.append((problem.multiply_adds(measure) / LANES * width / rate, "multiply-adds"))
    elif rates.get("matrix"):
        candidates.append((problem.multiply_adds(measure) / rates["matrix"], "multiply-adds"))
    return max(candidates) if len(candidates) > 1 else None
