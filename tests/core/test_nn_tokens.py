"""Memories over token grids and blocks of time, beyond the laws."""

import copy

import pytest
import torch
import torch.nn.functional as F
from recurrences_nn import random_state, resets
from tolerances import GRADCHECK
from torch.nn.attention import SDPBackend, sdpa_kernel

from wmkernels.nn import BlockScan, CausalConv1d, LocalAttention, Mamba, MemoryAttention
from wmkernels.nn.rotary import axial_angles, rotate

MODULES = {
    "BlockScan": (lambda: BlockScan(Mamba(4, 2, d_conv=2), (2, 1), (3, 1)), (3, 4)),
    "LocalAttention": (lambda: LocalAttention(4, 3, 2, (1, 2)), (2, 4)),
    "MemoryAttention": (lambda: MemoryAttention(4, 2, 3, 1), (4,)),
}
every_module = pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)


def attention_over_all(module, inputs):
    """Every token against every token, with a mask of its frames."""
    batch, time, tokens, width = inputs.shape
    rows, columns = module.grid
    frame = torch.arange(time).repeat_interleave(tokens)
    place = torch.arange(tokens).repeat(time)
    pairs = width // module.heads // 2
    positions = [frame * module.time_positions, place // columns, place % columns]
    angles = axial_angles(positions, (module.frames, rows, columns), pairs)
    q, k, v = module.in_proj(inputs).flatten(1, 2).chunk(3, -1)
    q, k, v = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (rotate(q, angles), rotate(k, angles), v))
    lag = frame[:, None] - frame
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=(lag >= 0) & (lag < module.frames))
    return module.out_proj(y.transpose(1, 2).reshape(batch, time, tokens, width))


@pytest.mark.parametrize(
    ("frames", "grid", "positions"),
    [
        *((2, (3, 2), True), (1, (2, 2), True), (7, (1, 1), True), (40, (1, 1), True), (9, (2, 1), True)),
        *((7, (1, 1), False), (9, (2, 1), False)),
    ],
)
def test_local_attention_is_masked_attention_over_all_tokens(frames, grid, positions):
    module = LocalAttention(8, frames, 2, grid, time_positions=positions).double()
    inputs = torch.randn(2, 75, module.tokens, 8, dtype=torch.float64)
    expected = attention_over_all(module, inputs)
    torch.testing.assert_close(module(inputs)[0], expected)
    none = torch.zeros(2, 75, dtype=torch.bool)
    torch.testing.assert_close(module(inputs, None, none)[0], expected)
    reset = none.clone()
    reset[0, 31] = reset[0, 32] = True
    expected[0] = torch.cat([attention_over_all(module, x[None])[0] for x in inputs[0].split([31, 1, 43])])
    torch.testing.assert_close(module(inputs, None, reset)[0], expected)


@pytest.mark.parametrize("positions", [True, False])
def test_the_order_of_past_frames_counts_with_positions_alone(positions):
    module = LocalAttention(8, 6, 2, (1, 2), time_positions=positions).double()
    inputs = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    last = module(inputs)[0][:, -1]
    shuffled = module(inputs[:, [3, 1, 4, 0, 2, 5]])[0][:, -1]
    assert torch.allclose(last, shuffled, rtol=1e-12) is not positions


