"""nn.Mamba2 and nn.Mamba3 against the published blocks, step by step; their state dicts, norms and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import on_every_target

from wmkernels.nn import GatedRMSNorm, Mamba, Mamba2, Mamba3

every_target = on_every_target("ssd_scan")
BLOCKS = {
    "Mamba2": lambda **options: Mamba2(8, 6, headdim=4, ngroups=2, **options),
    "Mamba2 with an MLP": lambda **options: Mamba2(8, 6, headdim=4, d_ssm=12, D_has_hdim=True, **options),
    "Mamba2 without a norm": lambda **options: Mamba2(8, 6, 2, headdim=8, rmsnorm=False, bias=True, **options),
    "Mamba2, norm before gate": lambda **options: Mamba2(
        8, 6, headdim=4, ngroups=2, norm_before_gate=True, dt_limit=(0.01, 0.02), **options
    ),
    "Mamba3": lambda **options: Mamba3(8, 6, headdim=4, ngroups=2, **options),
    "Mamba3 with a norm": lambda **options: Mamba3(8, 4, headdim=8, rope_fraction=1, is_outproj_norm=True, **options),
    "Mamba3 by softplus": lambda **options: Mamba3(8, 5, headdim=16, A_activation="softplus", A_floor=0.5, **options),
}
every_block = pytest.mark.parametrize("block", BLOCKS)


def made(block, **options):
    torch.manual_seed(0)
    module = BLOCKS[block](**options).double()
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 and "dt_bias" not in name:  # ones, so far
            torch.nn.init.normal_(parameter, 1, 0.2)
    return module


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gated_norm(norm, y, z, groups):
    """(batch, features)."""
    if not norm.norm_before_gate:
        y = y * F.silu(z)
    size = y.shape[-1] // groups
    parts = [rms(y[:, i : i + size], norm.weight[i : i + size]) for i in range(0, y.shape[-1], size)]
    y = torch.cat(parts, -1)
    return y * F.silu(z) if norm.norm_before_gate else y


def published_mamba2(m, inputs):
    """The single step of the published block, from zeros."""
    batch, state_size = inputs.shape[0], m.ngroups * m.d_state
    window = inputs.new_zeros(batch, m.d_conv, m.conv1d.channels)
    h, outputs = inputs.new_zeros(batch, m.heads, m.headdim, m.d_state), []
    for u in inputs.unbind(1):
        z0, x0, z, mixed, dt = m.in_proj(u).split([m.d_mlp, m.d_mlp, m.d_ssm, m.conv1d.channels, m.heads], -1)
        window = torch.cat([window[:, 1:], mixed[:, None]], 1)
        mixed = F.silu((window * m.conv1d.weight[:, 0].T).sum(1) + m.conv1d.bias)
        x, B, C = mixed.split([m.d_ssm, state_size, state_size], -1)
        x = x.view(batch, m.heads, m.headdim)
        B, C = (v.view(batch, m.ngroups, -1).repeat_interleave(m.heads // m.ngroups, 1) for v in (B, C))
        dt = F.softplus(dt + m.dt_bias).clamp(*m.dt_limit)
        h = torch.exp(-dt * m.A_log.exp())[..., None, None] * h + torch.einsum("bh,bhn,bhp->bhpn", dt, B, x)
        D = m.D.view(m.heads, -1)
        y = (torch.einsum("bhpn,bhn->bhp", h, C) + D * x).flatten(1)
        y = y * F.silu(z) if m.norm is None else gated_norm(m.norm, y, z, m.ngroups)
        outputs.append(m.out_proj(torch.cat([F.silu(z0) * x0, y], -1)))
    return torch.stack(outputs, 1), h


def published_mamba3(m, inputs):
    """As the published reference: the state turns B and C by the sum of step times pi tanh(angle)."""
    batch, size, repeats = inputs.shape[0], m.ngroups * m.d_state, m.heads // m.ngroups
    phase = inputs.new_zeros(batch, m.heads, m.pairs)
    h, outputs = inputs.new_zeros(batch, m.heads, m.headdim, m.d_state), []
    last_B, last_x = torch.zeros_like(h[:, :, 0]), torch.zeros_like(h[..., 0])

    def turn(v):
        v = v.clone()
        real, imaginary = v[..., : 2 * m.pairs : 2].clone(), v[..., 1 : 2 * m.pairs : 2].clone()
        v[..., : 2 * m.pairs : 2] = real * phase.cos() - imaginary * phase.sin()
        v[..., 1 : 2 * m.pairs : 2] = real * phase.sin() + imaginary * phase.cos()
        return v

    for u in inputs.unbind(1):
        sizes = [m.d_inner, m.d_inner, size, size, m.heads, m.heads, m.heads, m.pairs]
        z, x, B, C, dt, rate, trapezoid, angle = m.in_proj(u).split(sizes, -1)
        if m.A_activation == "softplus":
            A = -F.softplus(rate)
        else:
            A = -torch.where(rate >= 0, 1 + rate, 1 / (1 - rate.clamp(max=0)))
        A, dt = A.clamp(max=-m.A_floor), F.softplus(dt + m.dt_bias)
        x = x.view(batch, m.heads, m.headdim)
        B = rms(B.view(batch, m.ngroups, -1), m.B_norm.weight).repeat_interleave(repeats, 1) + m.B_bias[:, 0]
        C = rms(C.view(batch, m.ngroups, -1), m.C_norm.weight).repeat_interleave(repeats, 1) + m.C_bias[:, 0]
        phase = phase + math.pi * torch.tanh(angle)[:, None] * dt[..., None]
        B, C = turn(B), turn(C)
        alpha, share = torch.exp(A * dt), torch.sigmoid(trapezoid)
        h = alpha[..., None, None] * h
        h = h + torch.einsum("bh,bhn,bhp->bhpn", alpha * (1 - share) * dt, last_B, last_x)
        h = h + torch.einsum("bh,bhn,bhp->bhpn", share * dt, B, x)
        last_B, last_x = B, x
        y = (torch.einsum("bhpn,bhn->bhp", h, C) + m.D[:, None] * x).flatten(1)
        y = y * F.silu(z) if m.norm is None else gated_norm(m.norm, y, z, m.heads)
        outputs.append(m.out_proj(y))
    return torch.stack(outputs, 1), h


@every_target
@every_block
def test_a_block_is_the_published_one(target, block):
    module = made(block, backend=target.backend, device=target.device)
    inputs = torch.randn(2, 9, 8, dtype=torch.float64, device=target.device)
    expected, h = (published_mamba2 if block.startswith("Mamba2") else published_mamba3)(module, inputs)
    outputs, state = module(inputs)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(state["scan"], h)
    state, steps = None, []
    for t in range(9):
        output, state = module.step(inputs[:, t], state)
        steps.append(output)
    torch.testing.assert_close(torch.stack(steps, 1), expected)


def test_parameters_have_the_published_names_and_shapes():
    shapes = {name: tuple(x.shape) for name, x in Mamba2(64, 16, headdim=32, ngroups=2).state_dict().items()}
    assert shapes == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 128 + 2 * 2 * 16 + 4, 64),
        "conv1d.weight": (128 + 2 * 2 * 16, 1, 4),
        "conv1d.bias": (128 + 2 * 2 * 16,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    shapes = {name: tuple(x.shape) for name, x in Mamba3(64, 16, headdim=32, is_outproj_norm=True).state_dict().items()}
    assert shapes == {
        "dt_bias": (4,),
        "B_bias": (4, 1, 16),
        "C_bias": (4, 1, 16),
        "D": (4,),
        "in_proj.weight": (2 * 128 + 2 * 16 + 3 * 4 + 4, 64),
        "B_norm.weight": (16,),
        "C_norm.weight": (16,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }


@every_block
def test_every_submodule_is_called_by_a_sequence_and_by_a_step(block):
    module, called = made(block), []
    for name, part in module.named_modules():
        part.register_forward_hook(lambda part, args, output, name=name: called.append(name))
    inputs, names = torch.randn(2, 3, 8, dtype=torch.float64), {name for name, _ in module.named_modules()}
    module(inputs)
    assert set(called) == names
    called.clear()
    module.step(inputs[:, 0], None)
    assert set(called) == names


@every_block
def test_initial_values_are_drawn_anew_and_reproducible(block):
    module, again = made(block), BLOCKS[block]().double()
    for each in (module, again):
        torch.manual_seed(1)
        each.reset_parameters()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, module.get_parameter(name)), name
    low, high, _ = module._dt
    assert (low <= F.softplus(module.dt_bias)).all() and (F.softplus(module.dt_bias) <= high * 1.0001).all()


@pytest.mark.parametrize("block", ["Mamba2", "Mamba3"])
def test_parameters_in_16_bits_leave_decays_and_step_sizes_in_32(block):
    module = BLOCKS[block](dtype=torch.bfloat16)
    wide = {name for name, p in module.named_parameters() if p.dtype == torch.float32}
    own = {"Mamba2": {"A_log", "D", "dt_bias"}, "Mamba3": {"B_bias", "C_bias", "D", "dt_bias"}}[block]
    assert wide == own
    inputs = torch.randn(2, 7, 8)
    outputs, state = module(inputs.bfloat16())
    assert outputs.dtype == torch.bfloat16 and state["scan"].dtype == torch.float32
    exact = BLOCKS[block]().double()
    exact.load_state_dict(module.state_dict())
    expected, _ = exact(inputs.bfloat16().double())
    assert (outputs - expected).abs().max() < 0.05 * expected.abs().max()
    exempt = {name for name, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert exempt == own - {"B_bias", "C_bias"}


@pytest.mark.parametrize("before", [False, True])
def test_a_gated_norm_is_computed_in_32_bits(before):
    norm = GatedRMSNorm(6, 2, before, dtype=torch.float16)
    x, z = (300 * torch.randn(3, 6).half() for _ in range(2))  # whose squares overflow
    exact = GatedRMSNorm(6, 2, before, dtype=torch.float64)
    torch.testing.assert_close(norm(x, z).double(), exact(x.double(), z.double()), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(exact(x.double(), z.double()), gated_norm(exact, x.double(), z.double(), 2))


@on_every_target("selective_scan")
def test_norms_of_projections_are_those_of_falcon_mamba(target):
    """Of the time step's rank before its projection, of B and of C."""
    module = Mamba(8, 4, projection_norm_eps=1e-6, backend=target.backend, device=target.device).double()
    inputs = torch.randn(2, 5, 8, dtype=torch.float64, device=target.device)
    x, z = module.in_proj(inputs).chunk(2, -1)
    padded = F.pad(x.mT, (3, 0))
    x = F.silu(F.conv1d(padded, module.conv1d.weight, module.conv1d.bias, groups=16))  # (batch, channels, time)
    rank, B, C = module.x_proj(x.mT).split([module.dt_rank, 4, 4], -1)
    rank, B, C = (rms(v, 1, 1e-6) for v in (rank, B, C))
    step = F.softplus(module.dt_proj(rank))
    h, outputs = x.new_zeros(2, 16, 4), []
    for t in range(5):
        h = torch.exp(-step[:, t, :, None] * module.A_log.exp()) * h
        h = h + (step[:, t] * x[..., t])[..., None] * B[:, t, None]
        y = (h * C[:, t, None]).sum(-1) + module.D * x[..., t]
        outputs.append(module.out_proj(y * F.silu(z[:, t])))
    torch.testing.assert_close(module(inputs)[0], torch.stack(outputs, 1))
    assert sorted(module.state_dict()) == sorted(Mamba(8, 4).state_dict())


