"""The Mamba-3 block with mamba_ssm's arguments and caches."""

from typing import Any

import torch
from torch import Tensor

from wmkernels import nn
from wmkernels.checks import require_size, shown
from wmkernels.compat.arguments import reset_of, rows_of
from wmkernels.compat.inference_cache import cached_states
from wmkernels.compat.packing import padded_bounds
from wmkernels.nn.checks import State
from wmkernels.nn.ssd_module import SSDModule
from wmkernels.ssd_scan.canonical_form import turned


class Mamba3(nn.Mamba3):
    """``wmkernels.nn.Mamba3``, called as mamba_ssm's: ``forward`` returns a tensor, states lie in a cache.

    Args:
        is_mimo: False; blocks with more than one rank are refused.
        mimo_rank: of such blocks.
        fuse_pregate_headwise_norm: of such blocks.
        chunk_size: of mamba_ssm's kernels; the op chooses its own, with the same result up to rounding.
        dropout: 0; the block has none.
        layer_idx: under which ``inference_params`` has the states.
        n_layer: of the model; the block does not depend on it.

    The other arguments are those of ``wmkernels.nn.Mamba3``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        fuse_pregate_headwise_norm: bool = True,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if is_mimo:
            raise ValueError("Mamba3: is_mimo is True, expected False: blocks of more than one rank are not supported")
        if dropout:
            raise ValueError(f"Mamba3: dropout is {shown(dropout)}, expected 0: the block has none")
        require_size("Mamba3", "chunk_size", chunk_size, least=1)
        super().__init__(
            *(d_model, d_state, expand, headdim, ngroups, rope_fraction, dt_min, dt_max, dt_init_floor, A_floor),
            is_outproj_norm,
            device=device,
            dtype=dtype,
        )
        self.is_mimo, self.mimo_rank, self.layer_idx = False, 1, layer_idx
        self.nheads, self.num_rope_angles = self.heads, self.pairs

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Outputs as ``u`` (batch, time, d_model); arguments as of ``Mamba2``."""
        reset = reset_of("Mamba3", seq_idx, u, (u.shape[0], u.shape[1]))
        bounds = None if cu_seqlens is None else padded_bounds("Mamba3", cu_seqlens, u.shape[1])
        if inference_params is None:
            return SSDModule.forward(self, u, None, reset, cu_seqlens=bounds)[0]
        count = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        cache = self._get_states_from_cache(inference_params, count)
        continues = inference_params.seqlen_offset > 0
        if continues and cu_seqlens is not None:
            raise ValueError("Mamba3: cu_seqlens is given where a cache is continued, expected None")
        state = _read(cache) if continues else None
        out, after = SSDModule.forward(self, u, state, reset, cu_seqlens=bounds)
        _write(cache, {name: value[:count] for name, value in after.items()})
        return out

    def step(  # type: ignore[override]
        self, u: Tensor, angle_state: Tensor, ssm_state: Tensor, k_state: Tensor, v_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The output of one step, as ``u`` (batch, d_model), and the four states, updated in place."""
        cache = (angle_state, ssm_state, k_state, v_state)
        out, after = self._step(u, _read(cache), None, None)
        _write(cache, after)
        return out, angle_state, ssm_state, k_state, v_state

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inplace_state: object = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Zeros.

        Angles (batch, heads, pairs) in float64, ssm_state (batch, heads, headdim, d_state) in float32 (float64),
        k_state (batch, 1, heads, d_state) and v_state (batch, heads, headdim).
        """
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (
            torch.zeros(batch_size, self.heads, self.pairs, device=device, dtype=torch.float64),
            torch.zeros(batch_size, self.heads, self.headdim, self.d_state, device=device, dtype=wide),
            torch.zeros(batch_size, 1, self.heads, self.d_state, device=device, dtype=dtype),
            torch.zeros(batch_size, self.heads, self.headdim, device=device, dtype=dtype),
        )

    _get_states_from_cache = cached_states


def _read(cache: tuple[Tensor, ...]) -> State:
    """``k_state`` holds the last B turned by its angle."""
    angle, scan, k, v = (rows_of(None, state) for state in cache)
    return {"scan": scan, "phase": angle, "B": turned(k.squeeze(1).to(scan.dtype), -angle.double()), "x": v}


def _write(cache: tuple[Tensor, ...], state: State) -> None:
    angle, scan, k, v = cache
    angle.copy_(state["phase"])
    scan.copy_(state["scan"])
    k.copy_(turned(state["B"], state["phase"]).unsqueeze(1))
    v.copy_(state["x"])
