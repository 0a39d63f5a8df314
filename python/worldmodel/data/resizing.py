"""Smaller images and maps, by area interpolation: a pixel is the mean of the area that it covers."""

import numpy as np


def resized(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., rows, columns, channels) -> float64 (..., height, width, channels), at most as many.

    Whole numbers are summed exactly, and without BLAS, whose threads wait for each other on a busy machine.

    Example:
        >>> resized(np.array([[0, 3, 6]])[..., None], 1, 2)[..., 0]
        array([[1., 5.]])
    """
    area = array.shape[-3] * array.shape[-2]
    sums = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    return _stretches(_stretches(sums, -3, height), -2, width) / area


def _stretches(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Sums over ``count`` equal stretches of ``axis``, times ``count``; a pixel on an edge counts by its parts."""
    size = array.shape[axis]
    if count == size:
        return array * size
    whole, part = np.divmod(np.arange(count + 1) * size, count)  # edges, in pixels and 1 / count of one
    before = np.cumsum(np.insert(array, 0, 0, axis), axis)
    lead = [1] * (-axis - 1)
    cut = np.take(array, np.minimum(whole, size - 1), axis) * part.reshape(-1, *lead)
    return np.diff(np.take(before, whole, axis) * count + cut, axis=axis)
