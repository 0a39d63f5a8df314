"""Chains of layers in one native call, on float32 tensors of a CPU, without gradient.

A small network on a few dozen rows takes longer to call, operator by operator, than to compute. A chain is the layers
of all steps of such a loop; its rows are independent. Each layer reads and writes columns of a row's scratch, or a
tensor.
"""

import struct
from collections.abc import Iterable
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from wmkernels.checks import DENSE
from wmkernels.dispatch import load_native
from wmkernels.modes import can_bypass_dispatcher

Section = Literal["before", "chosen", "given", "step", "after"]
SECTIONS: tuple[Section, ...] = ("before", "chosen", "given", "step", "after")

_KINDS = [
    "linear",
    "norm",
    "silu",
    "multiply",
    "add",
    "convolve",
    "rotate",
    "scan",
    "softmax",
    "sample",
    "scale",
    "load",
    "store",
]
_LAYER = struct.Struct("=8q2Q2dQ2q")  # csrc/cpu/layers/layers.h
_COLUMNS = 32  # kLayerColumns


class CannotChain(Exception):
    """A module or tensor that a chain cannot have; its text says which."""


def can_chain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the extension has chains and nothing must see PyTorch's own operators on ``tensors``."""
    return (
        hasattr(load_native(), "cpu_run_layers")
        and not _has_any_global_hook()
        and not torch.is_autocast_enabled("cpu")
        and can_bypass_dispatcher(list(tensors))
    )


@runtime_checkable
class Chainable(Protocol):
    """A module of other layers, for ``LayerChain.network``."""

    def add_to(self, chain: "LayerChain", source: int) -> tuple[int, int]:
        """Adds its layers, from columns ``source``; returns columns and size of its outputs. Raises CannotChain."""


