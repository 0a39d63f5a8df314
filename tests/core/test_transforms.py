"""torch.func equals loops."""

import pytest
import torch
from backends import on_every_target
from test_gradients import SMALL, every_op
from torch.func import grad, jacrev, jvp, vmap

every_target = on_every_target("selective_scan")


def pure(op, target, dtype=torch.float64):
    problem = SMALL[op](target.device, dtype)
    tensors = {k: v for k, v in problem.tensors.items() if v is not None}

    def run(values):
        return problem.call(target.backend, values)

    return run, tensors


@every_op
@every_target
def test_grad_is_autograd(op, target):
    run, tensors = pure(op, target)
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    expected = torch.autograd.grad(sum(x.square().sum() for x in run(leaves)), [*leaves.values()])
    found = grad(lambda x: sum(y.square().sum() for y in run(x)))(tensors)
    torch.testing.assert_close([*found.values()], list(expected))


@every_op
@every_target
def test_vmap_over_every_input_alone_and_all_together(op, target):
    run, tensors = pure(op, target)
    many = {k: torch.stack([v, 0.5 * v, 0.9 * v + 0.01]) for k, v in tensors.items()}
    for chosen in [[name] for name in tensors] + [list(tensors)]:
        dims = {k: 0 if k in chosen else None for k in tensors}
        values = {k: many[k] if k in chosen else tensors[k] for k in tensors}
        found = vmap(run, in_dims=(dims,))(values)
        samples = [{k: many[k][i] if k in chosen else tensors[k] for k in tensors} for i in range(3)]
        expected = [torch.stack(parts) for parts in zip(*map(run, samples), strict=True)]
        torch.testing.assert_close(list(found), expected)


@every_op
@every_target
def test_vmap_over_another_dimension(op, target):
    run, tensors = pure(op, target)
    last = {k: torch.stack([v, 0.5 * v], -1) for k, v in tensors.items()}
    found = vmap(run, in_dims=({k: -1 for k in tensors},), out_dims=1)(last)
    expected = [
        torch.stack(parts, 1) for parts in zip(run(tensors), run({k: 0.5 * v for k, v in tensors.items()}), strict=True)
    ]
    torch.testing.assert_close(list(found), expected)


@every_op
@every_target
def test_gradients_of_every_sample(op, target):
    run, tensors = pure(op, target)
    many = {k: torch.stack([v, 0.5 * v, 0.9 * v + 0.01]) for k, v in tensors.items()}

    def loss(values):
        return sum(x.square().sum() for x in run(values))

    shared = {"A", "D", "delta_bias", "gates", "weight", "bias"} & set(tensors)
    for batched in (set(tensors), set(tensors) - shared):
        dims = {k: 0 if k in batched else None for k in tensors}
        values = {k: many[k] if k in batched else tensors[k] for k in tensors}
        found = vmap(grad(loss), in_dims=(dims,))(values)
        for index in range(3):
            one = {k: many[k][index] if k in batched else tensors[k] for k in tensors}
            expected = grad(loss)(one)
            for name in tensors:
                torch.testing.assert_close(found[name][index], expected[name])


@every_target
@pytest.mark.parametrize("op", ["selective_scan", "linear_scan", "gated_delta_rule", "ssd_scan", "causal_conv1d"])
def test_vmap_over_resets(op, target):
    run, tensors = pure(op, target)
    time = next(iter(tensors.values())).shape[1 if op == "ssd_scan" else -1]
    resets = torch.rand(3, 2, time, device=target.device) < 0.4

    def loss(values, reset):
        outputs = run({**values, "reset": reset})
        return sum(x.square().sum() for x in outputs), outputs

    many = {k: torch.stack([v, 0.5 * v, 0.9 * v]) for k, v in tensors.items()}
    found, outputs = vmap(grad(loss, has_aux=True))(many, resets)
    for index in range(3):
        expected, own = grad(loss, has_aux=True)({k: v[index] for k, v in many.items()}, resets[index])
        torch.testing.assert_close([v[index] for v in found.values()], [*expected.values()])
        torch.testing.assert_close([x[index] for x in outputs], list(own))


@every_target
def test_vmap_over_packed_sequences(target):
    run, tensors = pure("selective_scan", target)
    packed = {k: v[:1] if v.dim() == 3 else v for k, v in tensors.items()}
    packed["initial_state"] = tensors["initial_state"]
    bounds = torch.tensor([0, 1, 4], device=target.device)
    many = {k: torch.stack([v, 0.5 * v]) for k, v in packed.items()}
    found = vmap(lambda x: run({**x, "cu_seqlens": bounds}))(many)
    for index in range(2):
        own = run({k: v[index] for k, v in many.items()} | {"cu_seqlens": bounds})
        torch.testing.assert_close([x[index] for x in found], list(own))


@every_target
def test_vmap_over_constant_projections(target):
    run, tensors = pure("selective_scan", target)
    constant = {**tensors, "B": torch.randn(3, 2, dtype=torch.float64, device=target.device)}
    many = {k: torch.stack([v, 0.5 * v]) for k, v in constant.items()}
    found = vmap(grad(lambda x: sum(y.square().sum() for y in run(x))))(many)
    for index in range(2):
        expected = grad(lambda x: sum(y.square().sum() for y in run(x)))({k: v[index] for k, v in many.items()})
        torch.testing.assert_close([v[index] for v in found.values()], [*expected.values()])


@every_op
@every_target
def test_jacrev_is_the_jacobian(op, target):
    run, tensors = pure(op, target)
    name = next(iter(tensors))
    found = jacrev(lambda x: run({**tensors, name: x})[0])(tensors[name])
    expected = torch.autograd.functional.jacobian(lambda x: run({**tensors, name: x})[0], tensors[name])
    torch.testing.assert_close(found, expected)


@every_op
@every_target
def test_nested_vmap(op, target):
    run, tensors = pure(op, target)
    many = {k: torch.stack([torch.stack([v, 0.5 * v]), torch.stack([0.7 * v, 0.2 * v])]) for k, v in tensors.items()}
    found = vmap(vmap(run))(many)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close([x[i, j] for x in found], list(run({k: v[i, j] for k, v in many.items()})))


@every_op
@on_every_target("selective_scan", kernels_only=True)
def test_second_derivatives_raise_under_func(op, target):
    run, tensors = pure(op, target)
    name = next(iter(tensors))

    def loss(x):
        return run({**tensors, name: x})[0].square().sum()

    with pytest.raises(RuntimeError, match="the gradient of its gradient is not implemented"):
        grad(lambda x: grad(loss)(x).square().sum())(tensors[name])


@every_op
@on_every_target("selective_scan", kernels_only=True)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_raises(op, target):
    run, tensors = pure(op, target)
    name = next(iter(tensors))
    with pytest.raises(RuntimeError, match=r"jvp|forward"):
        jvp(lambda x: run({**tensors, name: x})[0], (tensors[name],), (torch.ones_like(tensors[name]),))


@on_every_target("selective_step")
def test_an_ensemble_of_parameters_over_a_rollout(target):
    run, tensors = pure("selective_step", target)
    members = {k: torch.stack([v, 0.5 * v]) for k, v in tensors.items() if k in ("A", "D", "delta_bias", "state")}

    def rollout(own):
        values, outputs = {**tensors, **own}, []
        for _ in range(3):
            out, values["state"] = run(values)
            outputs.append(out)
        return torch.stack(outputs)

    found = vmap(rollout)(members)
    for index in range(2):
        torch.testing.assert_close(found[index], rollout({k: v[index] for k, v in members.items()}))
