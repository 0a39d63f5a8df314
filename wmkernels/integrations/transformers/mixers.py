"""Mixers of transformers before 5.15, whose slow forward is one loop: the same layers by this package's ops.

They follow the library's path without kernels: masks before and after the convolution, no fused training function.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.causal_conv1d.function import causal_conv1d, causal_conv1d_step
from wmkernels.dispatch import PYTORCH_BACKENDS, choose
from wmkernels.integrations.transformers.caches import LayeredCache, ListedCache, States
from wmkernels.integrations.transformers.functions import ACTIVATIONS, kept
from wmkernels.integrations.transformers.mixer_call import count, is_recorded, packed_reset, require_one
from wmkernels.nn.gated_rms_norm import unit_rms
from wmkernels.selective_scan.function import selective_scan
from wmkernels.selective_step.function import selective_step
from wmkernels.ssd_scan.function import ssd_scan

Cache = LayeredCache | ListedCache
# (mixer, projected inputs (batch, time, features), its call) -> (output (batch, time, channels), states to write)
Compute = Callable[[Any, Tensor, "Call"], Tensor]


def last(x: Tensor, steps: int) -> Tensor:
    """The last steps of the last dimension."""
    return x.narrow(-1, x.shape[-1] - steps, steps)


class Call:
    """What a mixer is called with.

    Args:
        cache: of this layer, or None.
        mask: (batch, time), 0 where a step is padding, or None.
        reset: bool (batch, time), or None.
    """

    def __init__(self, cache: Cache | None, mask: Tensor | None, reset: Tensor | None) -> None:
        self.cache, self.mask, self.reset = cache, mask, reset
        states = None if cache is None else cache.read()
        self.states = None if states is None else States(kept(states.conv), kept(states.scan))

    def masked(self, x: Tensor, time_dim: int) -> Tensor:
        """``x`` without padding."""
        if self.mask is None:
            return x
        mask = self.mask[:, -x.shape[time_dim] :]
        return (x * (mask[:, None, :] if time_dim == 2 else mask[:, :, None])).to(x.dtype)

    def convolve(self, mixer: Any, x: Tensor) -> Tensor:
        """The mixer's convolution and activation, (batch, channels, time)."""
        weight, bias, activation = mixer.conv1d.weight[:, 0], mixer.conv1d.bias, ACTIVATIONS[mixer.activation]
        window = None if self.states is None else last(self.states.conv, weight.shape[1] - 1)
        if window is not None and x.shape[2] == 1:
            out, _ = causal_conv1d_step(window, x[..., 0], weight, bias, activation=activation)
            return out.unsqueeze(-1)
        return cast(
            Tensor, causal_conv1d(x, weight, bias, activation=activation, initial_state=window, reset=self.reset)
        )

    def scan(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output and last state of a selective scan after softplus, (batch, channels, time)."""
        state = None if self.states is None else self.states.scan
        state = state if state is None or state.dim() == 3 else state.flatten(1, 2)  # heads of channels
        if state is None or u.shape[2] > 1:
            out, last = selective_scan(u, delta, A, B, C, D, z, bias, True, True, initial_state=state, reset=self.reset)
            return out, last
        u, delta, B, C, z = (x[..., 0] for x in (u, delta, B, C, z))
        out, last = selective_step(state, u, delta, A, B, C, D, z, bias, True)
        return out.unsqueeze(-1), last

    def write(self, inputs: Tensor, width: int, state: Tensor) -> None:
        """Inputs of the convolution and the scan's last state, to the cache."""
        if self.cache is not None:
            self.cache.write(inputs, width, state)


def mamba(mixer: Any, projected: Tensor, call: Call) -> Tensor:
    """Mamba, FalconMamba (whose norms have no weights) and Jamba (whose norms are layers)."""
    inputs, gate = projected.transpose(1, 2).chunk(2, dim=1)
    inputs = call.masked(inputs, 2)
    x = call.masked(call.convolve(mixer, inputs), 2)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    delta, B, C = mixer.x_proj(x.transpose(1, 2)).split(sizes, dim=-1)
    if hasattr(mixer, "dt_layernorm"):
        delta, B, C = mixer.dt_layernorm(delta), mixer.b_layernorm(B), mixer.c_layernorm(C)
    elif hasattr(mixer, "rms_eps"):
        delta, B, C = (unit_rms(part, mixer.rms_eps) for part in (delta, B, C))
    out, state = call.scan(
        *(x, mixer.dt_proj(delta).transpose(1, 2), -torch.exp(mixer.A_log.float())),
        *(B.transpose(1, 2), C.transpose(1, 2), mixer.D.float(), gate),
    )
    call.write(inputs, mixer.conv_kernel_size, state)
    return out.transpose(1, 2)


def mamba_heads(mixer: Any, projected: Tensor, call: Call) -> Tensor:
    """Zamba: heads with projections of their own are groups of one scan."""
    batch, time, _ = projected.shape
    heads, size = mixer.n_mamba_heads, mixer.mamba_head_dim
    inputs, gate = projected.transpose(1, 2).unflatten(1, (-1, 2)).unbind(2)
    inputs = call.masked(inputs, 2)
    x = call.masked(call.convolve(mixer, inputs), 2)
    by_head = mixer.x_proj_weight @ x.reshape(batch, heads, size, time)  # (batch, heads, features, time)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    delta, B, C = by_head.split(sizes, dim=2)
    out, state = call.scan(
        *(x, (mixer.dt_proj_weight @ delta).flatten(1, 2), -torch.exp(mixer.A_log.float()).flatten(0, 1), B, C),
        *(mixer.D.float().flatten(), gate, mixer.dt_proj_bias.float().flatten()),
    )
    call.write(inputs, mixer.conv_kernel_size, state.unflatten(1, (heads, size)))
    return out.transpose(1, 2)


def mamba2(mixer: Any, projected: Tensor, call: Call) -> Tensor:
    """Mamba2, Bamba, FalconH1 and GraniteMoeHybrid."""
    return _mamba2(mixer, projected, call, mixer.time_step_limit)


def mamba2_least_step(mixer: Any, projected: Tensor, call: Call) -> Tensor:
    """Zamba2 and NemotronH, which clamp to the smallest step of the initialisation."""
    return _mamba2(mixer, projected, call, (mixer.time_step_min, float("inf")))


def _mamba2(mixer: Any, projected: Tensor, call: Call, limit: Sequence[float]) -> Tensor:
    channels, groups, state_size = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size
    sizes = [channels, mixer.conv_dim, mixer.num_heads]
    gate, inputs, dt = projected[..., -sum(sizes) :].split(sizes, dim=-1)
    inputs = inputs.transpose(1, 2)
    x = call.masked(call.convolve(mixer, inputs).transpose(1, 2), 1)
    x, B, C = x.split([channels, groups * state_size, groups * state_size], dim=-1)
    out, state = ssd_scan(
        *(x.unflatten(2, (mixer.num_heads, mixer.head_dim)), dt, -torch.exp(mixer.A_log.float())),
        *(B.unflatten(2, (groups, state_size)), C.unflatten(2, (groups, state_size))),
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        dt_softplus=True,
        dt_limit=(limit[0], limit[1]),
        initial_state=None if call.states is None else call.states.scan,
        reset=call.reset,
        return_last_state=True,
    )
    call.write(inputs, mixer.conv_kernel_size, cast(Tensor, state))
    out = out.flatten(2)
    return mixer.norm(out, gate) if getattr(mixer, "mamba_rms_norm", True) else out * F.silu(gate)


def mixer_forward(
    original: Callable[..., Tensor], compute: Compute, op: str, names: tuple[str, ...]
) -> Callable[..., Tensor]:
    """A mixer's forward that computes where the op's kernel runs, and is the ``original`` elsewhere.

    Args:
        original: the library's method.
        compute: from projected inputs to outputs before the last projection.
        op: of the scan.
        names: of its arguments after the first two.
    """

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _can_run(self, hidden_states, op):
            count("original")
            return original(self, hidden_states, *args, **kwargs)
        count(compute.__name__)
        return _forward(self, hidden_states, compute, dict(zip(names, args, strict=False)) | kwargs)

    return forward


def _can_run(mixer: Any, x: Tensor, op: str) -> bool:
    if is_recorded() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    conv = mixer.conv1d
    if type(conv) is not nn.Conv1d or hasattr(conv, "_hf_hook") or mixer.activation not in ACTIVATIONS:
        return False
    return choose(op, x.device) not in PYTORCH_BACKENDS


def _forward(mixer: Any, x: Tensor, compute: Compute, arguments: dict[str, Any]) -> Tensor:
    batch, time = x.shape[:2]
    cache = arguments.get("cache_params")
    layered = hasattr(cache, "layers")
    reader = None if cache is None else (LayeredCache if layered else ListedCache)(cache, mixer.layer_idx, arguments)
    reset = packed_reset(arguments, batch, time, x.device)
    mask = arguments.get("attention_mask")
    call = Call(reader, None if mask is None or time == 1 else mask, reset)
    require_one(mixer, reset, call.states)
    if compute in (mamba2, mamba2_least_step):
        x = call.masked(x, 1)
    projected = mixer.in_proj(x * mixer.ssm_in_multiplier if hasattr(mixer, "ssm_in_multiplier") else x)
    if hasattr(mixer, "mup_vector"):
        projected = projected * mixer.mup_vector
    return mixer.out_proj(compute(mixer, projected, call).to(x.dtype))