class LayerChain:
    """Layers, in the order of the calls that add them, each to the section that ``at`` names.

    "before" runs once; "chosen" and then "step" in every step, but "given" in place of "chosen" in the first ones;
    "after" once. Methods take first columns, as ``columns`` returns them, and raise CannotChain for tensors and modules
    that a chain cannot have. Tensors must live, and their memory stay, until the chain has run.

    Example:
        >>> import torch, wmkernels
        >>> from wmkernels.layers import LayerChain
        >>> inputs, outputs, linear = torch.randn(5, 3), torch.empty(5, 2), torch.nn.Linear(3, 2).requires_grad_(False)
        >>> chain = LayerChain()
        >>> source, target = chain.columns(3), chain.columns(2)
        >>> chain.load(inputs, source)
        >>> chain.linear(linear, source, target)
        >>> chain.store(target, outputs)
        >>> chain.run(rows=5)                                                                    # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.width = 0
        self._layers: dict[Section, list[bytes]] = {section: [] for section in SECTIONS}
        self._section: Section = "before"
        self._kept: list[Tensor] = []

    def at(self, section: Section) -> None:
        self._section = section

    def columns(self, size: int) -> int:
        """The first of ``size`` new columns, for any layer's result."""
        first = self.width
        self.width += -(-size // _COLUMNS) * _COLUMNS
        return first

    def network(self, network: nn.Sequential, source: int, size: int) -> tuple[int, int]:
        """Linear layers, layer norms, SiLUs and ``Chainable``, also in nested sequences; no norm or SiLU is the first.

        From ``size`` columns ``source`` -> columns and size of the outputs.
        """
        require_unhooked(network)
        for module in network:
            require_unhooked(module)
            if type(module) is nn.Linear:
                target = self.columns(module.out_features)
                self.linear(module, source, target)
                source, size = target, module.out_features
            elif isinstance(module, nn.Sequential):
                source, size = self.network(module, source, size)
            elif type(module) is nn.LayerNorm:
                self.norm(module, source, source)
            elif type(module) is nn.SiLU:
                self.silu(source, source, size)
            elif isinstance(module, Chainable):
                source, size = module.add_to(self, source)
            else:
                raise CannotChain(f"a network has {type(module).__name__}")
        return source, size

    def linear(self, linear: nn.Linear, source: int, target: int) -> None:
        """To columns of their own: it writes some more than it has outputs."""
        require_unhooked(linear)
        if type(linear) is not nn.Linear:
            raise CannotChain(f"{type(linear).__name__} in place of a linear layer")
        sizes = (linear.in_features, linear.out_features)
        self._add("linear", source, target, *sizes, weight=linear.weight, bias=linear.bias)

    def norm(self, norm: nn.LayerNorm, source: int, target: int) -> None:
        require_unhooked(norm)
        if len(norm.normalized_shape) != 1 or norm.weight is None or norm.bias is None:
            raise CannotChain(f"a layer norm over {norm.normalized_shape}, or without weights")
        size = norm.normalized_shape[0]
        self._add("norm", source, target, size, weight=norm.weight, bias=norm.bias, factor=norm.eps)

    def silu(self, source: int, target: int, size: int) -> None:
        self._add("silu", source, target, size)

    def multiply(self, source: int, target: int, size: int) -> None:
        """target *= source."""
        self._add("multiply", source, target, size)

    def add(self, source: int, target: int, size: int) -> None:
        """target += source."""
        self._add("add", source, target, size)

    def convolve(self, weight: Tensor, bias: Tensor | None, source: int, window: int, target: int) -> None:
        """A step of ``CausalConv1d``; ``weight`` (channels, 1, taps), ``window`` (taps - 1, channels) columns."""
        channels, _, taps = weight.shape
        self._add("convolve", source, target, channels, taps, window=window, weight=weight, bias=bias)

    def rotate(self, rates: Tensor, projections: int, angles: Tensor) -> None:
        """Adds ``rates`` to ``angles`` (rows, groups, pairs), float64, and turns B and C by them, in place."""
        self._kept.append(rates)
        strides = (angles.stride(0), 0)
        self._add("rotate", projections, projections, 2 * rates.numel(), weight=rates, memory=angles, strides=strides)

    def scan(
        self, A: Tensor, D: Tensor, source: int, delta: int, projections: int, groups: int, state: Tensor, target: int
    ) -> None:
        """A step of ``selective_scan`` with softplus; changes ``state`` (rows, channels, state) in place.

        ``A`` (channels, state); ``delta`` columns with their bias; ``projections`` columns of B and C, each (groups,
        state).
        """
        self._kept += [A, D]
        channels, size = A.shape
        strides = (state.stride(0), 0)
        columns = {"window": delta, "projections": projections, "groups": groups}
        self._add("scan", source, target, channels, size, weight=A, bias=D, memory=state, strides=strides, **columns)

    def softmax(self, source: int, target: int, size: int, classes: int, unimix_ratio: float) -> None:
        """Over each ``classes`` of ``size`` columns, mixed with the uniform distribution."""
        ratio = unimix_ratio
        self._add("softmax", source, target, size, classes, factor=1 - ratio, addend=ratio / classes)

    def sample(
        self, source: int, target: int, size: int, classes: int, uniform: Tensor, first: int, strides: tuple[int, int]
    ) -> None:
        """One-hot samples of probabilities, by numbers from 0 to 1.

        The numbers of a row in a step are in ``uniform.flatten()`` from first + row strides[0] + step strides[1], one
        for each ``classes`` columns. ``first`` may be negative if no step reads there, and ``uniform`` empty if none
        reads at all.
        """
        if not uniform.numel():
            uniform = uniform.new_zeros(1)
            self._kept.append(uniform)
        self._add("sample", source, target, size, classes, memory=uniform, first=first, strides=strides)

    def scale(self, source: int, target: int, size: int, factor: float, addend: float) -> None:
        """target = source * factor + addend."""
        self._add("scale", source, target, size, factor=factor, addend=addend)

    def load(self, tensor: Tensor, target: int) -> None:
        """(rows, size), or (rows, steps, size) for the step's."""
        self._add("load", 0, target, tensor.shape[-1], memory=tensor, strides=_strides(tensor))

    def store(self, source: int, tensor: Tensor, first: int = 0) -> None:
        """To a tensor as of ``load``, at the step + ``first``."""
        strides = _strides(tensor)
        self._add("store", source, 0, tensor.shape[-1], memory=tensor, first=first * strides[1], strides=strides)

    def run(self, rows: int, steps: int = 0, given: int = 0) -> None:
        """Raises MemoryError."""
        counts = [len(self._layers[section]) for section in SECTIONS]
        ends = tuple(sum(counts[: index + 1]) for index in range(4))
        layers = b"".join(layer for section in SECTIONS for layer in self._layers[section])
        threads = torch.get_num_threads()
        load_native().cpu_run_layers(layers, ends, rows, self.width, steps, given, threads)

    def _add(
        self,
        kind: str,
        source: int,
        target: int,
        inputs: int,
        outputs: int = 0,
        *,
        window: int = 0,
        projections: int = 0,
        groups: int = 1,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        factor: float = 0.0,
        addend: float = 0.0,
        memory: Tensor | None = None,
        first: int = 0,
        strides: tuple[int, int] = (0, 0),
    ) -> None:
        weights = [0 if x is None else _address(x) for x in (weight, bias)]
        place = 0 if memory is None else _address(memory, torch.float64 if kind == "rotate" else torch.float32)
        sizes = (_KINDS.index(kind), source, target, window, projections, inputs, outputs, groups)
        layer = _LAYER.pack(*sizes, *weights, factor, addend, place + 4 * first, *strides)
        self._layers[self._section].append(layer)


def run_network(network: nn.Sequential, inputs: Tensor) -> Tensor | None:
    """``network(inputs)``, (..., features) -> (..., outputs), in one call; None where a chain cannot run.

    ``network`` as for ``LayerChain.network``.
    """
    if torch.is_grad_enabled() or not can_chain([inputs]):
        return None
    chain, rows = LayerChain(), inputs.flatten(0, -2).contiguous()
    source = chain.columns(rows.shape[1])
    try:
        chain.load(rows, source)
        target, size = chain.network(network, source, rows.shape[1])
        outputs = rows.new_empty(rows.shape[0], size)
        chain.store(target, outputs)
    except CannotChain:
        return None
    chain.run(rows.shape[0])
    return outputs.view(*inputs.shape[:-1], size)


def require_unhooked(module: nn.Module) -> None:
    """Raises CannotChain for a module with hooks, or whose forward is replaced."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        raise CannotChain(f"{type(module).__name__} has hooks")


def _address(x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    if x.dtype is not dtype or not x.is_cpu or x.layout is not DENSE or not x.is_contiguous():
        raise CannotChain(f"a tensor is {x.dtype} on {x.device}, or not contiguous")
    return x.data_ptr()


def _strides(tensor: Tensor) -> tuple[int, int]:
    return tensor.stride(0), tensor.stride(1) if tensor.dim() == 3 else 0
