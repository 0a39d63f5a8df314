"""The Mamba block with mamba_ssm's arguments and caches."""

from typing import Any, Literal

import torch
from torch import Tensor

from wmkernels import nn
from wmkernels.checks import require_flag
from wmkernels.compat.arguments import rows_of
from wmkernels.compat.inference_cache import cached_states, read_window, require_token, write_window


class Mamba(nn.Mamba):
    """``wmkernels.nn.Mamba``, called as mamba_ssm's: ``forward`` returns a tensor, states lie in a cache.

    Args:
        use_fast_path: chooses between mamba_ssm's two implementations; here there is one.
        layer_idx: under which ``inference_params`` has the states.

    The other arguments are those of ``wmkernels.nn.Mamba``.

    Example:
        >>> import torch
        >>> from wmkernels.compat.mamba_ssm import Mamba
        >>> block, inputs = Mamba(d_model=32), torch.randn(2, 10, 32)
        >>> block(inputs).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor),
            *(conv_bias, bias),
            device=device,
            dtype=dtype,
        )
        self.use_fast_path, self.layer_idx = require_flag("Mamba", "use_fast_path", use_fast_path), layer_idx

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:  # type: ignore[override]
        """Outputs as ``hidden_states`` (batch, time, d_model).

        With ``inference_params``, its cache of this layer is filled, and continued where ``seqlen_offset`` is above 0.
        """
        if inference_params is None:
            return self._run(hidden_states, None, None, None, None, None, False)[0]
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        continues, is_step = inference_params.seqlen_offset > 0, hidden_states.shape[1] == 1
        if continues and is_step:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        state = {"window": read_window(conv_state), "scan": rows_of(None, ssm_state)} if continues else None
        out, after = self._run(hidden_states, state, None, None, None, None, False)
        write_window(conv_state, after["window"], False)
        ssm_state.copy_(after["scan"])
        return out

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output of one step (batch, 1, d_model), and both states, updated in place."""
        state = {"window": read_window(conv_state), "scan": rows_of(None, ssm_state)}
        out, after = self._step(require_token("Mamba", hidden_states), state, None, None, None)
        write_window(conv_state, after["window"], True)
        ssm_state.copy_(after["scan"])
        return out.unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zeros: conv_state (batch, d_inner, d_conv) and ssm_state (batch, d_inner, d_state)."""
        device = self.out_proj.weight.device
        conv_dtype, ssm_dtype = dtype or self.conv1d.weight.dtype, dtype or self.dt_proj.weight.dtype
        return (
            torch.zeros(batch_size, self.d_inner, self.d_conv, device=device, dtype=conv_dtype),
            torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=ssm_dtype),
        )

    _get_states_from_cache = cached_states
