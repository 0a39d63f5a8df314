"""ConvLSTM convolutions and gradients by PyTorch, channels last.

Gradients of h use flipped, transposed weights: cuDNN's forward kernels are deterministic and usually as fast.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _channels_last(x: Tensor) -> Tensor:
    # With channels last, PyTorch's strided bfloat16 CPU convolution of one channel reads out of bounds.
    if x.shape[1] == 1 and not x.is_cuda:
        return x.contiguous().flatten().view(x.shape)
    return x.contiguous(memory_format=torch.channels_last)


def merged(maps: Tensor) -> Tensor:
    """(time, batch, ...) -> (time * batch, ...), channels last."""
    return _channels_last(maps.flatten(0, 1))


def rows(maps: Tensor) -> Tensor:
    """(..., channels, height, width) -> (..., height * width, channels), contiguous."""
    return maps.movedim(-3, -1).contiguous().flatten(-3, -2)


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Makes cuDNN deterministic."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


class Convolution:
    """Convolution; ``padding`` is (top, bottom, left, right)."""

    def __init__(self, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
        self.weight = _channels_last(weight)
        self.stride, self.dilation = list(stride), list(dilation)
        top, bottom, left, right = padding
        # PyTorch pads symmetrically; the rest is padded first.
        self.inner = [min(top, bottom), min(left, right)]
        self.extra = (left - self.inner[1], right - self.inner[1], top - self.inner[0], bottom - self.inner[0])

    @classmethod
    def same(cls, weight: Tensor) -> "Convolution":
        vertical, horizontal = weight.shape[2] // 2, weight.shape[3] // 2
        return cls(weight, (1, 1), (vertical, vertical, horizontal, horizontal), (1, 1))

    def transposed(self) -> "Convolution":
        """Input gradient of a "same" convolution."""
        return Convolution.same(self.weight.flip(2, 3).transpose(0, 1))

    def _padded(self, maps: Tensor) -> Tensor:
        return _channels_last(F.pad(maps, self.extra)) if any(self.extra) else maps

    def __call__(self, maps: Tensor) -> Tensor:
        """(time * batch, positions, channels)."""
        padded = self._padded(maps)
        return rows(F.conv2d(padded, self.weight, None, self.stride, self.inner, self.dilation))

    def gradients(self, grad: Tensor, maps: Tensor, of_input: bool) -> tuple[Tensor | None, Tensor]:
        padded = self._padded(maps)
        # Some CPU convolutions need a contiguous weight.
        weight = self.weight if grad.is_cuda else self.weight.contiguous()
        options = (None, self.stride, self.inner, self.dilation, False, [0, 0], 1, [of_input, True, False])
        with deterministic(grad.device):
            grad_padded, grad_weight, _ = torch.ops.aten.convolution_backward(grad, padded, weight, *options)
        if of_input and any(self.extra):
            left, right, top, bottom = self.extra
            height, width = grad_padded.shape[-2:]
            grad_padded = grad_padded[..., top : height - bottom, left : width - right]
        return (grad_padded if of_input else None), grad_weight
