"""Checks of ConvLSTM arguments."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    MAX_SIZE,
    has_shape,
    is_autocast,
    promote_dtypes,
    require_device,
    require_dtype,
    require_float,
    require_reset,
    require_shape,
    require_tensor,
    shown,
    state_dtype,
)
from wmkernels.conv_lstm.meta import ConvLSTMInputs, output_size

Pair = int | Sequence[int]
Padding = Literal["same", "valid"] | Pair


def canonical(
    op: str,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    peephole: Tensor | None,
    reset: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    leading: tuple[str, ...],
) -> ConvLSTMInputs:
    """Canonical inputs; ``leading`` names the dimensions of x before channels."""
    require_dtype(op, "x", x, FLOATS, "")
    require_dtype(op, "weight_ih", weight_ih, FLOATS, "")
    require_dtype(op, "weight_hh", weight_hh, FLOATS, "")
    x, weight_ih, weight_hh = _under_autocast(x, weight_ih, weight_hh)
    _check_maps(op, x, weight_ih, weight_hh, leading)
    weight_ih, weight_hh = weight_ih.to(x.dtype), weight_hh.to(x.dtype)
    hidden = weight_hh.shape[1]
    strides, dilations = pair(op, "stride", stride), pair(op, "dilation", dilation)
    pads = paddings(op, padding, x.shape[-2:], weight_ih.shape[-2:], strides, dilations)
    size = output_size(x.shape[-2:], weight_ih.shape[-2:], strides, pads, dilations)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"{op}: x has height and width {tuple(x.shape[-2:])}, of which the input convolution, with a kernel of "
            f"{tuple(weight_ih.shape[-2:])}, stride={stride}, padding={padding!r} and dilation={dilation}, leaves a "
            f"map of {size}, expected at least (1, 1)"
        )
    height, width = (x.shape[i - 2] + pads[2 * i] + pads[2 * i + 1] for i in range(2))
    if height * width > MAX_SIZE:
        raise ValueError(
            f"{op}: padding={padding!r} with dilation={dilation!r} makes a map of {(height, width)}, expected at most "
            f"{MAX_SIZE} positions"
        )
    parameter = state_dtype(x.dtype)
    if bias is not None:
        _check_parameter(op, "bias", bias, x)
        require_shape(op, "bias", bias, ("4 * hidden",), (4 * hidden,), "weight_hh")
        bias = bias.to(parameter)
    if peephole is not None:
        _check_parameter(op, "peephole", peephole, x)
        _check_peephole(op, peephole, hidden, size)
        peephole = peephole.to(parameter)
    batch = x.shape[leading.index("batch")]
    h, c = _states(op, state, x, (batch, hidden, *size))
    _check_reset(op, reset, x, leading)
    if leading == ("batch", "time"):
        x = x.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    elif leading == ("batch",):
        x = x.unsqueeze(0)
        reset = None if reset is None else reset.unsqueeze(0)
    return ConvLSTMInputs(x, weight_ih, weight_hh, bias, peephole, h, c, reset, strides, pads, dilations)


def _under_autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """Casts to autocast's dtype, except float64."""
    device = tensors[0].device
    if not is_autocast(device):
        return tensors
    wide = promote_dtypes([x.dtype for x in tensors])
    dtype = wide if wide == torch.float64 else torch.get_autocast_dtype(device.type)
    return [x.to(dtype) for x in tensors]


def _check_maps(op: str, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, leading: tuple[str, ...]) -> None:
    wanted = ", ".join((*leading, "channels", "height", "width"))
    if x.dim() != len(leading) + 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected ({wanted})")
    for name, weight in (("weight_ih", weight_ih), ("weight_hh", weight_hh)):
        require_float(op, name, weight, x, "x")
        if weight.dim() != 4 or min(weight.shape) < 1:
            second = "input" if name == "weight_ih" else "hidden"
            raise ValueError(
                f"{op}: {name} has shape {tuple(weight.shape)}, expected (4 * hidden, {second}, height, width)"
            )
    hidden = weight_hh.shape[1]
    if weight_hh.shape[0] != 4 * hidden:
        raise ValueError(
            f"{op}: weight_hh has shape {tuple(weight_hh.shape)}, expected (4 * hidden={4 * hidden}, hidden={hidden}, "
            "height, width), the gates i, f, g, o one after another"
        )
    if weight_hh.shape[2] % 2 == 0 or weight_hh.shape[3] % 2 == 0:
        raise ValueError(
            f"{op}: weight_hh has a kernel of {tuple(weight_hh.shape[2:])}, expected odd sizes: the map of h keeps its "
            "size, so its kernel needs a middle"
        )
    if weight_ih.shape[0] != 4 * hidden:
        raise ValueError(
            f"{op}: weight_ih has shape {tuple(weight_ih.shape)}, expected (4 * hidden={4 * hidden}, input, height, "
            "width) to match weight_hh"
        )
    if x.shape[-3] != weight_ih.shape[1]:
        last = x.shape[-1] == weight_ih.shape[1]
        hint = "; its channels seem to come last, move them before height and width" if last else ""
        raise ValueError(
            f"{op}: x has {x.shape[-3]} channels (shape {tuple(x.shape)}, read as ({wanted})), expected "
            f"{weight_ih.shape[1]} to match weight_ih{hint}"
        )


