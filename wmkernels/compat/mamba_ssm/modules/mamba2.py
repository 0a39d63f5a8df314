"""The Mamba-2 block with mamba_ssm's arguments and caches."""

import math
from typing import Any

import torch
from torch import Tensor

from wmkernels import nn
from wmkernels.checks import require_flag, require_size
from wmkernels.compat.arguments import reset_of, rows_of
from wmkernels.compat.inference_cache import cached_states, read_window, require_token, without_group, write_window
from wmkernels.compat.packing import padded_bounds
from wmkernels.nn.ssd_module import SSDModule


class Mamba2(nn.Mamba2):
    """``wmkernels.nn.Mamba2``, called as mamba_ssm's: ``forward`` returns a tensor, states lie in a cache.

    Args:
        chunk_size: of mamba_ssm's kernels; the op chooses its own, with the same result up to rounding.
        use_mem_eff_path: chooses between mamba_ssm's two implementations; here there is one.
        layer_idx: under which ``inference_params`` has the states.
        process_group: None; a block over several processes is refused.
        sequence_parallel: of a process group.

    The other arguments are those of ``wmkernels.nn.Mamba2``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: object = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        without_group("Mamba2", process_group)
        require_size("Mamba2", "chunk_size", chunk_size, least=1)
        super().__init__(
            *(d_model, d_state, d_conv, conv_init, expand, headdim, d_ssm, ngroups, A_init_range, D_has_hdim, rmsnorm),
            *(norm_before_gate, dt_min, dt_max, dt_init_floor, dt_limit, bias, conv_bias),
            device=device,
            dtype=dtype,
        )
        self.use_mem_eff_path = require_flag("Mamba2", "use_mem_eff_path", use_mem_eff_path)
        self.layer_idx = layer_idx
        self.nheads = self.heads

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Outputs as ``u`` (batch, time, d_model), or (batch * time, d_model) with ``seqlen`` for time.

        Args:
            u: inputs.
            seqlen: time, where ``u`` has batch and time in one dimension.
            seq_idx: int (batch, time): where it changes, a sequence starts.
            cu_seqlens: int (sequences + 1,), bounds of packed sequences, batch 1; what follows the last is padding.
                The cache then has one row per sequence.
            inference_params: its cache of this layer is filled, and continued where ``seqlen_offset`` is above 0.
        """
        rows = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        out = self._forward(rows, seq_idx, cu_seqlens, inference_params)
        return out if seqlen is None else out.flatten(0, 1)

    def _forward(
        self, rows: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, inference_params: Any
    ) -> Tensor:
        reset = reset_of("Mamba2", seq_idx, rows, (rows.shape[0], rows.shape[1]))
        bounds = None if cu_seqlens is None else padded_bounds("Mamba2", cu_seqlens, rows.shape[1])
        if inference_params is None:
            return SSDModule.forward(self, rows, None, reset, cu_seqlens=bounds)[0]
        count = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        conv_state, ssm_state = self._get_states_from_cache(inference_params, count)
        continues = inference_params.seqlen_offset > 0
        if continues and rows.shape[1] == 1:
            return self.step(rows, conv_state, ssm_state)[0]
        state = None
        if continues:
            if cu_seqlens is not None:
                raise ValueError("Mamba2: cu_seqlens is given where a cache is continued, expected None")
            state = {"window": read_window(conv_state), "scan": rows_of(None, ssm_state)}
        out, after = SSDModule.forward(self, rows, state, reset, cu_seqlens=bounds)
        write_window(conv_state, after["window"][:count], False)
        ssm_state.copy_(after["scan"][:count])
        return out

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output of one step (batch, 1, d_model), and both states, updated in place."""
        state = {"window": read_window(conv_state), "scan": rows_of(None, ssm_state)}
        out, after = self._step(require_token("Mamba2", hidden_states), state, None, None)
        write_window(conv_state, after["window"], True)
        ssm_state.copy_(after["scan"])
        return out.unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zeros: conv_state (batch, convolved channels, d_conv), ssm_state (batch, heads, headdim, d_state)."""
        device = self.out_proj.weight.device
        conv_dtype, ssm_dtype = dtype or self.conv1d.weight.dtype, dtype or self.in_proj.weight.dtype
        width, channels = self.d_conv, self.d_mixed
        strides = (width * channels, 1, channels)  # a view made without gradients could not be updated with them
        conv_state = torch.empty_strided(
            (batch_size, channels, width), strides, device=device, dtype=conv_dtype
        ).zero_()
        shape = (batch_size, self.heads, self.headdim, self.d_state)
        return conv_state, torch.zeros(shape, device=device, dtype=ssm_dtype)

    _get_states_from_cache = cached_states
