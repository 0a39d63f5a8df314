"""Random calls of conv_lstm, and small fixed ones."""

from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from problems import DTYPES, LAYOUTS, Problem, Results, laid_out
from torch import Tensor

import wmkernels
from wmkernels.checks import state_dtype
from wmkernels.conv_lstm import reference
from wmkernels.conv_lstm.meta import output_size
from wmkernels.conv_lstm.validation import paddings


def conv_lstm(x: Tensor, h: Tensor | None = None, c: Tensor | None = None, **arguments: Any) -> tuple[Tensor, ...]:
    """``wmkernels.conv_lstm`` with flat state: (outputs, h, c)."""
    state = None if h is None or c is None else (h, c)
    outputs, (h, c) = wmkernels.conv_lstm(x, state=state, **arguments)
    return outputs, h, c


def conv_lstm_step(x: Tensor, h: Tensor | None = None, c: Tensor | None = None, **arguments: Any) -> tuple[Tensor, ...]:
    """``wmkernels.conv_lstm_step`` with flat state: (output, h, c)."""
    state = None if h is None or c is None else (h, c)
    output, (h, c) = wmkernels.conv_lstm_step(x, state, **arguments)
    return output, h, c


class RoundedSums(Problem):
    """Models cuDNN: convolution outputs and gradients are rounded to the dtype of x.

    ``perturbed(1)`` only rounds; later ones add noise, since equal sums have equal errors.
    """

    def perturbed(self, number: int) -> Results:
        convolution = reference.F.conv2d
        generator = torch.Generator().manual_seed(self.seed + number)
        eps = torch.finfo(self.dtype).eps if number > 1 else 0.0
        shares: list[Tensor] = []  # bias gradient, two per step

        def rounded(x: Tensor) -> Tensor:
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) - 0.5
            return (x * (1 + eps * noise)).to(self.dtype).to(x.dtype)

        def back(gradient: Tensor) -> Tensor:
            shares.append(rounded(gradient).sum((0, 2, 3)))
            return rounded(gradient)

        def convolve(*arguments: Any, **options: Any) -> Tensor:
            sums = convolution(*arguments, **options)
            if sums.requires_grad:
                sums.register_hook(back)
            return sums + (rounded(sums) - sums).detach()

        with mock.patch.object(reference.F, "conv2d", convolve):
            results = super().perturbed(number)
        if "gradient of bias" in results and shares:
            results["gradient of bias"] = torch.stack(shares).sum(0) / 2
        return results


def kind_of(device: str) -> type[Problem]:
    return RoundedSums if device == "cuda" else Problem


@st.composite
def conv_lstms(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    device: str = "cpu",
    max_time: int = 4,
    max_size: int = 9,
    channels: list[int] | None = None,
    kind: type[Problem] | None = None,
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    time, batch = draw(st.integers(1, max_time)), draw(st.integers(1, 3))
    inputs = draw(st.sampled_from(channels or [1, 2, 3, 7, 16, 18]))
    hidden = draw(st.sampled_from(channels or [1, 2, 4, 5, 8, 9, 16, 17]))
    size = [draw(st.integers(1, max_size)) for _ in range(2)]
    kernel_ih = [draw(st.integers(1, 4)) for _ in range(2)]
    kernel_hh = [draw(st.sampled_from([1, 3, 5])) for _ in range(2)]
    number_or_pair = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
    # Even sides and 3x3 kernels select the tiled path.
    tiled = max_size >= 8 and draw(st.booleans())
    if tiled:
        size = [draw(st.sampled_from([8, 10])), draw(st.sampled_from([8, 12]))]
        kernel_ih = kernel_hh = [3, 3]
    options: dict[str, Any] = {
        "stride": 1 if tiled else draw(number_or_pair),
        "dilation": 1 if tiled else draw(number_or_pair),
        "padding": draw(st.sampled_from(["same", "same", "valid", 1, (0, 2), 3])),
        "batch_first": draw(st.booleans()),
        "keep_gates": draw(st.booleans()),
    }
    stride, dilation = ((x, x) if isinstance(x, int) else x for x in (options["stride"], options["dilation"]))

    def map_size() -> tuple[int, int]:
        pads = paddings("", options["padding"], size, kernel_ih, stride, dilation)
        return output_size(size, kernel_ih, stride, pads, dilation)

    if min(map_size()) < 1:
        options["padding"] = "same"
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    parameter = draw(st.sampled_from([dtype, state_dtype(dtype)]))

    def normal(shape: list[int], kind: torch.dtype, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return laid_out(values.to(kind), draw(st.sampled_from(LAYOUTS)), seed).to(device)

    leading = [batch, time] if options["batch_first"] else [time, batch]
    state = [batch, hidden, *map_size()]
    tensors: dict[str, Tensor | None] = {
        "x": normal([*leading, inputs, *size], dtype),
        "weight_ih": normal([4 * hidden, inputs, *kernel_ih], dtype, 0.4),
        "weight_hh": normal([4 * hidden, hidden, *kernel_hh], dtype, 0.3),
        "bias": normal([4 * hidden], parameter) if draw(st.booleans()) else None,
        "peephole": None,
        "reset": torch.rand(leading, generator=generator).to(device) < 0.3 if draw(st.booleans()) else None,
    }
    peephole = draw(st.sampled_from([None, [3, hidden], [3, hidden, *state[2:]]]))
    if peephole is not None:
        tensors["peephole"] = normal(peephole, parameter)
    if draw(st.booleans()):
        tensors |= {"h": normal(state, dtype), "c": normal(state, parameter)}
    return (kind or kind_of(device))(
        conv_lstm,
        tensors,
        options,
        grad_layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
        unused_output=draw(st.sampled_from([None, 0, 1, 2])),
        seed=seed,
        activations=2,
    )


def small_conv_lstm(device: str, dtype: torch.dtype = torch.float64, time: int = 3, **options: Any) -> Problem:
    """x (time, batch, channels, height, width) = (3, 2, 3, 4, 5), hidden 2."""

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return (0.5 * torch.randn(shape, dtype=torch.float64)).to(kind).to(device)

    state = state_dtype(dtype)
    tensors = {
        "x": normal(time, 2, 3, 4, 5),
        "weight_ih": normal(8, 3, 3, 2),
        "weight_hh": normal(8, 2, 3, 3),
        "bias": normal(8, kind=state),
        "peephole": normal(3, 2, kind=state),
        "h": normal(2, 2, 4, 5),
        "c": normal(2, 2, 4, 5, kind=state),
    }
    return kind_of(device)(conv_lstm, tensors, options, grad_layouts=("contiguous",) * 3, activations=2)


def small_conv_lstm_step(device: str, dtype: torch.dtype = torch.float64) -> Problem:
    problem = small_conv_lstm(device, dtype)
    problem.tensors["x"] = problem.tensors["x"][0]
    problem.function = conv_lstm_step
    return problem


SMALL = {"conv_lstm": small_conv_lstm, "conv_lstm_step": small_conv_lstm_step}