def test_local_attention_computes_few_scores_outside_its_window(monkeypatch):
    real, scores = F.scaled_dot_product_attention, []

    def counted(q, k, v, **options):
        scores.append(q.shape[0] * q.shape[-2] * k.shape[-2])
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for frames, grid, time in ((2, (5, 5), 64), (64, (1, 1), 512)):
        module = LocalAttention(8, frames, 2, grid)
        module(torch.randn(1, time, module.tokens, 8))
        needed = time * module.tokens * min(frames, time) * module.tokens
        found = scores.pop()
        assert needed <= found <= 1.6 * needed
        module(torch.randn(1, time, module.tokens, 8), None, torch.arange(time)[None] == time // 3)
        assert needed <= scores.pop() <= 1.2 * found


def test_local_attention_sees_where_and_when():
    module = LocalAttention(8, 2, 2, (2, 2))
    frame = torch.randn(1, 1, 4, 8)
    outputs, _ = module(frame.expand(1, 2, 4, 8))
    moved, _ = module(frame.flip(2).expand(1, 2, 4, 8))
    assert not torch.allclose(moved.flip(2), outputs, atol=1e-3)
    assert not torch.allclose(outputs[:, 0], outputs[:, 1], atol=1e-4)


@pytest.mark.parametrize(("block", "grid"), [(2, (3, 5)), ((1, 3), (2, 3)), (1, (2, 2)), (4, (3, 3))])
def test_a_block_scan_is_its_memory_along_each_block(block, grid):
    memory = Mamba(4, 2, d_conv=2).double()
    module = BlockScan(memory, block, grid)
    height, width = module.block
    inputs, reset = torch.randn(2, 3, *grid, 4, dtype=torch.float64), torch.tensor([[0, 0, 1], [1, 0, 0]]).bool()
    elapsed = torch.rand(2, 3, dtype=torch.float64) * 3
    outputs, state = module(inputs.flatten(2, 3), None, reset, elapsed=elapsed)
    for i in range(module.blocks[0]):
        for j in range(module.blocks[1]):
            own = inputs.new_zeros(2, 3, height, width, 4)
            found = inputs[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width]
            down, across = found.shape[2:4]
            own[:, :, :down, :across] = found
            first = torch.zeros(2, 3, height * width, dtype=torch.bool)
            first[:, :, 0] = reset
            times = torch.ones(2, 3, height * width, dtype=torch.float64)
            times[:, :, 0] = elapsed
            expected, after = memory(own.flatten(1, 3), None, first.flatten(1), elapsed=times.flatten(1))
            expected = expected.view(own.shape)[:, :, :down, :across]
            actual = outputs.view(inputs.shape)[:, :, i * height : i * height + down, j * width : j * width + across]
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(state["scan"][:, i * module.blocks[1] + j], after["scan"])


def memory_attention_by_steps(module, inputs):
    """Blocks in turn, queries in turn."""
    size, heads = module.block, module.heads
    angles = axial_angles([torch.arange(size)], [size], module.d_model // heads // 2)

    def attend(query, keys, values):
        weights = (torch.einsum("hd,nhd->hn", query, keys) / query.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("hn,nhd->hd", weights, values).flatten()

    outputs = []
    for sequence in inputs:
        memory = module.memory
        for block in sequence.split(size):
            x = module.norm(memory + module.feed_forward(memory))
            mq, mk, mv = (y.unflatten(-1, (heads, -1)) for y in module.memory_in_proj(x).chunk(3, -1))
            q, k, v = module.in_proj(block).chunk(3, -1)
            q, k = (rotate(y, angles[: len(block)]).unflatten(-1, (heads, -1)) for y in (q, k))
            v = v.unflatten(-1, (heads, -1))
            for t in range(len(block)):
                seen = torch.cat([mk, k[: t + 1]]), torch.cat([mv, v[: t + 1]])
                outputs.append(module.out_proj(attend(q[t], *seen)))
            every = torch.cat([mk, k]), torch.cat([mv, v])
            read = module.memory_out_proj(torch.stack([attend(query, *every) for query in mq]))
            gate = module.gate(torch.cat([x, read], -1)).sigmoid()
            memory = memory + gate * (read.tanh() - memory)
    return torch.stack(outputs).view(inputs.shape)


def test_memory_attention_is_the_blockwise_recurrence():
    module = MemoryAttention(8, tokens=3, block=4, heads=2).double()
    inputs = torch.randn(2, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(module(inputs)[0], memory_attention_by_steps(module, inputs))


def test_memory_attention_remembers_beyond_its_block():
    module = MemoryAttention(8, tokens=3, block=4, heads=2)
    inputs = torch.randn(1, 13, 8, requires_grad=True)
    gradient = torch.autograd.grad(module(inputs)[0][:, -1].sum(), inputs)[0]
    assert (gradient.abs().amax(-1) > 0).all()


@every_module
def test_gradcheck_through_state_and_resets(make, shape):
    torch.manual_seed(0)
    module = make().double()
    names = [name for name, _ in module.named_parameters()]
    state = random_state(module, 2)
    counts = {name: torch.ones_like(state.pop(name)) for name in ("seen", "filled") if name in state}

    def run(inputs, *leaves):
        own = {**dict(zip(state, leaves, strict=False)), **counts}
        weights = dict(zip(names, leaves[len(state) :], strict=True))
        outputs, last = torch.func.functional_call(module, weights, (inputs, own, resets(2, 5)))
        return outputs, *(last[name] for name in state)

    inputs = torch.randn(2, 5, *shape, dtype=torch.float64)
    leaves = [inputs, *state.values(), *(p.detach() for p in module.parameters())]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in leaves], fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("name", ["LocalAttention", "MemoryAttention"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_forward_mode_and_second_derivatives_by_the_unfused_attention(name):
    make, shape = MODULES[name]
    module = make().double()
    inputs, direction = torch.randn(2, 3, *shape).double(), torch.randn(2, 3, *shape).double()

    def loss(x):
        return module(x)[0].square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.func.jvp(loss, (inputs,), (direction,))[1]
        leaf = inputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    torch.testing.assert_close(slope, (gradient * direction).sum())
    assert second.abs().max() > 0


@every_module
def test_autocast_and_16_bit_modules_keep_the_state_in_float32(make, shape):
    torch.manual_seed(0)
    module, inputs = make(), torch.randn(2, 5, *shape)
    exact, _ = module(inputs, None, resets(2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = module(inputs, None, resets(2, 5))
    assert outputs.dtype == torch.bfloat16
    outputs.float().square().mean().backward()
    narrow, last = copy.deepcopy(module).bfloat16()(inputs.bfloat16(), None, resets(2, 5))
    for found in (outputs, narrow):
        torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    kinds = {name: value.dtype for name, value in module.init_state(1).items()}
    assert {name: value.dtype for name, value in state.items()} == kinds
    assert {name: value.dtype for name, value in last.items()} == kinds
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in module.parameters())


@every_module
@pytest.mark.parametrize("batch", [0, 2])
def test_no_sequence_and_no_step_are_no_error(make, shape, batch):
    module, time = make(), 0 if batch else 4
    reset = torch.zeros(batch, time, dtype=torch.bool)
    outputs, state = module(torch.zeros(batch, time, *shape), None, reset)
    assert outputs.shape == (batch, time, *shape)
    assert {name: x.shape for name, x in state.items()} == {
        name: x.shape for name, x in module.init_state(batch).items()
    }
    if not batch:
        output, _ = module.step(torch.zeros(batch, *shape), state, reset[:, 0])
        assert output.shape == (batch, *shape)


@every_module
def test_a_state_is_never_changed_and_holds_no_more_than_itself(make, shape):
    module = make()
    state = random_state(module, 2)
    before, inputs = copy.deepcopy(state), torch.randn(2, 9, *shape)
    with torch.no_grad():
        results = [module(inputs, state), module.step(inputs[:, 0], state), module(inputs, state, resets(2, 9))]
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    for _, after in results:
        for value in after.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@every_module
def test_seeds_devices_and_dtypes(make, shape):
    torch.manual_seed(1)
    module = make()
    with torch.device("meta"):
        assert {p.device.type for p in make().parameters()} == {"meta"}
    torch.manual_seed(1)
    for name, value in make().state_dict().items():
        assert torch.equal(value, module.state_dict()[name])
    inputs = torch.randn(2, *shape)
    torch.testing.assert_close(module.step(inputs, None), module.step(inputs, module.init_state(2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LocalAttention(6, 2, 2), r"heads is 2 and d_model 6, expected a multiple of 2 \* heads"),
        (lambda: LocalAttention(8, 2, 2, (2, 0)), "grid is 0, expected 1 to"),
        (lambda: LocalAttention(8, 2, 2, 4), "grid is 4, expected two whole numbers"),
        (lambda: LocalAttention(8, 2, 2, time_positions=0), "time_positions is 0, expected True or False"),
        (lambda: LocalAttention(8, 2, 2, (2, 2))(torch.ones(1, 3, 5, 8)), "expected 4 tokens before the features"),
        (lambda: MemoryAttention(8)(torch.ones(1, 8)), r"expected \(batch, time, d_model=8\); step\(\) takes one"),
        (lambda: BlockScan(torch.nn.Linear(2, 2), 2, (2, 2)), "memory is a Linear without init_state"),
        (lambda: BlockScan(CausalConv1d(2), 2, (2, 2))(torch.ones(1, 3, 3, 2)), "expected 4 tokens before"),
        (
            lambda: BlockScan(CausalConv1d(2), 2, (2, 3))(torch.ones(1, 3, 6, 2), CausalConv1d(2).init_state(2)),
            r"state\['window'\] has shape \(2, 3, 2\), expected \(batch=1, blocks=2, ...\)",
        ),
        (
            lambda: BlockScan(CausalConv1d(2), 2, (2, 3))(torch.ones(1, 3, 6, 2), {"window": [1.0] * 99}),
            r"state is a dict, expected tensors \(1, 2, ...\)",
        ),
        (
            lambda: BlockScan(LocalAttention(8, 2, 2, (2, 2)), 2, (2, 2)),
            "memory is a LocalAttention, which takes token grids; expected one over single vectors",
        ),
        (
            lambda: BlockScan(CausalConv1d(2), 2, (2, 3))(torch.tensor(1.0)),
            r"inputs has shape \(\), expected \(batch, time, tokens, features\)$",
        ),
        (lambda: LocalAttention(8, 2, 2)(torch.ones(1, 3, 1, 8).long()), "expected float32 or .* or float16$"),
        (
            lambda: BlockScan(CausalConv1d(2), 2, (2, 2))(torch.ones(1, 3, 4, 2), elapsed=torch.ones(1, 2)),
            r"elapsed has shape \(1, 2\), expected \(batch=1, time=3\)",
        ),
    ],
)
def test_an_error_says_what_was_expected(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("state", [{"window": torch.zeros(1, 1, 3, 2)}, {"window": torch.zeros(2)}])
def test_a_block_scans_state_of_another_batch_is_a_value_error(state):
    with pytest.raises(ValueError, match=r"BlockScan: state\['window'\] has shape"):
        BlockScan(CausalConv1d(2), 2, (2, 3))(torch.ones(1, 3, 6, 2), state)
