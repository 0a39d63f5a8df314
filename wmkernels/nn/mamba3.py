"""The Mamba-3 block (arXiv 2603.15569): a complex state, the trapezoidal rule, and no convolution."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import state_dtype
from wmkernels.nn.checks import checked
from wmkernels.nn.gated_rms_norm import GatedRMSNorm
from wmkernels.nn.ssd_module import Projected, SSDModule
from wmkernels.ssd_scan.meta import SSDState

NORM_EPS = 1e-5
_NO_LIMIT = (0.0, math.inf)


class Mamba3(SSDModule):
    """A Mamba-3 block without norm and residual connection; loads state dicts of the published block with one rank.

    Args:
        d_model: features of inputs and outputs.
        d_state: states per channel.
        expand: inner channels per feature.
        headdim: channels of a head, which share a decay; a divisor of the inner channels.
        ngroups: sets of B and C; a divisor of the heads.
        rope_fraction: of the states that turn, 0.5 or 1.
        dt_min: initial step sizes are log-uniform from dt_min to dt_max.
        dt_init_floor: minimum initial step size.
        A_floor: minimum decay rate.
        is_outproj_norm: a gated RMS norm per head before the output projection; otherwise the gate alone.
        A_activation: of the decay rate: ``"heavy_tail"``, 1 + x for positive x and 1 / (1 - x) for others, or
            ``"softplus"``, that of blocks published before June 2026.
        chunk_size: steps per block of matrix products; None chooses. The same result up to rounding.
        backend: as for ``wmkernels.ssd_scan``.
        dtype: of the parameters; B_bias, C_bias, D and dt_bias stay in float32 (float64).

    Example:
        >>> import torch, wmkernels
        >>> memory = wmkernels.nn.Mamba3(d_model=32, d_state=16, headdim=16)
        >>> outputs, state = memory(torch.randn(2, 100, 32))
        >>> output, state = memory.step(torch.randn(2, 32), state)
        >>> outputs.shape, output.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 32]))
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'scan': (2, 4, 16, 16), 'phase': (2, 4, 4), 'B': (2, 4, 16), 'x': (2, 4, 16)}
    """

    undecayed: ClassVar[tuple[str, ...]] = ("D", "dt_bias")

    @checked
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
        *,
        A_activation: Literal["heavy_tail", "softplus"] = "heavy_tail",
        chunk_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_sizes(d_model, d_state, expand, headdim, ngroups, None, chunk_size)
        if rope_fraction not in (0.5, 1):
            raise ValueError(f"Mamba3: rope_fraction is {rope_fraction}, expected 0.5 or 1")
        self.pairs = int(d_state * rope_fraction) // 2
        if self.pairs < 1:
            raise ValueError(f"Mamba3: d_state is {d_state}, expected at least {int(2 / rope_fraction)}")
        if A_floor < 0:
            raise ValueError(f"Mamba3: A_floor is {A_floor}, expected at least 0")
        self.rope_fraction, self.A_floor, self.A_activation = rope_fraction, A_floor, A_activation
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": state_dtype(dtype or torch.get_default_dtype())}
        # In the published order: equal seeds give equal weights.
        self.in_proj = nn.Linear(d_model, sum(self._projections), bias=False, **factory)
        self._set_step_size(dt_min, dt_max, dt_init_floor, wide)
        self.B_bias = nn.Parameter(torch.ones(self.heads, 1, d_state, **wide))
        self.C_bias = nn.Parameter(torch.ones(self.heads, 1, d_state, **wide))
        self.B_norm = nn.RMSNorm(d_state, eps=NORM_EPS, **factory)
        self.C_norm = nn.RMSNorm(d_state, eps=NORM_EPS, **factory)
        self.D = nn.Parameter(torch.ones(self.heads, **wide))
        self.norm = GatedRMSNorm(self.d_inner, self.heads, True, NORM_EPS, **factory) if is_outproj_norm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **factory)
        self._mark_parameters()
        self._mark_when_loaded()

    @property
    def _projections(self) -> list[int]:
        """Sizes of z, x, B, C, the step size, the decay rate, the trapezoid's weight and the angle."""
        size = self.ngroups * self.d_state
        return [self.d_inner, self.d_inner, size, size, *[self.heads] * 3, self.pairs]

    def reset_parameters(self) -> None:
        self.in_proj.reset_parameters()
        self._reset_step_size()
        for ones in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(ones)
        self.B_norm.reset_parameters()
        self.C_norm.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        self.out_proj.reset_parameters()

    def extra_repr(self) -> str:
        sizes = f"{self.d_model}, d_state={self.d_state}, expand={self.expand}, headdim={self.headdim}"
        return f"{sizes}, rope_fraction={self.rope_fraction}" + (f", backend={self.backend!r}" if self.backend else "")

    def _project(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        elapsed: Tensor | None,
        single_step: bool,
    ) -> Projected:
        z, x, B, C, dt, rate, trapezoid, angle = self.in_proj(inputs).split(self._projections, -1)
        wide, heads = state_dtype(x.dtype), (self.heads, self.headdim)
        arguments = {
            "x": x.unflatten(-1, heads),
            "A": -self._decay_rate(rate.to(wide)),
            "B": self._per_head(B, self.B_norm, self.B_bias),
            "C": self._per_head(C, self.C_norm, self.C_bias),
            "D": self.D.to(wide),
            "z": z.unflatten(-1, heads) if self.norm is None else None,
            "angle": math.pi * torch.tanh(angle.to(wide)).unsqueeze(-2),
            "trapezoid": torch.sigmoid(trapezoid.to(wide)),
            **self._step_size(dt, elapsed, _NO_LIMIT),
        }
        return Projected(arguments, (z,), {})

    def _decay_rate(self, x: Tensor) -> Tensor:
        heavy_tail = self.A_activation == "heavy_tail"
        rate = x.clamp(min=0) + 1 / (1 - x.clamp(max=0)) if heavy_tail else F.softplus(x)
        return rate.clamp(min=self.A_floor)

    def _per_head(self, projected: Tensor, norm: nn.Module, bias: Tensor) -> Tensor:
        """(..., heads, d_state), in the state dtype."""
        vectors = norm(projected.unflatten(-1, (self.ngroups, self.d_state)))
        wide = state_dtype(vectors.dtype)
        vectors = vectors.to(wide).repeat_interleave(self.heads // self.ngroups, -2)
        return vectors + bias.to(wide).squeeze(1)

    def _output(self, y: Tensor, *beside: Tensor) -> Tensor:
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, *beside)
        out: Tensor = self.out_proj(y)
        return out

    def _scan_state(self, state: Mapping[str, Tensor], x: Tensor) -> SSDState:
        scan, B, last_x = (state[name].to(state_dtype(x.dtype)) for name in ("scan", "B", "x"))
        return SSDState(scan, state["phase"], B, last_x)

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {
            "scan": (rows, self.heads, self.headdim, self.d_state),
            "phase": (rows, self.heads, self.pairs),
            "B": (rows, self.heads, self.d_state),
            "x": (rows, self.heads, self.headdim),
        }
