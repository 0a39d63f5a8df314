"""A map of places, read and written through turning keys."""

from wmkernels.place_memory.spec import SPEC

__all__ = ["SPEC"]
