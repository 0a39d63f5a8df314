"""Depthwise causal convolution over time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.causal_conv1d.function import causal_conv1d, causal_conv1d_step
from wmkernels.checks import require_flag, require_size, shown, state_dtype
from wmkernels.dispatch import PYTORCH_BACKENDS
from wmkernels.nn.checks import State, checked, require_inputs, require_packing, require_reset, require_state
from wmkernels.nn.memory_module import MemoryModule, forward_with_states, is_plain

Activation = Literal["silu"]


class CausalConv1d(MemoryModule):
    """Depthwise convolution over the last ``kernel_size`` inputs, with the parameters of ``nn.Conv1d``.

    Args:
        channels: features of inputs and outputs.
        kernel_size: steps per output.
        bias: per channel.
        activation: ``"silu"``, of the outputs, or None.
        backend: as for ``wmkernels.causal_conv1d``.

    Example:
        >>> import torch, wmkernels
        >>> convolution = wmkernels.nn.CausalConv1d(8, kernel_size=4)
        >>> outputs, state = convolution(torch.randn(2, 100, 8))
        >>> output, state = convolution.step(torch.randn(2, 8), state)
        >>> outputs.shape, output.shape, state["window"].shape
        (torch.Size([2, 100, 8]), torch.Size([2, 8]), torch.Size([2, 3, 8]))
    """

    @checked
    def __init__(
        self,
        channels: int,
        kernel_size: int = 4,
        bias: bool = True,
        *,
        activation: Activation | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation is not None and not (isinstance(activation, str) and activation == "silu"):
            raise ValueError(f'CausalConv1d: activation is {shown(activation)}, expected "silu" or None')
        self.channels = channels
        self.kernel_size = kernel_size
        self.activation = activation
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.kernel_size)
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        options = {"activation": self.activation, "backend": self.backend}
        shown = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"{self.channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}{shown}"

    def init_state(self, batch_size: int) -> State:
        """Zeros ``"window"`` (batch, kernel_size - 1, channels), oldest first, float32 (float64)."""
        require_size("CausalConv1d", "batch_size", batch_size)
        shape = (batch_size, self.kernel_size - 1, self.channels)
        return {"window": torch.zeros(shape, device=self.weight.device, dtype=state_dtype(self.weight.dtype))}

    def forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        single_step: bool = False,
    ) -> tuple[Tensor, State]:
        """Outputs (batch, time, channels) and last state; arguments and errors as for ``Mamba.forward``."""
        if require_flag("CausalConv1d", "single_step", single_step):
            return self._step(inputs, state, reset, self.activation)
        return self._sequence(inputs, state, reset, cu_seqlens, self.activation)

    def forward_with_states(
        self,
        inputs: Tensor,
        states_after: Sequence[int],
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """As of ``memory_module``."""
        return self._sequence_with_states(inputs, states_after, state, reset, self.activation)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step: ``input`` (batch, channels), ``reset`` bool (batch,)."""
        if self._steps_by_call:
            stepped: tuple[Tensor, State] = self(input, state, reset, single_step=True)
            return stepped
        return self._step(input, state, reset, self.activation)

    def _sequence(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        activation: Activation | None,
    ) -> tuple[Tensor, State]:
        require_inputs("CausalConv1d", "inputs", inputs, ("batch", "time", "channels"), self.channels)
        require_reset("CausalConv1d", reset, inputs)
        require_packing("CausalConv1d", cu_seqlens, inputs)
        rows = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        outputs, window = causal_conv1d(
            inputs,
            *self._parameters_beside(inputs),
            activation=activation,
            initial_state=None if state is None else self._window(state, rows, inputs),
            reset=reset,
            cu_seqlens=cu_seqlens,
            channel_last=True,
            return_last_state=True,
            backend=self.backend,
        )
        return outputs, {"window": window}

    def _sequence_with_states(
        self,
        inputs: Tensor,
        states_after: Sequence[int],
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        activation: Activation | None,
    ) -> tuple[Tensor, list[State]]:
        outputs, last = self._sequence(inputs, state, reset, None, activation)
        time = inputs.shape[1]
        before = self._window(state, inputs.shape[0], inputs)
        windows = [
            last["window"] if stop == time else self._window_after(stop, inputs, before, reset) for stop in states_after
        ]
        return outputs, [{"window": window} for window in windows]

    def _window_after(self, stop: int, inputs: Tensor, before: Tensor, reset: Tensor | None) -> Tensor:
        past = self.kernel_size - 1
        start = max(stop - past, 0)
        kept = past - (stop - start)
        window = torch.cat([before[:, past - kept :], inputs[:, start:stop].to(before.dtype)], 1)
        if reset is None:
            return window
        later = reset[:, start:stop].flip(1).cumsum(1).flip(1)  # resets in a step and after it
        cut = F.pad(later[:, 1:], (0, 1)) if past else later  # an input survives a reset of its own step
        if kept:
            cut = torch.cat([later[:, :1].expand(-1, kept), cut], 1)
        return window.masked_fill((cut > 0)[..., None], 0)

    def _step(
        self,
        input: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        activation: Activation | None,
    ) -> tuple[Tensor, State]:
        require_inputs("CausalConv1d", "input", input, ("batch", "channels"), self.channels)
        require_reset("CausalConv1d", reset, input)
        output, window = causal_conv1d_step(
            self._window(state, input.shape[0], input),
            input,
            *self._parameters_beside(input),
            activation=activation,
            reset=reset,
            channel_last=True,
            backend=self.backend,
        )
        return output, {"window": window}

    def _window(self, state: Mapping[str, Tensor] | None, rows: int, inputs: Tensor) -> Tensor:
        shape = (rows, self.kernel_size - 1, self.channels)
        if state is None:
            return torch.zeros(shape, device=inputs.device, dtype=state_dtype(inputs.dtype))
        require_state("CausalConv1d", state, {"window": shape}, inputs)
        return state["window"].to(state_dtype(inputs.dtype))

    def _parameters_beside(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (channels, kernel_size) and bias, in the state dtype of the inputs."""
        dtype = state_dtype(inputs.dtype)
        return self.weight.squeeze(1).to(dtype), None if self.bias is None else self.bias.to(dtype)


def pytorch_only(backend: str | None) -> str | None:
    """A convolution's backend beside another op's: plain PyTorch where that is, else what is best."""
    return "chunked" if backend in PYTORCH_BACKENDS else None


def convolve_with_silu(
    module: nn.Module,
    inputs: Tensor,
    state: Mapping[str, Tensor] | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None = None,
    single_step: bool = False,
) -> tuple[Tensor, State]:
    """silu of ``module(inputs, ...)``, in one pass where nothing but a ``CausalConv1d`` is between."""
    if is_plain(module, CausalConv1d):
        assert isinstance(module, CausalConv1d)
        if module.activation is None:
            if single_step:
                return module._step(inputs, state, reset, "silu")
            return module._sequence(inputs, state, reset, cu_seqlens, "silu")
    options: dict[str, Any] = {"single_step": True} if single_step else {"cu_seqlens": cu_seqlens}
    outputs, carried = module(inputs, state, reset, **options)
    return F.silu(outputs), carried


def convolve_with_silu_and_states(
    module: nn.Module,
    inputs: Tensor,
    states_after: Sequence[int],
    state: Mapping[str, Tensor] | None,
    reset: Tensor | None,
) -> tuple[Tensor, list[State]]:
    """``convolve_with_silu``, with the states of ``memory_module.forward_with_states``."""
    if is_plain(module, CausalConv1d):
        assert isinstance(module, CausalConv1d)
        if module.activation is None:
            return module._sequence_with_states(inputs, states_after, state, reset, "silu")
    outputs, states = forward_with_states(module, inputs, states_after, state, reset)
    return F.silu(outputs), states
