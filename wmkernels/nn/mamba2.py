"""The Mamba-2 block (Dao & Gu 2024, figure 6)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import require_range, state_dtype
from wmkernels.nn.causal_conv1d import CausalConv1d, convolve_with_silu, pytorch_only
from wmkernels.nn.checks import checked, require_not_negative
from wmkernels.nn.gated_rms_norm import GatedRMSNorm
from wmkernels.nn.ssd_module import Projected, SSDModule


class Mamba2(SSDModule):
    """A Mamba-2 block without norm and residual connection; loads state dicts of the published block.

    Args:
        d_model: features of inputs and outputs.
        d_state: states per channel.
        d_conv: convolution kernel size.
        conv_init: bound of the convolution's initial weights, uniform; None for that of ``nn.Conv1d``.
        expand: inner channels per feature.
        headdim: channels of a head, which share a decay; a divisor of ``d_ssm``.
        d_ssm: channels of the scan; the other inner channels are a gated MLP. None for all.
        ngroups: sets of B and C; a divisor of the heads.
        A_init_range: bounds of the initial decay rates.
        D_has_hdim: a skip weight per channel, not per head.
        rmsnorm: a gated RMS norm before the output projection; otherwise the gate alone.
        norm_before_gate: gate the normalised features, not the norm's input.
        dt_min: initial step sizes are log-uniform from dt_min to dt_max.
        dt_init_floor: minimum initial step size.
        dt_limit: lowest and highest step size.
        bias: of the input and output projections.
        chunk_size: steps per block of matrix products; None chooses. The same result up to rounding.
        backend: as for ``wmkernels.ssd_scan``.
        dtype: of the parameters; A_log, D and dt_bias stay in float32 (float64).

    Example:
        >>> import torch, wmkernels
        >>> memory = wmkernels.nn.Mamba2(d_model=32, d_state=16, headdim=16)
        >>> outputs, state = memory(torch.randn(2, 100, 32))
        >>> output, state = memory.step(torch.randn(2, 32), state)
        >>> outputs.shape, output.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 32]))
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'window': (2, 3, 96), 'scan': (2, 4, 16, 16)}
    """

    undecayed: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")

    @checked
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
        *,
        chunk_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_sizes(d_model, d_state, expand, headdim, ngroups, d_ssm, chunk_size)
        require_not_negative("Mamba2", "conv_init", conv_init)
        self.d_conv, self.conv_init = d_conv, conv_init
        self.dt_limit = require_range("Mamba2", "dt_limit", dt_limit)
        self.A_init_range = require_range("Mamba2", "A_init_range", A_init_range)
        if not 0 < self.A_init_range[0] <= self.A_init_range[1] < math.inf:
            raise ValueError(f"Mamba2: A_init_range is {A_init_range}, expected positive, finite rates")
        self.backend = backend
        self.d_mlp = self.d_inner - self.d_ssm
        self.d_mixed = self.d_ssm + 2 * ngroups * d_state
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": state_dtype(dtype or torch.get_default_dtype())}
        # In the published order: equal seeds give equal weights.
        projected = 2 * self.d_mlp + self.d_ssm + self.d_mixed + self.heads  # MLP's gate and values, z, x B C, dt
        self.in_proj = nn.Linear(d_model, projected, bias=bias, **factory)
        self.conv1d = CausalConv1d(self.d_mixed, d_conv, bias=conv_bias, backend=pytorch_only(backend), **factory)
        self._reset_convolution()
        self._set_step_size(dt_min, dt_max, dt_init_floor, wide)
        self.A_log = nn.Parameter(torch.empty(self.heads, **wide))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.heads, **wide))
        self._reset_decay()
        self.norm = GatedRMSNorm(self.d_ssm, ngroups, norm_before_gate, **factory) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self._mark_parameters()
        self._mark_when_loaded()

    def reset_parameters(self) -> None:
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        self._reset_convolution()
        self._reset_step_size()
        self._reset_decay()
        if self.norm is not None:
            self.norm.reset_parameters()
        self.out_proj.reset_parameters()

    def _reset_convolution(self) -> None:
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)

    def _reset_decay(self) -> None:
        with torch.no_grad():
            self.A_log.uniform_(*self.A_init_range).log_()
            self.D.fill_(1)

    def extra_repr(self) -> str:
        sizes = f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"
        return f"{sizes}, headdim={self.headdim}" + (f", backend={self.backend!r}" if self.backend else "")

    def _project(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        elapsed: Tensor | None,
        single_step: bool,
    ) -> Projected:
        sizes = [self.d_mlp, self.d_mlp, self.d_ssm, self.d_mixed, self.heads]
        mlp_gate, mlp, z, mixed, dt = self.in_proj(inputs).split(sizes, -1)
        mixed, carried = convolve_with_silu(self.conv1d, mixed, state, reset, cu_seqlens, single_step)
        size = self.ngroups * self.d_state
        x, B, C = mixed.split([self.d_ssm, size, size], -1)
        wide, heads = state_dtype(x.dtype), (self.heads, self.headdim)
        arguments = {
            "x": x.unflatten(-1, heads),
            "A": -torch.exp(self.A_log.to(wide)),
            "B": B.unflatten(-1, (self.ngroups, self.d_state)),
            "C": C.unflatten(-1, (self.ngroups, self.d_state)),
            "D": self.D.to(wide) if len(self.D) == self.heads else self.D.to(wide).view(heads),
            "z": z.unflatten(-1, heads) if self.norm is None else None,
            **self._step_size(dt, elapsed, self.dt_limit),
        }
        return Projected(arguments, (z, mlp_gate, mlp), carried)

    def _output(self, y: Tensor, *beside: Tensor) -> Tensor:
        z, mlp_gate, mlp = beside
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z)
        if self.d_mlp:
            y = torch.cat([F.silu(mlp_gate) * mlp, y], -1)
        out: Tensor = self.out_proj(y)
        return out

    def _scan_state(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return state["scan"].to(state_dtype(x.dtype))

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {
            "window": (rows, self.d_conv - 1, self.d_mixed),
            "scan": (rows, self.heads, self.headdim, self.d_state),
        }
