"""nn.ConvLSTM and ConvLSTMCell beyond the laws."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from backends import on_every_target
from torch import nn

from wmkernels.nn import ConvLSTM, ConvLSTMCell
from wmkernels.nn.convert import conv_lstm_from_cell_list, conv_lstm_from_keras, conv_lstm_from_openstl

every_target = on_every_target("conv_lstm")


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@every_target
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_on_one_position_it_is_the_lstm_of_pytorch(target, bidirectional, batch_first, bias):
    arguments = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "dtype": torch.float64}
    plain = nn.LSTM(3, 5, num_layers=2, **arguments, device=target.device)
    module = ConvLSTM(3, 5, 1, num_layers=2, **arguments, backend=target.backend, device=target.device)
    theirs = dict(plain.named_parameters())
    for name, parameter in module.named_parameters():
        if name.startswith("weight"):
            value = theirs[name]
        else:
            value = theirs[name.replace("bias", "bias_ih")] + theirs[name.replace("bias", "bias_hh")]
        parameter.data.copy_(value.detach().view(parameter.shape))
    x = random(4, 2, 3).to(target.device).requires_grad_()
    state = [random(4 if bidirectional else 2, 2 if batch_first is False else 4, 5).to(target.device) for _ in range(2)]
    state = [part.requires_grad_() for part in state]
    out, (h, c) = plain(x, tuple(state))
    found, (found_h, found_c) = module(x[..., None, None], tuple(part[..., None, None] for part in state))
    found = [part[..., 0, 0] for part in (found, found_h, found_c)]
    torch.testing.assert_close(found, [out, h, c], rtol=0, atol=1e-10)
    cotangents = [torch.randn_like(part) for part in (out, h, c)]
    expected = torch.autograd.grad((out, h, c), [x, *state, *plain.parameters()], cotangents)
    grads = torch.autograd.grad(found, [x, *state, *module.parameters()], cotangents)
    torch.testing.assert_close(grads[:3], expected[:3], rtol=0, atol=1e-10)
    named = dict(zip(theirs, expected[3:], strict=True))
    for (name, parameter), gradient in zip(module.named_parameters(), grads[3:], strict=True):
        value = named[name if name.startswith("weight") else name.replace("bias", "bias_ih")]
        torch.testing.assert_close(gradient, value.view(parameter.shape), rtol=0, atol=1e-10)


@every_target
def test_the_reverse_direction_is_the_forward_one_on_the_sequence_turned_round(target):
    module = ConvLSTM(2, 3, 3, bidirectional=True, backend=target.backend, device=target.device, dtype=torch.float64)
    forwards, backwards = (ConvLSTM(2, 3, 3, dtype=torch.float64).to(target.device) for _ in range(2))
    for one, suffix in ((forwards, "_l0"), (backwards, "_l0_reverse")):
        own = {name + "_l0": getattr(module, name + suffix) for name in ("weight_ih", "weight_hh", "bias")}
        one.load_state_dict(own)
    x = random(6, 2, 2, 4, 3).to(target.device)
    reset = torch.zeros(6, 2, dtype=torch.bool, device=target.device)
    reset[0, 0] = reset[2, 0] = reset[5, 1] = True
    out, (h, _) = module(x, reset=reset)
    torch.testing.assert_close(out[:, :, :3], forwards(x, reset=reset)[0])
    pieces = {0: [(0, 2), (2, 6)], 1: [(0, 5), (5, 6)]}
    for row, bounds in pieces.items():
        for start, end in bounds:
            expected = backwards(x[start:end, row : row + 1].flip(0))[0].flip(0)
            torch.testing.assert_close(out[start:end, row, 3:], expected[:, 0])
            if start == 0:
                torch.testing.assert_close(h[1, row], expected[0, 0])


@every_target
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_are_chained_and_only_the_first_has_a_stride(target, batch_first):
    options = {"stride": 2, "dilation": (1, 2), "padding": 1, "peephole": True}
    module = ConvLSTM(2, 3, 3, 2, batch_first=batch_first, **options, backend=target.backend, device=target.device)
    cells = [ConvLSTMCell(2, 3, 3, **options).to(target.device), ConvLSTMCell(3, 3, 3, peephole=True).to(target.device)]
    nn.init.normal_(module.peephole_l0)
    for number, cell in enumerate(cells):
        cell.load_state_dict({name: getattr(module, f"{name}_l{number}") for name in cell.state_dict()})
    x = random(4, 3, 2, 7, 8, dtype=torch.float32).to(target.device)
    out, (h, c) = module(x.transpose(0, 1) if batch_first else x)
    states, outputs = [None, None], []
    for frame in x:
        for number, cell in enumerate(cells):
            frame, states[number] = cell(frame, states[number])
        outputs.append(frame)
    expected = torch.stack(outputs, 1 if batch_first else 0)
    torch.testing.assert_close(out, expected)
    for found, number in ((h, 0), (c, 1)):
        torch.testing.assert_close(found, torch.stack([state[number] for state in states]))
    assert module.init_state(3, (7, 8))[0].shape == h.shape
    assert cells[0].init_state(3, (7, 8))[1].shape == c[0].shape


def test_dropout_lies_between_layers_while_training():
    torch.manual_seed(0)
    module = ConvLSTM(2, 3, 3, 2, dropout=0.5)
    x = random(3, 2, 2, 4, 4, dtype=torch.float32)
    one, two = module(x)[0], module(x)[0]
    assert not torch.equal(one, two)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    stepped, _ = module.train().step(x[0], None)
    assert not torch.equal(stepped, module.step(x[0], None)[0])
    whole = ConvLSTM(2, 3, 3, 2, dropout=1.0)
    with torch.no_grad():
        whole.bias_l1.normal_()
    # The first layer has no effect: interior positions are equal.
    assert torch.allclose(whole(x)[0][0, :, :, 0, 0], whole(2 * x)[0][0, :, :, 0, 0])


def test_initial_values():
    module = ConvLSTM(6, 8, (3, 5), 2, peephole=(4, 4), forget_bias=0.5)
    for layer, inputs in ((0, 6), (1, 8)):
        bound = ((inputs + 8) * 15) ** -0.5
        for name in ("weight_ih", "weight_hh"):
            weight = getattr(module, f"{name}_l{layer}")
            assert 0.9 * bound < weight.abs().max() <= bound
        bias = getattr(module, f"bias_l{layer}").view(4, 8)
        assert (bias[1] == 0.5).all() and (bias[[0, 2, 3]] == 0).all()
        assert getattr(module, f"peephole_l{layer}").shape == (3, 8, 4, 4)
        assert (getattr(module, f"peephole_l{layer}") == 0).all()
    # forget_bias only initializes.
    with torch.no_grad():
        module.bias_l0.zero_(), module.bias_l1.zero_()
        module.forget_bias = 7.0
        other = ConvLSTM(6, 8, (3, 5), 2, peephole=(4, 4), forget_bias=0.0)
        other.load_state_dict(module.state_dict())
        x = random(2, 1, 6, 4, 4, dtype=torch.float32)
        assert torch.equal(module(x)[0], other(x)[0])
        module.reset_parameters()
        assert (module.bias_l0[8:16] == 7).all()


def test_parameters_are_named_as_in_nn_lstm():
    names = {name for name, _ in nn.LSTM(2, 3, 2, bidirectional=True).named_parameters() if "bias_hh" not in name}
    found = {name for name, _ in ConvLSTM(2, 3, 3, 2, bidirectional=True).named_parameters()}
    assert found == {name.replace("bias_ih", "bias") for name in names}
    assert [name for name, _ in ConvLSTM(2, 3, 3, bias=False).named_parameters()] == ["weight_ih_l0", "weight_hh_l0"]
    assert [name for name, _ in ConvLSTMCell(2, 3, 3, peephole=True).named_parameters()] == [
        "weight_ih",
        "weight_hh",
        "bias",
        "peephole",
    ]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_and_a_reloaded_module_compute_the_same(copied):
    for module in (ConvLSTM(2, 3, 3, 2, peephole=(4, 5)), ConvLSTMCell(2, 3, 3, padding="valid", stride=2)):
        x = random(3, 2, 4, 5, dtype=torch.float32)
        run = module.step if isinstance(module, ConvLSTM) else module
        expected, _ = run(x, None)
        twin = copied(module)
        assert torch.equal((twin.step if isinstance(module, ConvLSTM) else twin)(x, None)[0], expected)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        module.reset_parameters()
        assert not torch.equal(run(x, None)[0], expected)
        module.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(run(x, None)[0], expected)


@every_target
def test_it_learns_and_runs_under_autocast(target):
    module = ConvLSTM(1, 4, 3, 2, backend=target.backend, device=target.device)
    x = random(5, 2, 1, 6, 6, dtype=torch.float32).to(target.device)
    with torch.autocast(target.device, torch.bfloat16):
        out, (h, c) = module(x)
        again, _ = module(x, (h, c))
        stepped, _ = module.step(x[0], (h, c))
    assert out.dtype == again.dtype == stepped.dtype == h.dtype == torch.bfloat16
    assert c.dtype == torch.float32
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in module.parameters())


def test_repr_says_what_differs():
    assert "num_layers=2, peephole=(4, 5), stride=(2, 2)" in repr(ConvLSTM(1, 2, 3, 2, peephole=(4, 5), stride=2))
    assert repr(ConvLSTMCell(1, 2, (3, 1), bias=False)) == "ConvLSTMCell(1, 2, kernel_size=(3, 1), bias=False)"


MODULE_ERRORS = {
    "even kernel": (lambda: ConvLSTM(1, 2, 4), ValueError, "kernel_size is 4, expected odd sizes"),
    "no channels": (lambda: ConvLSTM(0, 2, 3), ValueError, "input_size is 0, expected a whole number, at least 1"),
    "no layers": (lambda: ConvLSTM(1, 2, 3, 0), ValueError, "num_layers is 0"),
    "dropout": (lambda: ConvLSTM(1, 2, 3, 2, dropout=1.5), ValueError, "dropout is 1.5, expected a share from 0 to 1"),
    "dropout of one layer": (lambda: ConvLSTM(1, 2, 3, dropout=0.5), ValueError, "dropout lies between layers"),
    "padding": (lambda: ConvLSTM(1, 2, 3, padding="half"), ValueError, "padding is 'half', expected 'same', 'valid'"),
    "stride": (lambda: ConvLSTM(1, 2, 3, stride=0), ValueError, "stride is 0, expected at least 1"),
    "a step both ways": (
        lambda: ConvLSTM(1, 2, 3, bidirectional=True).step(torch.zeros(1, 1, 4, 4), None),
        RuntimeError,
        "step() of a bidirectional module",
    ),
    "one frame": (
        lambda: ConvLSTM(1, 2, 3)(torch.zeros(1, 1, 4, 4)),
        ValueError,
        "expected (time, batch, channels=1, height, width); step() takes one step of time",
    ),
    "channels": (
        lambda: ConvLSTM(1, 2, 3, batch_first=True)(torch.zeros(2, 1, 3, 4, 4)),
        ValueError,
        "inputs has shape (2, 1, 3, 4, 4), expected (batch, time, channels=1, height, width)",
    ),
    "a state of another map": (
        lambda: (m := ConvLSTM(1, 2, 3)).step(torch.zeros(1, 1, 4, 4), m.init_state(1, (4, 5))),
        ValueError,
        "the state's h has shape (1, 1, 2, 4, 5), expected (1, 1, 2, 4, 4)",
    ),
    "a state of one layer": (
        lambda: ConvLSTM(1, 2, 3, 2).step(torch.zeros(1, 1, 4, 4), ConvLSTM(1, 2, 3).init_state(1, (4, 4))),
        ValueError,
        "the state's h has shape (1, 1, 2, 4, 4), expected (2, 1, 2, 4, 4)",
    ),
    "a state of one tensor": (
        lambda: ConvLSTMCell(1, 2, 3)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4)),
        TypeError,
        "state is a Tensor, expected a pair (h, c)",
    ),
    "a peephole of another map": (
        lambda: ConvLSTM(1, 2, 3, peephole=(4, 5)).init_state(1, (4, 6)),
        ValueError,
        "a map of (4, 6) makes states of (4, 6), expected (4, 5) to match peephole",
    ),
}


@pytest.mark.parametrize("case", list(MODULE_ERRORS))
def test_bad_input(case):
    call, error, message = MODULE_ERRORS[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith("ConvLSTM")
    assert message in str(caught.value)


class CopiedCell(nn.Module):
    """The common cell: one convolution of x and h, gates i, f, o, g."""

    def __init__(self, inputs, hidden, kernel, bias):
        super().__init__()
        self.conv = nn.Conv2d(inputs + hidden, 4 * hidden, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x, h, c):
        i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class OpenSTLCell(nn.Module):
    """OpenSTL: two convolutions, gates i, f, g, o; two more are unused."""

    def __init__(self, inputs, hidden, kernel, size=None):
        super().__init__()

        def part(channels_in, channels_out):
            layers = [nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)]
            return nn.Sequential(*layers, *([nn.LayerNorm([channels_out, *size])] if size else []))

        self.conv_x, self.conv_h = part(inputs, 4 * hidden), part(hidden, 4 * hidden)
        self.conv_o, self.conv_last = part(2 * hidden, hidden), nn.Conv2d(2 * hidden, hidden, 1, bias=False)

    def forward(self, x, h, c):
        i, f, g, o = (self.conv_x(x) + self.conv_h(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class CellList(nn.Module):
    def __init__(self, cells):
        super().__init__()
        self.cell_list = nn.ModuleList(cells)
        self.conv_last = nn.Conv2d(1, 1, 1)

    def forward(self, x, hidden):
        for cell in self.cell_list:
            h = c = x.new_zeros(x.shape[1], hidden, *x.shape[3:])
            outputs = []
            for frame in x:
                h, c = cell(frame, h, c)
                outputs.append(h)
            x = torch.stack(outputs)
        return x, h, c


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_weights_of_the_usual_copy(bias, prefix):
    other = CellList([CopiedCell(2, 3, 3, bias), CopiedCell(3, 3, 3, bias)]).double()
    weights = {prefix + name: value for name, value in other.state_dict().items()}
    module = ConvLSTM(2, 3, 3, 2, bias=bias, dtype=torch.float64)
    module.load_state_dict(conv_lstm_from_cell_list(weights))
    x = random(4, 2, 2, 5, 6)
    out, (h, c) = module(x)
    torch.testing.assert_close([out, h[-1], c[-1]], list(other(x, 3)))


def test_weights_of_openstl():
    other = CellList([OpenSTLCell(2, 3, 5), OpenSTLCell(3, 3, 5)]).double()
    module = ConvLSTM(2, 3, 5, 2, bias=False, dtype=torch.float64)
    module.load_state_dict(conv_lstm_from_openstl(other.state_dict()))
    x = random(4, 2, 2, 5, 6)
    out, (h, c) = module(x)
    torch.testing.assert_close([out, h[-1], c[-1]], list(other(x, 3)))


def keras_cell(x, kernel, recurrent, bias, stride, dilation):
    """ConvLSTM2D, padding "same": (time, batch, height, width, channels)."""
    filters = recurrent.shape[2]

    def convolve(maps, weight, stride, dilation):
        pads = []
        for size, width in ((maps.shape[2], weight.shape[1]), (maps.shape[1], weight.shape[0])):
            total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        padded = F.pad(maps.permute(0, 3, 1, 2), pads)
        return F.conv2d(padded, weight.permute(3, 2, 0, 1), stride=stride, dilation=dilation).permute(0, 2, 3, 1)

    h = c = None
    outputs = []
    for frame in x:
        parts = []
        for number in range(4):
            gate = slice(number * filters, (number + 1) * filters)
            part = convolve(frame, kernel[..., gate], stride, dilation) + bias[gate]
            parts.append(part if h is None else part + convolve(h, recurrent[..., gate], 1, 1))
        i, f, o = (parts[number].sigmoid() for number in (0, 1, 3))
        c = i * parts[2].tanh() + (0 if c is None else f * c)
        h = o * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_keras(stride, dilation, bias):
    kernel, recurrent, b = random(3, 3, 2, 12) * 0.4, random(3, 3, 3, 12) * 0.4, random(12) * bias
    module = ConvLSTM(2, 3, 3, bias=bias, stride=stride, dilation=dilation, dtype=torch.float64)
    arrays = [x.numpy() for x in (kernel, recurrent, b)][: 3 if bias else 2]
    module.load_state_dict(conv_lstm_from_keras(arrays, recurrent_activation="sigmoid"))
    x = random(4, 2, 6, 5, 2)
    out, (h, c) = module(x.permute(0, 1, 4, 2, 3))
    found = [out.permute(0, 1, 3, 4, 2), h[0].permute(0, 2, 3, 1), c[0].permute(0, 2, 3, 1)]
    torch.testing.assert_close(found, list(keras_cell(x, kernel, recurrent, b, stride, dilation)))


CONVERSION_ERRORS = {
    "LayerNorm": (lambda: conv_lstm_from_openstl(CellList([OpenSTLCell(1, 2, 3, (4, 4))]).state_dict()), "LayerNorm"),
    "hard sigmoid": (
        lambda: conv_lstm_from_keras([], recurrent_activation="hard_sigmoid"),
        "recurrent_activation is 'hard_sigmoid', expected 'sigmoid'",
    ),
    "one array": (
        lambda: conv_lstm_from_keras([torch.zeros(1)], recurrent_activation="sigmoid"),
        "weights holds 1 arrays, expected kernel, recurrent_kernel",
    ),
    "kernels that do not fit": (
        lambda: conv_lstm_from_keras(
            [torch.zeros(3, 3, 1, 8), torch.zeros(3, 3, 2, 4)], recurrent_activation="sigmoid"
        ),
        "kernel has shape (3, 3, 1, 8) and recurrent_kernel (3, 3, 2, 4)",
    ),
    "a recurrent kernel of other channels": (
        lambda: conv_lstm_from_keras(
            [torch.zeros(3, 3, 1, 8), torch.zeros(3, 3, 3, 8)], recurrent_activation="sigmoid"
        ),
        "recurrent_kernel has shape (8, 3, 3, 3) as (out, in, height, width), expected 4 * hidden out and hidden in",
    ),
    "another module": (lambda: conv_lstm_from_cell_list(nn.LSTM(1, 1).state_dict()), "expected cell_list.0"),
    "another cell": (
        lambda: conv_lstm_from_cell_list(CellList([OpenSTLCell(1, 2, 3)]).state_dict()),
        "state_dict has cell_list.0.conv_x.0.weight, expected only conv.weight, conv.bias in a cell",
    ),
    "a copy for OpenSTL": (
        lambda: conv_lstm_from_openstl(CellList([CopiedCell(1, 2, 3, True)]).state_dict()),
        "state_dict has cell_list.0.conv.weight, expected only conv_x.0.weight",
    ),
    "no hidden convolution": (
        lambda: conv_lstm_from_openstl({"cell_list.0.conv_x.0.weight": torch.zeros(4, 1, 3, 3)}),
        "state_dict has no cell_list.0.conv_h.0.weight",
    ),
    "no channels of x": (
        lambda: conv_lstm_from_cell_list({"cell_list.0.conv.weight": torch.zeros(8, 2, 3, 3)}),
        "layer 0's conv.weight has shape (8, 2, 3, 3) as (out, in, height, width), expected 4 * hidden out and input",
    ),
    "other hidden sizes": (
        lambda: conv_lstm_from_cell_list(CellList([CopiedCell(1, 2, 3, True), CopiedCell(2, 3, 3, True)]).state_dict()),
        "the layers have the hidden sizes [2, 3], expected the same in all",
    ),
    "other kernels": (
        lambda: conv_lstm_from_cell_list(CellList([CopiedCell(1, 2, 3, True), CopiedCell(2, 2, 5, True)]).state_dict()),
        "the layers have the kernels [(3, 3), (5, 5)], expected the same in all",
    ),
}


@pytest.mark.parametrize("case", list(CONVERSION_ERRORS))
def test_weights_that_cannot_be_converted(case):
    call, message = CONVERSION_ERRORS[case]
    with pytest.raises(ValueError, match=r"^conv_lstm_from_") as caught:
        call()
    assert message in str(caught.value)
