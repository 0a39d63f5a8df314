"""Floating-point operations of the place memory, for ``torch.utils.flop_counter``."""

from wmkernels.place_memory.meta import PlaceMemoryInputs


def forward_flops(inputs: PlaceMemoryInputs) -> int:
    """A write and a read of every place, and a delta write's product by the inverse."""
    return _products(inputs, 2)


def backward_flops(inputs: PlaceMemoryInputs, phase_gradient: bool) -> int:
    """The same in reverse, and twice the writes again where phases have gradients."""
    return _products(inputs, 4 if phase_gradient else 2)


def _products(inputs: PlaceMemoryInputs, passes: int) -> int:
    places, rows = inputs.keys.shape
    per_value = passes * rows + (0 if inputs.inverse is None else places)
    return 2 * inputs.values.numel() * per_value
