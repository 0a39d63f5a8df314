"""Implementations compared: this package, and the usual ConvLSTM in PyTorch.

An implementation maps ``problems.make_inputs`` to h, (time, batch, hidden, height, width). The loops follow
ndrplz/ConvLSTM_pytorch: one convolution of x and h concatenated, then the gates. Weights are concatenated untimed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import wmkernels
from conv_lstms.problems import Inputs
from wmkernels.checks import state_dtype

Cell = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Implementation:
    """``layout``: memory format of the inputs. ``graph``: replay as a CUDA graph."""

    name: str
    run: Callable[[Inputs], Tensor]
    backend: str | None = None  # None: a baseline
    layout: torch.memory_format = torch.contiguous_format
    graph: bool = False

    @property
    def ours(self) -> bool:
        return self.backend is not None

    def prepare(self, inputs: Inputs) -> Inputs:
        """Converts the layout; untimed."""
        x = inputs["x"].detach()
        x = x.flatten(0, 1).contiguous(memory_format=self.layout).unflatten(0, x.shape[:2])
        if self.ours:
            made = {**inputs, "x": x}
        else:
            weight = torch.cat([inputs["weight_ih"], inputs["weight_hh"]], 1).detach()
            made = {"x": x, "weight": weight.contiguous(memory_format=self.layout), "bias": inputs["bias"]}
        for name in inputs.keys() & {"h", "c"}:
            made[name] = inputs[name].detach().contiguous(memory_format=self.layout)
        gradients = inputs["x"].requires_grad
        return {name: tensor.detach().requires_grad_(gradients) for name, tensor in made.items()}


def ours(backend: str, keep_gates: bool = True) -> Implementation:
    def run(inputs: Inputs) -> Tensor:
        weights = inputs["weight_ih"], inputs["weight_hh"], inputs["bias"]
        if "h" not in inputs:
            return wmkernels.conv_lstm(inputs["x"], *weights, keep_gates=keep_gates, backend=backend)[0]
        x, state = inputs["x"][0], (inputs["h"], inputs["c"])
        return wmkernels.conv_lstm_step(x, state, *weights, keep_gates=keep_gates, backend=backend)[0][None]

    name = f"wmkernels {backend}" + ("" if keep_gates else ", gates recomputed")
    return Implementation(name, run, backend, torch.channels_last)


def cell(x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    gates = F.conv2d(torch.cat([x, h], 1), weight, bias, padding=weight.shape[-1] // 2)
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return (torch.sigmoid(o) * torch.tanh(c)).to(x.dtype), c


@functools.cache
def compiled_cell() -> Cell:
    return torch.compile(cell, dynamic=False)


def _loop(step: Callable[[], Cell], layout: torch.memory_format, inputs: Inputs) -> Tensor:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    if "h" in inputs:
        h, c = inputs["h"], inputs["c"]
    else:
        hidden = weight.shape[0] // 4
        h = x.new_zeros((x.shape[1], hidden, *x.shape[-2:])).contiguous(memory_format=layout)
        c = torch.zeros_like(h, dtype=state_dtype(x.dtype))
    outputs, run = [], step()
    for x_t in x.unbind(0):
        h, c = run(x_t, h, c, weight, bias)
        outputs.append(h)
    return torch.stack(outputs)


def baselines(on_gpu: bool, compile_too: bool) -> list[Implementation]:
    nchw, nhwc = torch.contiguous_format, torch.channels_last

    def loop(name: str, step: Callable[[], Cell], layout: torch.memory_format, graph: bool = False) -> Implementation:
        return Implementation(name, functools.partial(_loop, step, layout), layout=layout, graph=graph)

    found = [loop("loop", lambda: cell, nchw), loop("loop, channels last", lambda: cell, nhwc)]
    if compile_too:
        found.append(loop("compiled loop", compiled_cell, nhwc))
    if on_gpu:
        found.append(loop("CUDA graph of the compiled loop", compiled_cell, nhwc, graph=True))
    return found
