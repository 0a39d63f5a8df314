"""Sizes, inputs and the roofline of the scan problems.

Roofline time: the larger of arithmetic and memory traffic at the peak rates of the same run.

CPU, selective scan, vector instructions of 16 fp32 lanes per state of 16 elements:

- forward 13: ten for the decay (product step_t A, rounding, subtraction, five multiply-adds, scaling, product), three
  for state and output;
- backward 20: twelve to recompute decay and state; state gradient (2), gradients of B, C, A and the two sums per
  channel (5), product with the previous state (1).

Gated delta rule, multiply-adds per head and step of the kernels' chunks of C steps: forward 3 d_k d_v + C (d_k + d_v),
backward 6 d_k d_v + C (2 d_k + 3 d_v).

SSD scan, multiply-adds per channel and step for chunks of Q steps, at the rate of a large matrix product: forward 2 n +
n / Q + Q / 2 (1 + n / channels), backward 5 n + n / Q + Q (1 + n / channels), with the Q of the fewest.

GPU, selective scan, per state: one exponential, and 4 multiply-adds forward or 11 backward. Activations move once. Work
per channel is left out.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.gated_delta_rule.meta import CHUNK

CPU_INSTRUCTIONS = {"forward": 13, "backward": 20, "training": 33, "step": 13}
GPU_MULTIPLY_ADDS = {"forward": 4, "backward": 11, "training": 15, "step": 4}
GPU_EXPONENTIALS = {"forward": 1, "backward": 1, "training": 2, "step": 1}
# Activations: without z, with z.
SCAN_TENSORS = {"forward": (3, 4), "backward": (5, 7), "training": (8, 11)}
SSD_TENSORS = {"forward": 2, "backward": 3, "training": 5}
SSD_TERMS = {"forward": (2, 1, 0.5), "backward": (5, 1, 1), "training": (7, 2, 1.5)}  # of n, n / Q and Q (1 + n / c)
SSD_HEAD = 64
DELTA_TENSORS = {"forward": 4, "backward": 8, "training": 12}  # residuals as well
DELTA_TERMS = {"forward": (3, 2), "backward": (6, 5), "training": (9, 7)}  # of d^2 and of C d
CONVOLUTION_TENSORS = {"forward": 2, "backward": 3, "training": 5}
LINEAR_TENSORS = {"forward": 3, "backward": 5, "training": 8}
LANES = 16

Inputs = dict[str, Any]  # tensors by argument name


@dataclass(frozen=True)
class Problem:
    """``gated``: with z, delta_bias and softplus, as in a Mamba layer.

    Of the gated delta rule, ``state`` is the size of a head, of the causal convolution its width. Heads of an SSD scan
    have ``SSD_HEAD`` channels.
    """

    op: str  # of this package, or attention
    batch: int
    channels: int
    time: int
    dtype: torch.dtype
    state: int = 16
    channel_last: bool = False
    gated: bool = False

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.time

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def smaller(self, time: int, channels: int) -> "Problem":
        return replace(self, time=min(self.time, time), channels=min(self.channels, channels), batch=min(self.batch, 2))

    def describe(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "batch": self.batch,
            "channels": self.channels,
            "state": None if self.op in ("linear_scan", "attention") else self.state,
            "time": self.time,
            "dtype": self.dtype_name,
            "channel_last": self.channel_last,
            "gated": self.gated,
        }


def make_inputs(problem: Problem, device: torch.device, requires_grad: bool = False, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = problem.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(scale).add_(shift)

    def uniform(low: float, high: float, *shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype, device=device).mul_(high - low).add_(low)

    batch, channels, state, time = problem.batch, problem.channels, problem.state, problem.time
    if problem.op == "attention":
        heads, width = _heads(channels)
        inputs = {name: normal(batch, heads, time, width) for name in ("query", "key", "value")}
    elif problem.op == "gated_delta_rule":
        gates = (batch, channels // state, time)
        heads = (batch, channels // state, state, time)
        inputs = {name: F.normalize(normal(*heads), dim=2) for name in "qk"} | {"v": normal(*heads)}
        inputs |= {"gate": uniform(-0.1, 0.0, *gates, dtype=wide), "beta": uniform(0.0, 1.0, *gates, dtype=wide)}
        if problem.channel_last:
            inputs = {name: x.movedim(-1, 1).contiguous() for name, x in inputs.items()}
    elif problem.op == "ssd_scan":
        heads_ = channels // SSD_HEAD
        inputs = {
            "x": normal(batch, time, heads_, SSD_HEAD),
            "dt": uniform(0.001, 0.1, batch, time, heads_),
            "A": uniform(-16.0, -1.0, heads_, dtype=wide),
            "B": normal(batch, time, 1, state),
            "C": normal(batch, time, 1, state),
            "D": normal(heads_, dtype=wide),
        }
    elif problem.op.startswith("causal_conv1d"):
        weights = {"weight": normal(channels, state, dtype=wide), "bias": normal(channels, dtype=wide)}
        if problem.op == "causal_conv1d_step":
            window = normal(batch, channels, state - 1, dtype=wide)
            inputs = {"state": window, "x": normal(batch, channels), **weights}
        else:
            order = (batch, time, channels) if problem.channel_last else (batch, channels, time)
            inputs = {"x": normal(*order), **weights}
    elif problem.op == "linear_scan":
        shape: tuple[int, ...] = (batch, time, channels) if problem.channel_last else (batch, channels, time)
        inputs = {"gates": uniform(0.5, 1.0, *shape), "tokens": normal(*shape)}
    else:
        step = problem.op == "selective_step"
        shape = (batch, channels) if step else (batch, channels, time)
        projection = (batch, state) if step else (batch, state, time)
        if problem.channel_last:
            shape, projection = (batch, time, channels), (batch, time, state)
        rates = -torch.arange(1.0, state + 1, dtype=wide, device=device).expand(channels, state)  # S4D-real
        inputs = {
            "u": normal(*shape),
            "delta": normal(*shape, scale=0.5) if problem.gated else uniform(0.001, 0.1, *shape),
            "A": rates.contiguous(),
            "B": normal(*projection),
            "C": normal(*projection),
            "D": normal(channels, dtype=wide),
        }
        if problem.gated:
            inputs["z"] = normal(*shape)
            inputs["delta_bias"] = normal(channels, dtype=wide, scale=0.1, shift=-3.0)
        if step:
            inputs["state"] = normal(batch, channels, state, dtype=wide)
    if requires_grad:
        for tensor in inputs.values():
            tensor.requires_grad_(True)
    return inputs


def _heads(channels: int) -> tuple[int, int]:
    width = math.gcd(channels, 64)
    return channels // width, width


def limit_seconds(problem: Problem, measure: str, rates: dict[str, Any], device_type: str) -> tuple[float, str] | None:
    """Also names the bound; None if undefined."""
    bytes_moved = _bytes(problem, measure)
    if bytes_moved is None:
        return None
    candidates = [(bytes_moved / rates["copy"], "copy bandwidth")]
    if problem.op.startswith("selective"):
        states = problem.elements * problem.state
        if device_type == "cpu":
            width = 2 if problem.dtype == torch.float64 else 1
            instructions = CPU_INSTRUCTIONS[measure] * states / LANES * width
            candidates.append((instructions / rates["multiply_add"], "multiply-adds"))
        else:
            if rates.get("multiply_add"):
                candidates.append((GPU_MULTIPLY_ADDS[measure] * states / rates["multiply_add"], "multiply-adds"))
            if rates.get("exponential"):
                candidates.append((GPU_EXPONENTIALS[measure] * states / rates["exponential"], "exponentials"))
    if problem.op == "ssd_scan" and rates.get("matrix"):
        width = 2 if problem.dtype == torch.float64 and device_type == "cpu" else 1
        multiply_adds = problem.elements * _ssd_multiply_adds(problem, measure)
        candidates.append((multiply_adds * width / rates["matrix"], "matrix products"))
    if problem.op == "gated_delta_rule" and rates.get("multiply_add"):
        squares, products = DELTA_TERMS[measure]
        multiply_adds = problem.elements * (squares * problem.state + products * CHUNK)
        width = 2 if problem.dtype == torch.float64 else 1
        per_unit = width / LANES if device_type == "cpu" else 1
        candidates.append((multiply_adds * per_unit / rates["multiply_add"], "multiply-adds"))
    return max(candidates)


def _ssd_multiply_adds(problem: Problem, measure: str) -> float:
    """Per channel and step, with the cheapest chunk."""
    states, decays, squares = SSD_TERMS[measure]
    shared = squares * (1 + problem.state / problem.channels)
    return min(states * problem.state + decays * problem.state / q + shared * q for q in range(1, problem.time + 1))


def _bytes(problem: Problem, measure: str) -> int | None:
    size = problem.dtype.itemsize
    if problem.op == "linear_scan":
        return LINEAR_TENSORS[measure] * problem.elements * size
    if problem.op == "causal_conv1d":
        return CONVOLUTION_TENSORS[measure] * problem.elements * size
    if problem.op == "causal_conv1d_step":
        return problem.elements * (2 * size + (3 * problem.state - 2) * max(4, size))  # windows, weights
    if problem.op == "ssd_scan":
        return SSD_TENSORS[measure] * problem.elements * size
    if problem.op == "gated_delta_rule":
        return DELTA_TENSORS[measure] * problem.elements * size
    if problem.op == "selective_scan":
        activations = SCAN_TENSORS[measure][problem.gated] * problem.elements
        passes = {"forward": 2, "backward": 4, "training": 6}[measure]  # B, C, gradients
        return (activations + passes * problem.batch * problem.state * problem.time) * size
    if problem.op == "selective_step":
        wide = max(4, size)
        return problem.elements * ((3 + 2 * problem.gated) * size + 3 * problem.state * wide)  # state twice, A once
    return None


def gradient_names(inputs: Inputs) -> list[str]:
    return [name for name, tensor in inputs.items() if tensor.requires_grad]
