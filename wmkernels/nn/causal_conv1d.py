"""Depthwise causal convolution over time.

Summing shifted views trains faster on a CPU than ``nn.Conv1d`` between transposes. Views of other segments are masked,
so NaN does not cross a reset.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import require_flag, require_size, state_dtype
from wmkernels.nn.checks import State, checked, require_inputs, require_packing, require_reset, require_state
from wmkernels.nn.memory_module import MemoryModule


class CausalConv1d(MemoryModule):
    """Depthwise convolution over the last ``kernel_size`` inputs, with the parameters of ``nn.Conv1d``.

    Args:
        channels: features of inputs and outputs.
        kernel_size: steps per output.
        bias: per channel.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.kernel_size)
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"

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
            return self._step(inputs, state, reset)
        require_inputs("CausalConv1d", "inputs", inputs, ("batch", "time", "channels"), self.channels)
        require_reset("CausalConv1d", reset, inputs)
        require_packing("CausalConv1d", cu_seqlens, inputs)
        rows = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        window = self._window(state, rows, inputs)
        steps = inputs.to(window.dtype)
        if self.kernel_size == 1:  # the window is empty
            outputs = self._weighted_sum([steps])
        elif cu_seqlens is not None:
            outputs, window = self._packed(steps, window, reset, cu_seqlens)
        else:
            time = inputs.shape[1]
            outputs, (window,) = self._convolved(steps, window, reset, [time])
        return outputs.to(inputs.dtype), {"window": window}

    def forward_with_states(
        self,
        inputs: Tensor,
        states_after: Sequence[int],
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """As of ``memory_module``."""
        require_inputs("CausalConv1d", "inputs", inputs, ("batch", "time", "channels"), self.channels)
        require_reset("CausalConv1d", reset, inputs)
        window = self._window(state, inputs.shape[0], inputs)
        outputs, windows = self._convolved(inputs.to(window.dtype), window, reset, states_after)
        return outputs.to(inputs.dtype), [{"window": window} for window in windows]

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step: ``input`` (batch, channels), ``reset`` bool (batch,)."""
        if self._steps_by_call:
            stepped: tuple[Tensor, State] = self(input, state, reset, single_step=True)
            return stepped
        return self._step(input, state, reset)

    def _step(self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None) -> tuple[Tensor, State]:
        require_inputs("CausalConv1d", "input", input, ("batch", "channels"), self.channels)
        require_reset("CausalConv1d", reset, input)
        window = self._window(state, input.shape[0], input)
        if self.kernel_size == 1:  # the window is empty
            return self._weighted_sum([input.to(window.dtype)]).to(input.dtype), {"window": window}
        if reset is not None:
            window = window.masked_fill(reset[:, None, None], 0)
        padded = torch.cat([window, input[:, None].to(window.dtype)], 1)  # (batch, kernel_size, channels)
        return self._weighted_sum(padded.unbind(1)).to(input.dtype), {"window": padded[:, 1:].clone()}

    def _window(self, state: Mapping[str, Tensor] | None, rows: int, inputs: Tensor) -> Tensor:
        shape = (rows, self.kernel_size - 1, self.channels)
        if state is None:
            return torch.zeros(shape, device=inputs.device, dtype=state_dtype(inputs.dtype))
        require_state("CausalConv1d", state, {"window": shape}, inputs)
        return state["window"].to(state_dtype(inputs.dtype))

    def _convolved(
        self, steps: Tensor, window: Tensor, reset: Tensor | None, stops: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and the windows after each of ``stops`` steps."""
        past = self.kernel_size - 1
        if not past:
            return self._weighted_sum([steps]), [window] * len(stops)
        padded = torch.cat([window, steps], 1)  # (batch, kernel_size - 1 + time, channels)
        segments = None if reset is None else F.pad(reset.cumsum(1), (past, 0))
        windows = []
        for stop in stops:
            after = slice(stop, stop + past)
            window = padded[:, after].clone()  # a view would keep the sequence alive
            if segments is not None:
                now = segments[:, stop + past - 1 : stop + past]
                window = window.masked_fill((segments[:, after] != now)[..., None], 0)
            windows.append(window)
        return self._convolve(padded, segments), windows

    def _convolve(self, padded: Tensor, segments: Tensor | None) -> Tensor:
        """(batch, kernel_size - 1 + time, channels) -> (batch, time, channels)."""
        past = self.kernel_size - 1
        time = padded.shape[1] - past
        views = [padded[:, start : start + time] for start in range(past + 1)]
        if segments is not None:
            now = segments[:, past:]
            for start in range(past):
                same = segments[:, start : start + time] == now
                views[start] = torch.where(same[..., None], views[start], 0)
        return self._weighted_sum(views)

    def _weighted_sum(self, views: Sequence[Tensor]) -> Tensor:
        """Newest first, so sequence and step round equally."""
        dtype = views[0].dtype
        taps = self.weight.squeeze(1).t().to(dtype).contiguous().unbind(0)
        newest = views[-1]
        total = newest * taps[-1] if self.bias is None else torch.addcmul(self.bias.to(dtype), newest, taps[-1])
        for view, tap in zip(views[-2::-1], taps[-2::-1], strict=True):
            total = torch.addcmul(total, view, tap)
        return total

    def _packed(self, steps: Tensor, window: Tensor, reset: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Each sequence follows its window."""
        sequences, past, channels = window.shape
        time, device = steps.shape[1], steps.device
        bounds = cu_seqlens.to(torch.int64)
        index = torch.arange(sequences, device=device)
        recent = torch.arange(past, device=device)
        owner = torch.searchsorted(bounds, torch.arange(time, device=device), right=True) - 1
        step_rows = torch.arange(time, device=device) + (owner + 1) * past
        window_rows = (bounds[:-1] + index * past)[:, None] + recent
        rows = torch.cat([window_rows.flatten(), step_rows])
        padded = steps.new_zeros(rows.shape[0], channels).index_copy(
            0, rows, torch.cat([window.flatten(0, 1), steps[0]])
        )
        zeros = torch.zeros_like(rows)
        segments = zeros.index_copy(0, rows, torch.cat([index[:, None].expand(sequences, past).flatten(), owner]))
        if reset is not None:
            # Both terms are nondecreasing, so equal sums mean equal terms.
            segments = segments + zeros.index_copy(0, step_rows, reset[0].to(torch.int64)).cumsum(0)
        outputs = self._convolve(padded[None], segments[None]).index_select(1, step_rows - past)
        if past:
            last_rows = (bounds[1:] + index * past)[:, None] + recent
            newest = bounds[1:] + (index + 1) * past - 1
            window = padded[last_rows].masked_fill((segments[last_rows] != segments[newest][:, None])[..., None], 0)
        return outputs, window
