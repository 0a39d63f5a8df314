"""The wmkernels.nn modules in tests/core/test_laws.py."""

from collections.abc import Sequence
from typing import Any

import torch
from recurrences import Example, ModuleRecurrence, Named, Outcome, State, register
from torch import Tensor

from wmkernels import nn


class PackingModuleRecurrence(ModuleRecurrence):
    packed = True

    def parallel(
        self,
        example: Example,
        inputs: Named,
        parameters: Named,
        state: State | None,
        reset: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Outcome:
        if lengths is None:
            return super().parallel(example, inputs, parameters, state, reset)
        assert example.module is not None
        sequence = inputs["inputs"]
        bounds = torch.tensor([0, *lengths], device=sequence.device).cumsum(0)
        names = example.module.init_state(1)
        given: Any = None if state is None else dict(zip(names, state, strict=True))
        outputs, after = torch.func.functional_call(
            example.module, parameters, (sequence, given, reset), {"cu_seqlens": bounds}
        )
        return outputs, tuple(after.values())


class ComposedRecurrence(ModuleRecurrence):
    is_composed = True


def _mamba(width: int) -> nn.Mamba:
    """At width 6, the convolution exceeds most test sequences."""
    return nn.Mamba(width, d_state=3 if width == 6 else 16, d_conv=7 if width == 6 else 4, bias=width == 6)


def _rotated_mamba(width: int) -> nn.RotaryMamba:
    """At width 6, two groups and input-dependent angles."""
    wide = width == 6
    module = nn.RotaryMamba(
        width, d_state=4, d_conv=3, groups=2 if wide else 1, selective_angle=wide, selective_speed=wide
    )
    if module.angle_proj is not None:
        torch.nn.init.normal_(module.angle_proj.weight)
    return module


def _mamba2(width: int) -> nn.Mamba2:
    """At width 6, two groups and an MLP."""
    other = {"ngroups": 2, "d_ssm": 8, "headdim": 2} if width == 6 else {"headdim": 4}
    return nn.Mamba2(width, 5, 3, **other)


def _mamba3(width: int) -> nn.Mamba3:
    """At width 6, two groups and a norm."""
    other = {"ngroups": 2, "is_outproj_norm": True, "headdim": 3} if width == 6 else {"headdim": 4}
    return nn.Mamba3(width, 5, **other)


def _gated_delta_net(width: int) -> nn.GatedDeltaNet:
    """At width 6, value heads share keys."""
    return nn.GatedDeltaNet(width, 1, 3, value_heads=2 if width == 6 else 1, d_conv=3, bias=width == 6)


def _convolution(width: int) -> nn.CausalConv1d:
    return nn.CausalConv1d(width, kernel_size=width, bias=width != 2)


register(PackingModuleRecurrence("Mamba", op="selective_scan", build=_mamba, widths=(4, 6)))
register(PackingModuleRecurrence("RotaryMamba", op="selective_scan", build=_rotated_mamba, widths=(4, 6)))
for heads in (
    PackingModuleRecurrence("Mamba2", op="ssd_scan", build=_mamba2, widths=(4, 6)),
    PackingModuleRecurrence("Mamba3", op="ssd_scan", build=_mamba3, widths=(4, 6)),
    PackingModuleRecurrence("GatedDeltaNet", op="gated_delta_rule", build=_gated_delta_net, widths=(4, 6)),
):
    heads.kernels_only = True
    register(heads)
register(PackingModuleRecurrence("CausalConv1d", op="causal_conv1d", build=_convolution, widths=(1, 2, 5)))
# Without an op, any op's devices serve.
register(
    ComposedRecurrence(
        "BlockScan",
        op="linear_scan",
        build=lambda width: nn.BlockScan(nn.CausalConv1d(width, 4), (1, 2) if width == 2 else 1, (1, 3)),
        widths=(2, 3),
        tokens=3,
    )
)
register(
    ComposedRecurrence(
        "LocalAttention",
        op="linear_scan",
        build=lambda width: nn.LocalAttention(width, {4: 3, 8: 1, 12: 8}[width], 2, (3, 2), bias=width == 4),
        widths=(4, 8, 12),
        tokens=6,
    )
)
register(
    ComposedRecurrence(
        "MemoryAttention",
        op="linear_scan",
        build=lambda width: nn.MemoryAttention(width, tokens=3, block=1 if width == 8 else 4, heads=2),
        widths=(4, 8),
    )
)


def resets(batch, time, device="cpu"):
    reset = torch.zeros((batch, time), dtype=torch.bool)
    reset[0, 0] = True
    reset[:, time // 3] = reset[:, time // 2 + 1] = True
    return reset.to(device)


def random_state(module, batch):
    return {name: torch.randn_like(value) for name, value in module.init_state(batch).items()}
