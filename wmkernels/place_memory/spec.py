"""The place memory; it has no GPU kernels."""

from wmkernels.registry import OpSpec, register

SPEC = register(OpSpec(name="place_memory", functions=("place_memory",)))