@every_target
@pytest.mark.parametrize("block", ["Mamba2", "Mamba3"])
def test_one_step_of_n_is_n_steps_without_input(target, block):
    kind = {"Mamba2": Mamba2, "Mamba3": Mamba3}[block]
    options = {"d_conv": 1, "conv_bias": False} if block == "Mamba2" else {}
    module = kind(8, 6, headdim=4, **options, backend=target.backend, device=target.device).double()
    state = {name: torch.randn_like(x) for name, x in module.init_state(2).items()}
    if block == "Mamba3":
        state["x"] = torch.zeros_like(state["x"])
    zeros = torch.zeros(2, 5, 8, dtype=torch.float64, device=target.device)
    _, leapt = module(zeros[:, :1], state, elapsed=torch.full((2, 1), 5.0, device=target.device))
    _, stepped = module.step(zeros[:, 0], state, elapsed=torch.full((2,), 5.0, device=target.device))
    _, waited = module(zeros, state)
    torch.testing.assert_close(leapt, stepped)
    torch.testing.assert_close(leapt["scan"], waited["scan"])
    if block == "Mamba3":
        torch.testing.assert_close(leapt["phase"].cos(), waited["phase"].cos())


REFUSALS = {
    "headdim": (lambda: Mamba2(8, headdim=3), "Mamba2: headdim is 3, expected a divisor of the scan's 16 channels"),
    "ngroups": (lambda: Mamba3(8, headdim=4, ngroups=3), "Mamba3: ngroups is 3, expected a divisor of the 4 heads"),
    "d_ssm": (lambda: Mamba2(8, headdim=4, d_ssm=20), "Mamba2: d_ssm is 20, expected at most the 16 inner channels"),
    "dt_limit": (lambda: Mamba2(8, headdim=4, dt_limit=(1, 0)), r"Mamba2: dt_limit is \(1, 0\), expected its lowest"),
    "rates": (
        lambda: Mamba2(8, headdim=4, A_init_range=(0, 1)),
        r"Mamba2: A_init_range is \(0, 1\), expected positive, finite rates",
    ),
    "rope": (lambda: Mamba3(8, headdim=4, rope_fraction=0.3), "Mamba3: rope_fraction is 0.3, expected 0.5 or 1"),
    "d_state": (lambda: Mamba3(8, 3, headdim=4), "Mamba3: d_state is 3, expected at least 4"),
    "dt_min": (lambda: Mamba3(8, headdim=4, dt_min=0.2), "Mamba3: dt_min is 0.2 and dt_max 0.1, expected 0 < dt_min"),
    "floor": (lambda: Mamba3(8, headdim=4, A_floor=-1), "Mamba3: A_floor is -1, expected at least 0"),
    "chunk": (lambda: Mamba3(8, headdim=4, chunk_size=0), "Mamba3: chunk_size is 0, expected 1 to"),
    "eps": (lambda: Mamba(8, projection_norm_eps=-1), "Mamba: projection_norm_eps is -1, expected a finite number"),
    "state": (
        lambda: Mamba3(8, headdim=4)(torch.zeros(1, 2, 8), Mamba2(8, headdim=4).init_state(1)),
        r"Mamba3: state is the keys .* expected a dict with \['B', 'phase', 'scan', 'x'\]",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_of_the_blocks(case):
    make, message = REFUSALS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        make()