def _check_parameter(op: str, name: str, parameter: Tensor, x: Tensor) -> None:
    if is_autocast(x.device):  # x was cast
        require_dtype(op, name, parameter, FLOATS, "")
        require_device(op, name, parameter, x.device, "x")
    else:
        require_float(op, name, parameter, x, "x")


def _check_peephole(op: str, peephole: Tensor, hidden: int, size: tuple[int, int]) -> None:
    if not has_shape(peephole, (3, hidden)) and not has_shape(peephole, (3, hidden, *size)):
        raise ValueError(
            f"{op}: peephole has shape {tuple(peephole.shape)}, expected (3, hidden={hidden}) or (3, hidden={hidden}, "
            f"height={size[0]}, width={size[1]}): the weights of i, f and o, which c reaches"
        )


def _states(
    op: str, state: tuple[Tensor, Tensor] | None, x: Tensor, shape: tuple[int, int, int, int]
) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        held = f"{len(state)} values" if isinstance(state, tuple | list) else f"a {type(state).__name__}"
        raise TypeError(f"{op}: state is {held}, expected a pair (h, c)")
    for name, value in zip(("h", "c"), state, strict=True):
        require_tensor(op, f"the state's {name}", value)
        _check_parameter(op, f"the state's {name}", value, x)
        require_shape(
            op, f"the state's {name}", value, ("batch", "hidden", "height", "width"), shape, "x and the weights"
        )
    return state[0].to(x.dtype), state[1].to(state_dtype(x.dtype))


def _check_reset(op: str, reset: Tensor | None, x: Tensor, leading: tuple[str, ...]) -> None:
    sizes = tuple(x.shape[: len(leading)])
    if isinstance(reset, Tensor) and has_shape(reset, sizes[::-1]) and not has_shape(reset, sizes):
        expected = ", ".join(f"{label}={size}" for label, size in zip(leading, sizes, strict=True))
        other = leading != ("batch", "time")
        raise ValueError(
            f"{op}: reset has shape {tuple(reset.shape)}, expected ({expected}) to match x: batch and time are "
            f"swapped; batch_first={other} takes x and reset in this order"
        )
    require_reset(op, reset, leading, sizes, x, "x")


def pair(op: str, name: str, value: Any) -> tuple[int, int]:
    """(vertical, horizontal), checked."""
    sizes = (value, value) if isinstance(value, int) else value
    whole = isinstance(sizes, Sequence) and len(sizes) == 2 and all(isinstance(size, int) for size in sizes)
    if not whole or any(isinstance(size, bool) for size in sizes):
        raise TypeError(f"{op}: {name} is {shown(value)}, expected a whole number or a pair of them")
    lowest = 0 if name == "padding" else 1
    if min(sizes) < lowest or max(sizes) > MAX_SIZE:
        raise ValueError(f"{op}: {name} is {value!r}, expected at least {lowest}, at most {MAX_SIZE}")
    return sizes[0], sizes[1]


def paddings(
    op: str,
    padding: Padding,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right); "same" adds odd padding below and right."""
    if isinstance(padding, str) and padding == "valid":
        return 0, 0, 0, 0
    if isinstance(padding, str) and padding == "same":
        pads: list[int] = []
        for axis in range(2):
            reach = (-(-size[axis] // stride[axis]) - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1
            total = max(reach - size[axis], 0)
            pads += [total // 2, total - total // 2]
        return pads[0], pads[1], pads[2], pads[3]
    if isinstance(padding, str):
        raise ValueError(f"{op}: padding is {padding!r}, expected 'same', 'valid', a whole number or a pair of them")
    vertical, horizontal = pair(op, "padding", padding)
    return vertical, vertical, horizontal, horizontal
