"""Floating-point operations of the place memory, for ``torch.utils.flop_counter``."""

from wmkernels.place_memory.meta import PlaceMemoryInputs


def forward_flops(inputs: PlaceMemoryInputs) -> int:
    """A write and a read of every place, and a delta write's product by the inverse."""
    return _products(inputs, 2)


def backward_flops(inputs: PlaceMemoryInputs, phase_gradient: bool, key_gradient: bool) -> int:
    """The same in reverse; the writes twice again for gradients of phases or keys; outer products for those of keys."""
    return _products(inputs, 2 + 2 * (phase_gradient or key_gradient) + 2 * key_gradient)


def _products(inputs: PlaceMemoryInputs, passes: int) -> int:
    places, rows = inputs.keys.shape
    per_value = passes * rows + (0 if inputs.inverse is None else places)
    return 2 * inputs.values.numel() * per_value
